"""The two kinds of generators that can be aligned: opening, drawing for reports, saving."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale import processes, storage
from nextscale.align.config import AlignConfig
from nextscale.align.prompts import Condition, Controlled
from nextscale.align.references import AdapterOff, FrozenCopy
from nextscale.align.trajectory import Policy
from nextscale.errors import UserError, missing_extra, require
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import image_stream, stream
from nextscale.training.session import resolve_precision
from nextscale.var.lora import DEFAULT_TARGETS, add_lora, base_fingerprint, save_lora
from nextscale.var.model_folder import save_model

_ABOUT = "nextscale.json"  # what `nextscale train diffusion` adds to a pipeline's folder
_DIFFUSION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class AlignModel(Protocol):
    """A generator with its policy.

    Attributes:
        policy: Draws rollouts and judges them.
        num_classes: Classes it takes; None: it takes prompts.
        grammar: "scenes" if it takes captions of the scenes world, else None.
        resolution: (height, width) of its pictures.
    """

    policy: Policy
    num_classes: int | None
    grammar: str | None

    @property
    def resolution(self) -> tuple[int, int]:
        """See above."""
        ...

    def check(self, conditions: Sequence[Condition]) -> None:
        """Refuse prompts that the generator cannot read, before any work."""
        ...

    def add_reference(self) -> nn.Module | None:
        """Keep the weights as they are now, to compare with; a copy, if it takes one."""
        ...

    def draw(
        self,
        network: nn.Module | None,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1] on the CPU as users would draw them.

        Args:
            network: What is trained, as it is then; None: the generator as it came.
            conditions: Prompts or class labels.
            seeds: One per picture.
            start: Where pictures start, one row each; None: as the generator does.
        """
        ...

    def fingerprint(self) -> str:
        """Of the generator's own weights, without a LoRA."""
        ...

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the model, or its LoRA."""
        ...


def open_model(config: AlignConfig) -> AlignModel:
    """Open the model of a configuration, with a new LoRA if it asks for one.

    Raises:
        UserError: If there is no such model, or its sampler has no log-probability.
    """
    device = torch.device(f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu")
    folder = storage.resolve_model(config.model)
    about = storage.read_json(folder / "model_index.json")
    with torch.random.fork_rng():
        torch.manual_seed(stream(config.seed).initial_seed())  # of a new LoRA
        if "_class_name" in about:  # diffusers' own key
            if config.control is not None:
                raise UserError(f"control is for next-scale models; {config.model} is none")
            return DiffusionModel(config, folder, device)
        if config.control is not None:
            from nextscale.align.controlled import ControlledModel

            return ControlledModel(config, device)
        return NextScaleModel(config, device)


class NextScaleModel:
    """A next-scale pipeline; see `AlignModel`."""

    def __init__(self, config: AlignConfig, device: torch.device) -> None:
        from nextscale.align.policies.next_scale import NextScalePolicy

        self.config = config
        self.pipe = NextScalePipeline.from_pretrained(config.model, device=device, dtype="float32")
        self.pipe.tokenizer.requires_grad_(False)
        self.pipe.transformer.gradient_checkpointing = config.gradient_checkpointing
        self.resolution = self.pipe.tokenizer.resolution
        conditioner = self.pipe.transformer.conditioner
        self.num_classes = None if conditioner.prompts else conditioner.config()["num_classes"]
        self.grammar = conditioner.config().get("grammar")
        if config.lora_rank:
            self._lora_targets = config.lora_target_modules or DEFAULT_TARGETS
            add_lora(
                self.pipe.transformer,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                targets=self._lora_targets,
            )
            self.pipe.transformer.to(device)
        self.half = resolve_precision(config.mixed_precision) in ("bf16", "fp16")
        settings = self.pipe.settings(
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        self.options: dict[str, Any] = {
            "settings": settings,
            "logp_space": config.logp_space,
            "autocast": torch.bfloat16 if self.half else None,
            "batch_size": config.rollout_batch_size,
            "train_scales": config.train_scales,
        }
        self.policy: Policy = NextScalePolicy(self.pipe, **self.options)

    def check(self, conditions: Sequence[Condition]) -> None:
        """A caption outside of the grammar; see `AlignModel`."""
        if any(isinstance(condition, Controlled) for condition in conditions):
            raise UserError(
                "prompts of images: are for tuning a control, and control is None: pass --control "
                "NAME, or captions alone, such as scenes:standard"
            )
        self.policy.encode(conditions)

    def add_reference(self) -> nn.Module | None:
        """See `AlignModel`."""
        return _add_reference(self.policy, self.config)

    def fingerprint(self) -> str:
        """See `AlignModel`."""
        return base_fingerprint(self.pipe.transformer)

    def draw(
        self,
        network: nn.Module | None,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """With the model's own generation settings; see `AlignModel`."""
        drawn_by: Any = self.pipe.transformer if network is None else network
        pipe = NextScalePipeline(self.pipe.tokenizer, drawn_by, self.pipe.generation)
        given: dict[str, Any] = {
            "prompt" if self.num_classes is None else "class_labels": conditions
        }
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=self.half):
            return pipe(
                **given,
                seed=list(seeds),
                batch_size=self.config.rollout_batch_size,
                start=start,
                output_type="pt",
            ).images

    def save(self, network: nn.Module, folder: Path) -> None:
        """See `AlignModel`."""
        if self.config.lora_rank:
            settings = {
                "rank": self.config.lora_rank,
                "alpha": self.config.lora_alpha,
                "target_modules": list(self._lora_targets),
            }
            save_lora(network, folder, settings)
        else:
            save_model(folder, self.pipe.tokenizer, network, self.pipe.generation)  # pyright: ignore


class DiffusionModel:
    """A diffusers pipeline; see `AlignModel`."""

    def __init__(self, config: AlignConfig, folder: Path, device: torch.device) -> None:
        try:
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline
            from diffusers.utils import logging as bars
        except ImportError as error:
            raise missing_extra(f"{config.model} is a diffusers pipeline", "align") from error
        from nextscale.align.policies.diffusion import DiffusionPolicy

        self.config = config
        bars.disable_progress_bar()  # of loading, which takes a second
        index = storage.read_json(folder / "model_index.json")
        # diffusers wants to hear again which text encoders a Stable Diffusion 3 was saved without.
        absent = {k: None for k, entry in index.items() if "_3" in k and entry == [None, None]}
        self.pipe: Any = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, **absent
        ).to(device)
        bars.enable_progress_bar()
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        _refuse_token_settings(config)
        half = resolve_precision(config.mixed_precision) in ("bf16", "fp16")
        options: dict[str, Any] = {
            "call": {name: _json_value(value) for name, value in config.diffusion.call.items()},
            "guidance_scale": config.guidance_scale,
            "eta": config.diffusion.eta,
            "noise_level": config.diffusion.noise_level,
            "logp_reduction": config.diffusion.logp_reduction,
            "autocast": torch.bfloat16 if half else None,
            "batch_size": config.rollout_batch_size,
        }
        steps = config.diffusion.num_inference_steps
        policy = DiffusionPolicy(self.pipe, num_inference_steps=steps, **options)
        self.policy: Policy = policy
        self._drawer = DiffusionPolicy(
            self.pipe, num_inference_steps=config.diffusion.eval_steps or steps, **options
        )
        network: Any = policy.network
        self.num_classes = network.config.num_embeds_ada_norm if policy.calls.by_class else None
        self._id2label = index.get("id2label")
        own = folder / _ABOUT
        self.grammar = storage.read_json(own).get("grammar") if own.is_file() else None
        if config.lora_rank:
            targets = config.lora_target_modules or _DIFFUSION_TARGETS
            _add_diffusers_lora(self.pipe, network, config, targets)
        else:
            network.requires_grad_(True)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()

    def adapt_guidance(self, threshold: float | None) -> None:
        """Adaptive guidance of all that is drawn from here on; see `DiffusionPolicy`."""
        require(
            "guidance_threshold",
            threshold,
            threshold is None or 0 <= threshold <= 1,
            "lie in [0, 1]",
        )
        for drawer in (self.policy, self._drawer):
            drawer.guidance_threshold = threshold  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def resolution(self) -> tuple[int, int]:
        """See `AlignModel`."""
        device = next(self.policy.network.parameters()).device
        zeros = torch.zeros(1, *self._drawer.plan.latent_shape, device=device)
        with torch.no_grad():
            height, width = self._drawer.calls.decode(self._drawer.plan, zeros).shape[2:]
        return height, width

    def check(self, conditions: Sequence[Condition]) -> None:
        """Any text can be read; see `AlignModel`."""

    def add_reference(self) -> nn.Module | None:
        """See `AlignModel`."""
        return _add_reference(self.policy, self.config)

    def fingerprint(self) -> str:
        """See `AlignModel`."""
        return base_fingerprint(self.policy.network)

    def draw(
        self,
        network: nn.Module | None,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """With the deterministic sampler (eta 0, or the ODE); see `AlignModel`."""
        with self._using(self.policy.network if network is None else network):
            encoded = self._drawer.encode(list(conditions))
            drawn = self._drawer.sample(
                encoded,
                generators=[image_stream(seed) for seed in seeds],
                deterministic=True,
                start=start,
            )
            return self._drawer.decode(drawn).cpu()

    def save(self, network: nn.Module, folder: Path) -> None:
        """In diffusers' own formats; see `AlignModel`."""
        from nextscale.align.policies.saving import save_diffusion

        with self._using(network):
            save_diffusion(self.pipe, folder, lora=self.config.lora_rank > 0)
        if self.config.lora_rank:
            return
        if self.grammar is not None:
            storage.write_json(folder / _ABOUT, {"grammar": self.grammar})
        if self._id2label is not None:  # DiTPipeline does not keep it
            index = storage.read_json(folder / "model_index.json")
            storage.write_json(folder / "model_index.json", {**index, "id2label": self._id2label})

    @contextlib.contextmanager
    def _using(self, network: nn.Module) -> Iterator[None]:
        """The pipeline with other weights, such as the average, in place of its own."""
        own = self.policy.network
        name = next(name for name, part in self.pipe.components.items() if part is own)
        setattr(self.pipe, name, network)
        try:
            yield
        finally:
            setattr(self.pipe, name, own)


def _refuse_token_settings(config: AlignConfig) -> None:
    """Settings of next-scale models that would do nothing here."""
    unused = {
        "temperature": config.temperature is not None,
        "top_k": config.top_k > 0,
        "top_p": config.top_p < 1,
        "logp_space": config.logp_space != "guided",
        "train_scales": config.train_scales is not None,
    }
    if given := [name for name, is_given in unused.items() if is_given]:
        raise UserError(
            f"{', '.join(given)} belongs to next-scale models; {config.model} is a diffusers "
            "pipeline. Leave it out"
        )


def _json_value(text: str) -> Any:
    """A value of `diffusion.call`; what is no JSON is a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _add_diffusers_lora(
    pipe: Any, network: Any, config: AlignConfig, targets: Sequence[str]
) -> None:
    """A LoRA by diffusers' own call, so that it can be saved in diffusers' format."""
    from peft import LoraConfig

    if not hasattr(pipe, "save_lora_weights") or not hasattr(network, "add_adapter"):
        raise UserError(
            f"diffusers has no LoRA format for {type(pipe).__name__}; train all weights, "
            "lora_rank 0"
        )
    alpha: Any = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    settings = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=list(targets))
    try:
        network.add_adapter(settings)
    except ValueError as error:
        raise UserError(f"lora_target_modules {list(targets)}: {error}") from error


def _add_reference(policy: Policy, config: AlignConfig) -> nn.Module | None:
    if config.lora_rank:
        policy.baseline = AdapterOff()
        return None
    reference = FrozenCopy(policy.network)
    policy.baseline = reference
    return reference.module
