"""`NextScalePipeline`: tokenizer + transformer, from prompts or labels to pictures."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale import storage
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.processes import cpu_prefers_bfloat16
from nextscale.streams import candidate_seeds, image_seeds
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig, ScaleStep, sample
from nextscale.var.editing import box_mask, keep_tokens
from nextscale.var.lora import base_fingerprint
from nextscale.var.model_folder import read_generation, save_model
from nextscale.var.sampling import Forcing

if TYPE_CHECKING:
    from PIL import Image

    from nextscale.control import Control, ControlModule
    from nextscale.control.attach import Attached

OutputType = Literal["pil", "pt", "np"]


@dataclass
class PipelineOutput:
    """What a call returns; image i = p * num_images_per_prompt + j.

    Attributes:
        images: PIL images, or float [B, 3, H, W] in [0, 1] ("pt"), or float32 [B, H, W, 3] ("np").
        tokens: LongTensor [B, L] on the CPU, scales concatenated coarse to fine.
        seeds: One per image: running the call with it as `seed` gives this image alone.
        scales: With `return_scales`: the picture after each scale, K of [B, 3, H, W] in [0, 1].
    """

    images: Any
    tokens: Tensor
    seeds: list[int]
    scales: list[Tensor] | None = None


@dataclass(frozen=True)
class Request:
    """A batch of a call, as a search is given it.

    Attributes:
        conditions: Prompts or class labels, one per image; empty without any (guess mode).
        ids: From `transformer.conditioner.tokenize`.
        settings: How to draw one picture.
        seeds: One per image.
        negative_ids: Rows of the guidance's other side; None: the null condition.
        controls: For the same images.
    """

    conditions: list[Any]
    ids: Tensor
    settings: SamplingConfig
    seeds: list[int]
    negative_ids: Tensor | None
    controls: list[Attached]


Search = Callable[["NextScalePipeline", Request], tuple[Tensor, Tensor]]
"""Draws a batch in its own way: tokens [b, L] and images [b, 3, H, W] in [0, 1]."""


class NextScalePipeline:
    """Generates pictures scale by scale.

    Args:
        tokenizer: Images <-> tokens.
        transformer: Predicts tokens; holds its conditioner.
        generation: Settings for what a call leaves at None.
    """

    def __init__(
        self,
        tokenizer: MultiscaleVQ,
        transformer: NextScaleTransformer,
        generation: SamplingConfig | None = None,
    ) -> None:
        sizes = (tokenizer.config.codebook_size, tokenizer.config.codebook_dim, tokenizer.schedule)
        config = transformer.config
        if (config.codebook_size, config.codebook_dim, transformer.schedule) != sizes:
            raise UserError(
                f"transformer and tokenizer do not belong together: codebook "
                f"{config.codebook_size} x {config.codebook_dim} and scales {transformer.schedule} "
                f"against {sizes[0]} x {sizes[1]} and {sizes[2]}"
            )
        self.tokenizer = tokenizer.eval()
        self.transformer = transformer.eval()
        self.generation = generation or SamplingConfig()
        self._lora: Any = None
        self._controls: dict[str, ControlModule | Path] = {}  # a folder until it is used
        self._fingerprint: str | None = None  # of the base, where its weights no longer show it

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.transformer.parameters()) / 1e6
        height, width = self.tokenizer.resolution
        takes = "prompts" if self.transformer.conditioner.prompts else "class labels"
        return (
            f"NextScalePipeline({width}x{height} pixels from {takes}, {len(self.scales)} scales, "
            f"{millions:.1f} M parameters, {self.dtype} on {self.device})"
        )

    # ---- loading and saving ------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> NextScalePipeline:
        """Load a bundled model by name, a local folder, or a model of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: For example "scenes".
            device: Default: CUDA if there is one, else the CPU.
            dtype: "auto" (bf16 on CUDA and on CPUs that multiply in it, else float32), or a
                dtype or its name.
            revision: Branch, tag or commit of a hub model.
            local_files_only: Do not go to the network.

        Raises:
            UserError: If there is no such model, or its files are damaged or do not fit together.
        """
        folder = storage.resolve_model(
            str(pretrained_model_name_or_path), revision=revision, local_files_only=local_files_only
        )
        storage.check_model(folder)
        pipe = cls(
            MultiscaleVQ.from_pretrained(folder / "tokenizer"),
            NextScaleTransformer.from_pretrained(folder),
            read_generation(folder),
        )
        pipe._controls |= {f.name: f for f in sorted(folder.glob("controls/*")) if f.is_dir()}
        if pipe._controls and dtype in ("float16", torch.float16):
            pipe._fingerprint = base_fingerprint(pipe.transformer)
        return pipe._place(device, dtype)

    @classmethod
    def from_official(
        cls,
        *,
        transformer: str | Path | dict[str, Tensor],
        tokenizer: str | Path | dict[str, Tensor],
        scales: Sequence[int] | None = None,
        num_heads: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> NextScalePipeline:
        """Load released VAR checkpoints, e.g. `var_d16.pth` and `vae_ch160v4096z32.pth`.

        The official `cfg=1.5` is `guidance_scale=2.5` here.

        Args:
            transformer: File or state dict of the transformer.
            tokenizer: File or state dict of the tokenizer.
            scales: Sides of the token maps, if the number of positions does not tell them.
            num_heads: Heads, for files without a scale per head.
            device: As in `from_pretrained`.
            dtype: As in `from_pretrained`.
        """
        model = NextScaleTransformer.from_official(transformer, scales, num_heads)
        sides = [h for h, _ in model.schedule.sides]
        # The settings of the published FID (next-scale.md 3.2).
        generation = SamplingConfig(guidance_scale=2.5, top_k=900, top_p=0.96)
        pipe = cls(MultiscaleVQ.from_official(tokenizer, sides), model, generation)
        return pipe._place(device, dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the whole model to a folder, in one step.

        Args:
            folder: A model folder there is replaced; any other non-empty folder is refused.
            dtype: Cast the weights to this (the quantizer stays float32); None: as they are.
        """
        if self._lora is not None:
            raise UserError("a LoRA is loaded; call fuse_lora() or unload_lora() before saving")
        # Before the folder is replaced. They belong to the weights as they are saved.
        controls = {name: copy.copy(self.control(name)) for name in self._controls}
        if controls:
            stamp = base_fingerprint(self.transformer, dtype)
            for module in controls.values():
                module.record = replace(module.record, base_fingerprint=stamp)
        save_model(folder, self.tokenizer, self.transformer, self.generation, controls, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload to the Hugging Face hub; returns the address of the commit."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    # ---- placement ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which transformer, encoder and decoder compute."""
        return self.transformer.head.weight.dtype

    @property
    def scales(self) -> list[tuple[int, int]]:
        """(height, width) of the token map of every scale, coarse to fine."""
        return list(self.transformer.schedule.sides)

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> NextScalePipeline:
        """Move and cast; the quantizer stays float32. Returns self.

        Args:
            device: None: stay.
            dtype: A dtype, its name, or "auto" (bf16 on CUDA and on CPUs that multiply in it, else
                float32); None: as it is.
        """
        target = self.device if device is None else torch.device(device)
        resolved = self.dtype if dtype is None else resolve_dtype(dtype, target)
        if self._controls and resolved == torch.float16 != self.dtype:
            self._fingerprint = self._base()  # which float16 would round
        self.transformer.to(target, resolved)
        self.tokenizer.to(target).to_dtype(resolved)
        for module in self._controls.values():
            if not isinstance(module, Path):
                module.to(target, resolved)
        return self

    def _place(
        self, device: str | torch.device | None, dtype: str | torch.dtype
    ) -> NextScalePipeline:
        """`to`, with CUDA as the default device where there is one."""
        return self.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)

    # ---- adapters ----------------------------------------------------------------------------

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Add a LoRA, or differences of weights, to the transformer.

        Args:
            path: Folder with adapter_config.json and adapter_model.safetensors, of `nextscale train
                var --lora_rank`, `nextscale align` or `nextscale erase`.
            scale: Strength; 0 is the base model.

        Raises:
            UserError: If it was trained on another base (by fingerprint), or one is loaded already.
        """
        from nextscale.var import delta
        from nextscale.var.lora import adapter_file, load_lora

        if self._lora is not None:
            raise UserError("a LoRA is loaded; call unload_lora() first")
        self._fingerprint = self._base()
        about = storage.read_json(adapter_file(path, "adapter_config.json"))
        is_delta = isinstance(about, dict) and about.get("class") == delta.KIND
        self._lora = (delta.load_delta if is_delta else load_lora)(self.transformer, path, scale)

    def unload_lora(self) -> None:
        """Take the LoRA off; the weights are the base's again."""
        if self._lora is not None:
            self._lora.unload()
            self._lora = None

    def fuse_lora(self) -> None:
        """Add the LoRA into the weights, for speed; it cannot be unloaded afterwards."""
        if self._lora is None:
            raise UserError("no LoRA is loaded; call load_lora(path) first")
        self._lora.merge_and_unload()
        self._lora = None

    @property
    def controls(self) -> list[str]:
        """Names of the control modules that `control_type` may say."""
        return list(self._controls)

    def load_control(self, path: str | Path, name: str | None = None) -> str:
        """Add a control module (trained by `nextscale train control`).

        Args:
            path: Its folder, a run of `train control`, or a hub id.
            name: What `control_type` calls it; None: the type that it was trained for.

        Returns:
            The name.

        Raises:
            UserError: If there is none, or it was trained on another base (by fingerprint).
        """
        from nextscale.control import find_control, read_control

        module = read_control(find_control(path))
        return self.add_control(module.requires_grad_(False), name)

    def add_control(self, module: ControlModule, name: str | None = None) -> str:
        """The same with an open module."""
        name = name or module.record.type
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise UserError(f'"{name}" cannot name a control: use letters, digits, ".", "-", "_"')
        self._controls[name] = self._fitting(module)
        return name

    def unload_control(self, name: str) -> None:
        """Take a control module away."""
        self.control(name)
        del self._controls[name]

    def control(self, name: str) -> ControlModule:
        """A control module by name.

        Raises:
            UserError: If there is none of this name.
        """
        found = self._controls.get(name)
        if found is None:
            have = ", ".join(self._controls) or "none"
            raise UserError(
                f'there is no control "{name}" (loaded: {have}); use one of these, or load one '
                "of your own: load_control(path), --control FOLDER"
            )
        if isinstance(found, Path):
            from nextscale.control import read_control

            found = self._fitting(read_control(found).requires_grad_(False))
            self._controls[name] = found
        return found

    def _base(self) -> str:
        """Fingerprint of the base weights."""
        if self._fingerprint is None and self.dtype == torch.float16:
            raise UserError(
                "a LoRA or control is put on a base in float32 or bfloat16, because float16 "
                "rounds what it is known by: load the model in one of these, and cast it afterwards"
            )
        return self._fingerprint or base_fingerprint(self.transformer)

    def _fitting(self, module: ControlModule) -> ControlModule:
        """A module of this base, on its device."""
        from nextscale.control.module import check_base

        check_base(module, self.transformer, self._base())
        return module.to(self.device, self.dtype)

    # ---- generation --------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: int | str | list[int] | list[str] | Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | tuple[float, ...] | None = None,
        guidance_schedule: Literal["linear", "constant"] | None = None,
        guidance_end: int | None = None,
        guidance_threshold: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | tuple[float, ...] | None = None,
        temperature_end: float | None = None,
        temperature_power: float | None = None,
        more_smooth: bool | None = None,
        num_candidates: int | None = None,
        start: Tensor | None = None,
        search: Search | None = None,
        control_image: Any = None,
        control_type: str | list[str] | None = None,
        control_scale: Any = None,
        controls: Sequence[Control | Attached] | None = None,
        control_guidance_scale: float | tuple[float, ...] | None = None,
        control_in_negative: bool | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: OutputType = "pil",
        return_scales: bool = False,
        callback: Callable[[int, ScaleStep], None] | None = None,
        progress: bool = False,
        **unknown: Any,
    ) -> PipelineOutput:
        """Generate pictures of prompts or class labels: exactly one of the two.

        Settings left at None come from the model's `generation_config.json`.

        Args:
            prompt: One or several.
            class_labels: Numbers or names, one or several.
            negative_prompt: What guidance moves away from; one for all or one per prompt.
            num_images_per_prompt: Pictures per prompt or label.
            guidance_scale: g in u + g (c - u); 1.0 is off. The official `cfg=1.5` is 2.5 here.
            guidance_schedule: linear (ramp over the scales) or constant.
            guidance_end: Guidance is off from this scale on.
            guidance_threshold: An image goes on without guidance once it moves its distributions by
                no more than this.
            top_k: Most likely codes kept; 0 is off.
            top_p: Probability mass kept, in (0, 1]; 1.0 is off.
            temperature: Positive.
            temperature_end: Temperature of the last scale, if it changes over the scales.
            temperature_power: 1: it changes linearly.
            more_smooth: Gumbel-softmax mixing of codes.
            num_candidates: Pictures drawn per image, of which the likeliest is kept.
            start: One row per image, or per candidate of each: floats [n, d] are added to the start
                token; integers [n, p] are the tokens of the first scales, and decoding begins
                after them.
            search: Draws each batch in its own way, such as the best of several by a reward: see
                `nextscale.align.search`.
            control_image: A control map (PIL, uint8 [H, W, 3], float [3, H, W] in [0, 1]), or a
                list of one per prompt or image; with a list of types, a list of such.
            control_type: Name of the control module (see `controls` of the pipeline): canny, ...
            control_scale: Strength: one number or one per scale; 1 as trained, 0 is off.
            controls: Instead of the three: `nextscale.control.Control`, for ranges of scales,
                strength by block or place, and guess mode (which needs no prompt); or what
                `nextscale.control.attach` made of one, to encode its map once for many calls.
            control_guidance_scale: Guidance of control apart from that of the prompt.
            control_in_negative: Control on both sides of guidance.
            seed: Image i draws from `seed + i`, or from its own of a list; None: random, see
                `seeds` of the output.
            generator: Instead of `seed`: one that draws the base seed, or a list, one per image,
                each of which draws its image's seed.
            batch_size: Split the call into batches; the draws do not change.
            output_type: "pil", "pt" or "np".
            return_scales: Also decode the picture after every scale.
            callback: Called with (index of the first image of the batch, step) after every scale;
                the step has num_candidates rows for each image.
            progress: Show a bar over batches.
            unknown: Refused with an explanation.

        Raises:
            UserError: For a bad value.
            TypeError: For an unknown keyword.
        """
        if unknown:
            raise TypeError(_explain_unknown(unknown))
        short = (control_image, control_type, control_scale)
        if controls is not None and any(value is not None for value in short):
            raise UserError(
                "pass controls, or control_image, control_type and control_scale, not both"
            )
        if controls is not None and not isinstance(controls, list | tuple):
            raise UserError("controls is a list of nextscale.control.Control")
        if controls is None and (control_image is not None or control_type is not None):
            from nextscale.control.maps import as_controls

            controls = as_controls(control_image, control_type, control_scale)
        ids = self._ids(prompt, class_labels, controls)
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt must be 1 or more, got {num_images_per_prompt}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if output_type not in ("pil", "pt", "np"):
            raise UserError(f'output_type must be pil, pt or np, got "{output_type}"')
        settings = self.settings(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_end=guidance_end,
            guidance_threshold=guidance_threshold,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            temperature_end=temperature_end,
            temperature_power=temperature_power,
            more_smooth=more_smooth,
            num_candidates=num_candidates,
            control_guidance_scale=control_guidance_scale,
            control_in_negative=control_in_negative,
        )
        prompts, count = len(ids), len(ids) * num_images_per_prompt
        seeds = image_seeds(seed, generator, count)
        attached = self._attach(controls, prompts, num_images_per_prompt)
        if not attached:
            _refuse_without_control(
                control_scale=control_scale,
                control_guidance_scale=control_guidance_scale,
                control_in_negative=control_in_negative,
            )
        ids = ids.repeat_interleave(num_images_per_prompt, 0)
        negative_ids = self._negative(negative_prompt, prompts, num_images_per_prompt)
        if start is not None and not isinstance(start, Tensor):
            raise UserError(
                f"start is a {type(start).__name__}, not a tensor; nextscale.align.start_model has "
                "Start(FILE, pipe), which makes one of prompts and seeds"
            )
        each = 1 if start is None or len(start) == count else settings.num_candidates
        if start is not None and len(start) != count * each:
            what = f"{count} images" + (f" of {each} candidates" if each > 1 else "")
            raise UserError(
                f"start has {len(start)} rows for {what}: it needs one for each image, or for each "
                "candidate of it"
            )
        self.given_scales(start)
        if search is not None and (isinstance(search, type) or not callable(search)):
            raise UserError(
                f"search is {search!r}; it takes an object such as BestOf(open_reward('clip'), 8), "
                "from nextscale.align.search and nextscale.align.rewards"
            )
        if search is not None and num_candidates not in (None, 1):
            raise UserError("search takes the place of num_candidates: leave one of them out")
        if search is not None and (start is not None or return_scales or callback is not None):
            raise UserError("search takes no start, return_scales or callback; leave them out")
        asked = self._asked(prompt, class_labels, num_images_per_prompt) if search else []
        size = batch_size or count
        images, tokens, previews = [], [], []
        for first in _progress(range(0, count, size), progress):
            rows = slice(first, min(first + size, count))
            negative = None if negative_ids is None else negative_ids[rows]
            under = [control[rows] for control in attached]
            if search is not None:
                single = replace(settings, num_candidates=1)
                request = Request(asked[rows], ids[rows], single, seeds[rows], negative, under)
                found, pictures = search(self, request)
                tokens.append(found.cpu())
                images.append(pictures.cpu())
                continue
            drawn, latents = self._draw(
                ids[rows],
                settings,
                seeds[rows],
                negative_ids=negative,
                start=None if start is None else start[rows.start * each : rows.stop * each],
                controls=under,
                every_scale=return_scales,
                callback=None if callback is None else partial(callback, first),
            )
            tokens.append(drawn.cpu())
            images.append(self.decode(latents[-1]).cpu())
            if return_scales:
                previews.append([self.decode(f_hat).cpu() for f_hat in latents])
        scales = [torch.cat(parts) for parts in zip(*previews, strict=True)] or None
        return PipelineOutput(
            _convert(torch.cat(images), output_type), torch.cat(tokens), seeds, scales
        )

    def given_scales(self, start: Tensor | None) -> int:
        """How many scales a `start` of the call gives; 0 for None and offsets.

        Raises:
            UserError: If its tokens are no whole scales.
        """
        if start is None or start.is_floating_point():
            return 0
        ends = [where.stop for where in self.transformer.schedule.slices]
        if start.shape[1] not in ends[:-1]:
            raise UserError(f"start has {start.shape[1]} tokens; whole scales have {ends[:-1]}")
        return ends.index(start.shape[1]) + 1

    @torch.no_grad()
    def stream(
        self,
        ids: Tensor,
        settings: SamplingConfig,
        *,
        seeds: Sequence[int],
        negative_ids: Tensor | None = None,
        forcing: Forcing | None = None,
        start: Tensor | None = None,
        controls: Sequence[Attached] = (),
    ) -> Iterator[ScaleStep]:
        """The steps of one batch, for those who want every scale (see `nextscale.var.sample`).

        Args:
            ids: From `transformer.conditioner.tokenize`, one row per image.
            settings: How to draw.
            seeds: One per image.
            negative_ids: Rows of the guidance's other side; None: the null condition.
            forcing: Tokens that replace drawn ones.
            start: As in the call; the steps begin after the tokens that it gives.
            controls: From `nextscale.control.attach`, for the same images.
        """
        model = self.transformer
        negative = None if negative_ids is None else model.condition(negative_ids)
        name = "offset" if start is not None and start.is_floating_point() else "prefix"
        given: dict[str, Any] = {name: None if start is None else start.to(self.device)}
        if not controls:  # the model's own settings may have some for its controls
            settings = replace(settings, control_guidance_scale=None, control_in_negative=False)
        else:
            from nextscale.control import ControlHooks

            both = settings.control_in_negative
            given["hooks"] = ControlHooks(model, controls, cached=True, every_row=both)
        return sample(
            model,
            self.tokenizer,
            model.condition(ids),
            settings,
            seeds=seeds,
            negative=negative,
            forcing=forcing,
            **given,
        )

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        *,
        box: tuple[float, float, float, float],
        mode: Literal["inpaint", "outpaint"] = "inpaint",
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int] | list[str] | None = None,
        seed: int | None = None,
        output_type: OutputType = "pil",
        **settings: Any,
    ) -> PipelineOutput:
        """Zero-shot editing by token forcing (next-scale.md 3.3).

        Without prompt and label the null condition fills the hole from its surroundings, and
        guidance has no effect.

        Args:
            images: float [B, 3, H, W] in [0, 1], at the model's resolution.
            box: (top, left, bottom, right), fractions of the side in [0, 1].
            mode: inpaint replaces the inside of the box, outpaint the outside.
            prompt: What the result shows, one for all or one per image.
            class_labels: Likewise for class-conditional models.
            seed: As in the call.
            output_type: As in the call.
            settings: Sampling settings as in the call.
        """
        count = len(images)
        model = self.transformer
        _refuse_without_control(**{k: v for k, v in settings.items() if k.startswith("control_")})
        if prompt is None and class_labels is None:
            ids = model.conditioner.null(count)
            settings["guidance_scale"] = 1.0  # both sides are the null condition
        else:
            conditions = self._conditions(prompt, class_labels)
            if len(conditions) not in (1, count):
                raise UserError(f"{len(conditions)} prompts or labels for {count} images")
            ids = model.conditioner.tokenize(conditions)
            ids = ids.repeat_interleave(count, 0) if len(ids) != count else ids
        schedule = self.tokenizer.schedule
        source = self.tokenizer.encode(images.to(self.device) * 2 - 1)
        forcing = keep_tokens(schedule, source, box_mask(schedule, box, mode))
        seeds = image_seeds(seed, None, count)
        tokens, latents = self._draw(ids, self.settings(**settings), seeds, forcing=forcing)
        return PipelineOutput(_convert(self.decode(latents[-1]), output_type), tokens.cpu(), seeds)

    def _draw(
        self,
        ids: Tensor,
        settings: SamplingConfig,
        seeds: Sequence[int],
        *,
        negative_ids: Tensor | None = None,
        forcing: Forcing | None = None,
        start: Tensor | None = None,
        controls: Sequence[Attached] = (),
        every_scale: bool = False,
        callback: Callable[[ScaleStep], object] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens [b, t] and latents of the last or of every scale; the likeliest candidates."""
        each = settings.num_candidates
        shared = start is not None and len(start) == len(ids)
        if start is not None and shared:
            start = start.repeat_interleave(each, 0)
        rows = torch.arange(len(ids), device=self.device).repeat_interleave(each)
        ids = ids.repeat_interleave(each, 0)
        steps = self.stream(
            ids,
            settings,
            seeds=candidate_seeds(seeds, each),
            negative_ids=None if negative_ids is None else negative_ids.repeat_interleave(each, 0),
            forcing=None if forcing is None else forcing.repeat_interleave(each),
            start=start,
            controls=[control[rows] for control in controls],
        )
        parts, latents, scores = [], [], []
        if start is not None and not start.is_floating_point():
            parts.append(start.to(self.device))
            if each > 1 and not shared:
                scores.append(self._prefix_score(ids, parts[0], [c[rows] for c in controls]))
        for step in steps:
            parts.append(step.tokens)
            latents = [*(latents if every_scale else ()), step.f_hat]
            if each > 1:
                chosen = step.conditional.log_softmax(dim=-1).gather(2, step.tokens[..., None])
                scores.append(chosen.sum(dim=(1, 2)))
            if callback is not None:
                callback(step)
        tokens = torch.cat(parts, dim=1)
        if each == 1:
            return tokens, latents
        best = torch.stack(scores).sum(dim=0).view(-1, each).argmax(dim=1)
        kept = torch.arange(len(best), device=best.device) * each + best
        return tokens[kept], [f_hat[kept] for f_hat in latents]

    def _prefix_score(
        self, ids: Tensor, prefix: Int[Tensor, "b p"], controls: Sequence[Attached]
    ) -> Float[Tensor, " b"]:
        """Conditional log-probability of the tokens of the first scales."""
        hooks = None
        if controls:
            from nextscale.control import ControlHooks

            hooks = ControlHooks(self.transformer, controls, cached=False)
        lengths = self.tokenizer.schedule.lengths
        padded = torch.nn.functional.pad(prefix, (0, sum(lengths) - prefix.shape[1]))
        inputs = self.tokenizer.teacher_inputs(padded)[:, : prefix.shape[1] - lengths[0]]
        count = self.given_scales(prefix)
        logits = self.transformer(inputs, ids=ids, num_scales=count, hooks=hooks)
        return logits.log_softmax(dim=-1).gather(2, prefix[..., None]).sum(dim=(1, 2))

    def decode(self, f_hat: Tensor) -> Tensor:
        """float32 images in [0, 1] of an accumulated latent."""
        return (self.tokenizer.decode_latents(f_hat) + 1) / 2

    def settings(self, **given: Any) -> SamplingConfig:
        """The model's generation settings with those replaced that are not None."""
        known = {f.name for f in fields(SamplingConfig)}
        if unknown := set(given) - known:
            raise TypeError(_explain_unknown(dict.fromkeys(unknown)))
        return replace(self.generation, **{k: v for k, v in given.items() if v is not None})

    def _asked(self, prompt: Any, class_labels: Any, images_per_prompt: int) -> list[Any]:
        """Prompts or class numbers, one per image; nothing in guess mode."""
        if prompt is None and class_labels is None:
            return []
        given = list(self._conditions(prompt, class_labels))
        if not self.transformer.conditioner.prompts:
            given = self.transformer.conditioner.tokenize(given).flatten().tolist()
        return [condition for condition in given for _ in range(images_per_prompt)]

    def _ids(
        self, prompt: Any, class_labels: Any, controls: Sequence[Control | Attached] | None
    ) -> Tensor:
        """One row of ids per prompt or label; the null condition for guess mode without them."""
        conditioner = self.transformer.conditioner
        guess = bool(controls) and all(getattr(c, "guess_mode", False) for c in controls or ())
        if controls and guess and prompt is None and class_labels is None:
            image: Any = getattr(controls[0], "image", None)
            single = not isinstance(image, list | tuple) and getattr(image, "ndim", 3) < 4
            return conditioner.null(1 if single else len(image))
        return conditioner.tokenize(self._conditions(prompt, class_labels))

    def _attach(
        self, controls: Sequence[Control | Attached] | None, prompts: int, images_per_prompt: int
    ) -> list[Attached]:
        """The controls of a call, their maps encoded; those of one picture are for all."""
        if not controls:
            return []
        from nextscale.control import Control
        from nextscale.control.attach import Attached

        if not all(isinstance(control, Control | Attached) for control in controls):
            raise UserError("controls is a list of nextscale.control.Control")
        ready = [control for control in controls if isinstance(control, Attached)]
        controls = [control for control in controls if isinstance(control, Control)]
        count = prompts * images_per_prompt
        for control in ready:
            if len(control.pictures) not in (1, count):
                raise UserError(
                    f"an attached control has {len(control.pictures)} pictures, the call draws "
                    f"{count} images; attach one map, or one for each image"
                )
        every = torch.zeros(count, dtype=torch.long, device=self.device)
        ready = [control[every] if len(control.pictures) == 1 else control for control in ready]
        if not controls:
            return ready
        from nextscale.control.maps import attach_all

        modules = {control.type: self.control(control.type) for control in controls}
        return [*ready, *attach_all(controls, modules, prompts, images_per_prompt)]

    def _conditions(self, prompt: Any, class_labels: Any) -> list[Any]:
        """The list of prompts or labels, after checking that it is what the model takes."""
        if (prompt is None) == (class_labels is None):
            raise UserError("pass exactly one of prompt and class_labels")
        takes_prompts = self.transformer.conditioner.prompts
        if takes_prompts != (prompt is not None):
            wanted, got = (
                ("prompt", "class_labels") if takes_prompts else ("class_labels", "prompt")
            )
            raise UserError(f"this model takes {wanted}, got {got}")
        given = prompt if prompt is not None else class_labels
        if isinstance(given, Tensor):
            given = given.tolist()
        conditions = [given] if isinstance(given, str | int) else list(given)
        if not conditions:
            raise UserError("the list of prompts or class labels is empty; pass at least one")
        return conditions

    def _negative(self, prompt: Any, count: int, repeats: int) -> Tensor | None:
        if prompt is None:
            return None
        conditioner = self.transformer.conditioner
        if not conditioner.prompts:
            raise UserError("negative_prompt needs a model that takes prompts")
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise UserError(f"{len(prompts)} negative prompts for {count} prompts")
        return conditioner.tokenize(prompts).repeat_interleave(repeats, 0)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype from "auto" or a name.

    Raises:
        UserError: For a name that is no floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        fast = cpu_prefers_bfloat16() if device.type == "cpu" else device.type == "cuda"
        return torch.bfloat16 if fast else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise UserError(f'dtype must be auto, {", ".join(names)}, got "{dtype}"')
    return names[dtype]


def _convert(images: Tensor, output_type: OutputType) -> Any:
    """Float [B, 3, H, W] in [0, 1] -> what the caller asked for; 8 bits are rounded."""
    if output_type == "pt":
        return images.cpu()
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else to_pil(array)


def to_pil(array: np.ndarray) -> list[Image.Image]:
    """PIL images of float [n, H, W, 3] in [0, 1], rounded to 8 bits."""
    from PIL import Image

    return [Image.fromarray(p) for p in to_uint8(torch.from_numpy(array)).numpy()]


def _refuse_without_control(**given: Any) -> None:
    for name, value in given.items():
        if value not in (None, False):
            raise UserError(
                f"{name} needs a control; pass control_image and control_type when generating"
            )


def _progress(batches: range, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(batches, unit="batch", disable=not show)


def _explain_unknown(unknown: dict[str, Any]) -> str:
    hints = {
        "num_inference_steps": "the number of scales is the model's (pipe.scales)",
        "cfg": "use guidance_scale; the official cfg=1.5 is guidance_scale=2.5",
        "height": "the model has one resolution",
        "width": "the model has one resolution",
        "conditioning_scale": "use control_scale",
    }
    return "; ".join(
        f"unknown argument {name}" + (f": {hints[name]}" if name in hints else "")
        for name in unknown
    )


__all__ = [
    "NextScalePipeline",
    "PipelineOutput",
    "resolve_dtype",
    "to_pil",
]
