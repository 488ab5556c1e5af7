"""`nextscale train control`: pictures and their control maps -> a control module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale import processes, storage
from nextscale.control.adapter import AdapterConfig, AdapterControl
from nextscale.control.additive import AdditiveConfig
from nextscale.control.attach import Control, ControlHooks, attach
from nextscale.control.conditions import Extractor, ExtractorSettings, open_extractor
from nextscale.control.module import ControlConfig, ControlModule, ControlRecord
from nextscale.control.registry import ARCHITECTURES, build_control, find_control, read_control
from nextscale.control.side_network import SideNetworkConfig
from nextscale.data.config import DataConfig, open_dataset
from nextscale.errors import UserError, require
from nextscale.streams import stream
from nextscale.tokenizers import MultiscaleVQ
from nextscale.training import FitResult, TrainingConfig, adamw, decay_groups, fit, save_grid
from nextscale.var import NextScaleTransformer, SamplingConfig, sample
from nextscale.var.examples import Examples, batch_tokens
from nextscale.var.lora import add_lora, base_fingerprint
from nextscale.var.model_folder import read_generation, save_model

MIN_LAST_SHARE = 0.05  # of the batches that train the finest scale, under early-centric sampling
SHOWN = 8
Batch = dict[str, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class ControlTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train control`."""

    model: str = "scenes"
    """The base: a bundled model, a folder or a hub id."""
    control_type: str = "canny"
    """What maps are made of the images: TYPE or TYPE:SOURCE, as in `nextscale extract`."""
    extractor: ExtractorSettings = field(default_factory=ExtractorSettings)
    """Settings of the extractor."""
    initial: str | None = None
    """Begin with this module, of the same base and sizes: a control of the model by name, or a
    folder of an earlier run. It may be of another type."""
    architecture: Literal["additive", "adapter", "side_network"] = "additive"
    """additive: ControlAR; adapter: ECM; side_network: CAR, made additive."""
    additive: AdditiveConfig = field(default_factory=AdditiveConfig)
    """Sizes of additive control."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Sizes of adapters."""
    side_network: SideNetworkConfig = field(default_factory=SideNetworkConfig)
    """Sizes of a side network."""
    init_ffn_from_base: bool = False
    """adapter: the FFN begins as that of the base's first adapted block (not in the paper)."""

    unfreeze: Literal["none", "lora", "all"] = "none"
    """Train the base too: all of it (ControlAR) or a LoRA, which is fused at the end. The result is
    then a whole model, not a module."""
    lora_rank: int = 8
    """Rank of the LoRA with unfreeze=lora."""
    base_lr_scale: float = 0.1
    """Learning rate of an unfrozen base in units of `learning_rate`."""

    early_decay: float | None = None
    """Early-centric training (ECM): a batch trains the scales 0..m alone, m drawn with probability
    proportional to exp(-early_decay (m - early_start) / (K - 1 - early_start)), at least 5 % for
    the last; None: always all scales."""
    early_start: int | None = None
    """Coarsest last scale of early-centric training, from 0; None: ceil(K/2) - 1, the middle."""
    scale_weight: Literal["token", "scale"] = "token"
    """Mean of the cross-entropy over tokens, or over scales of their means."""

    condition_dropout: float = 0.1
    """Share of examples without prompt or label."""
    control_dropout: float = 0.1
    """Share without control, drawn apart from it: for guidance of each. Nothing of a frozen base's
    module trains on these."""
    joint_dropout: float = 0.05
    """Share without both."""

    num_validation_images: int = 256
    """Images of the validation split for the losses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "architecture": tuple(ARCHITECTURES),
            "unfreeze": ("none", "lora", "all"),
            "scale_weight": ("token", "scale"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
        for name in ("condition_dropout", "control_dropout", "joint_dropout"):
            value = getattr(self, name)
            require(name, value, 0 <= value < 1, "lie in [0, 1)")
        for name in ("lora_rank", "base_lr_scale", "num_validation_images"):
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")
        for name in ("early_decay", "early_start"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 0, "be 0 or more")
        if self.early_start is not None and self.early_decay is None:
            raise UserError("early_start needs early_decay, which is None: all scales always train")
        if self.init_ffn_from_base and self.architecture != "adapter":
            raise UserError("init_ffn_from_base is of the architecture adapter")

    @property
    def module(self) -> ControlConfig:
        """Sizes of the chosen architecture."""
        return getattr(self, self.architecture)


class ControlledTransformer(nn.Module):
    """Base and control module as one module, for the loop: logits under control."""

    def __init__(self, transformer: NextScaleTransformer, control: ControlModule) -> None:
        super().__init__()
        self.transformer, self.control = transformer, control

    def train(self, mode: bool = True) -> ControlledTransformer:
        """A base that takes no gradient stays in evaluation mode: no stochastic depth."""
        super().train(mode)
        if not any(p.requires_grad for p in self.transformer.parameters()):
            self.transformer.eval()
        return self

    def forward(
        self,
        inputs: Float[Tensor, "r u c"],
        ids: Tensor,
        maps: Float[Tensor, "b 3 H W"],
        keep: Bool[Tensor, " b"],
        num_scales: int,
    ) -> Float[Tensor, "r t v"]:
        """Teacher-forced logits of the first scales.

        Rows without `keep` are the base's, and so are rows beyond the b that have maps.
        """
        part = attach(self.control, maps, Control(image=None, type=self.control.record.type))
        hooks = ControlHooks(self.transformer, [part], cached=False, keep=keep)
        return self.transformer(inputs, ids=ids, num_scales=num_scales, hooks=hooks)


def train_control(config: ControlTrainingConfig, *, progress: bool = True) -> FitResult:
    """Train a control module and save it (or, unfrozen, the whole model) in `output_dir/model`.

    Args:
        config: The run.
        progress: Show a bar.

    Returns:
        The result of the loop; `metrics` holds `val/loss` under control and `val/loss_without`.
    """
    folder = storage.check_model(storage.resolve_model(config.model))
    tokenizer = MultiscaleVQ.from_pretrained(folder / "tokenizer").requires_grad_(False)
    base = NextScaleTransformer.from_pretrained(folder)
    generation = read_generation(folder) or SamplingConfig()
    extractor = open_extractor(config.control_type, **config.extractor.given())
    if tokenizer.resolution != (config.resolution, config.resolution):
        height, width = tokenizer.resolution
        raise UserError(
            f"resolution {config.resolution} does not fit the model {config.model}, whose pictures "
            f"have {width} x {height} pixels"
        )
    record = ControlRecord(
        type=extractor.type,
        resolution=tokenizer.resolution,
        base_fingerprint=base_fingerprint(base),
        extractor=extractor.record(),
    )
    scales = scale_shares(config, base.schedule.num_scales)
    examples = {
        split: Examples(open_dataset(config, split, seed=config.seed), tokenizer, False)
        for split in ("train", "validation")
    }
    for part in examples.values():
        part.conditioner = base.conditioner
    torch.manual_seed(stream(config.seed).initial_seed())
    module = build_control(config.module, base.config, record)
    if config.initial is not None:
        _begin_with(module, config.initial, folder)
    if config.init_ffn_from_base:
        _copy_feed_forward(module, base)
    base.requires_grad_(config.unfreeze == "all")
    lora = add_lora(base, rank=config.lora_rank) if config.unfreeze == "lora" else None
    if config.unfreeze == "all":
        base.conditioner.requires_grad_(False)
    model = ControlledTransformer(base, module)
    schedule = base.schedule

    def load_batch(indices: np.ndarray, step: int) -> Batch:
        batch = _with_maps(examples["train"], extractor, indices, step)
        # The third key keeps these draws apart from those of the random crops.
        streams = [stream(config.seed, step, int(i), 1) for i in indices]
        draws = torch.stack([torch.rand(3, generator=generator) for generator in streams])
        both = draws[:, 0] < config.joint_dropout
        ids = batch["ids"]
        assert ids is not None
        null = base.conditioner.null(len(indices))
        dropped = both | (draws[:, 1] < config.condition_dropout)
        batch["ids"] = torch.where(dropped.view(-1, *(1,) * (ids.ndim - 1)), null, ids)
        batch["keep"] = ~(both | (draws[:, 2] < config.control_dropout))
        return batch

    def losses(
        modules: Mapping[str, nn.Module], batch: Batch, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        # Alike on every process, so that none waits for another's finer scales.
        count = 1 + int(torch.multinomial(scales, 1, generator=stream(config.seed, step, 2)))
        entropy = _entropy(modules["model"], tokenizer, batch, count)
        loss = _mean(entropy, schedule.slices[:count], config.scale_weight)
        yield "model", loss, {"tokens": float(entropy.shape[1])}

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        network = modules["model"]
        assert isinstance(network, ControlledTransformer)
        report = _measure(network, tokenizer, examples["validation"], extractor, config)
        if processes.is_main():
            path = Path(config.output_dir) / "samples" / f"step_{step:08d}.png"
            _save_samples(network, tokenizer, examples["validation"], extractor, generation, path)
        return report

    result = fit(
        config,
        modules={"model": model, "tokenizer": tokenizer},
        optimizers={"model": _optimizer(model, config)},
        load_batch=load_batch,
        dataset_size=len(examples["train"]),
        losses=losses,
        validate=validate,
        progress=progress,
        find_unused_parameters=True,  # a batch may drop every control
    )
    final = result.ema_modules.get("model", model)
    assert isinstance(final, ControlledTransformer)
    if processes.is_main():
        _save(final, tokenizer, generation, config, fused=lora is not None)
    return result


def scale_shares(config: ControlTrainingConfig, num_scales: int) -> Float[Tensor, " k"]:
    """Probability that scale k is the last that a batch trains.

    P(m) = exp(-lambda (m - m_0) / (K - 1 - m_0)) / Z for m in m_0..K-1 (methods/control.md 2.3; the
    paper, arXiv 2510.05610, gives no formula), the last one raised to 0.05 if it is below.
    """
    shares = torch.zeros(num_scales)
    if config.early_decay is None:
        shares[-1] = 1
        return shares
    first = math.ceil(num_scales / 2) - 1 if config.early_start is None else config.early_start
    require("early_start", first, first < num_scales, f"be below {num_scales}, the scales")
    place = torch.arange(num_scales - first) / max(num_scales - 1 - first, 1)
    shares[first:] = torch.softmax(-config.early_decay * place, dim=0)
    if shares[-1] < MIN_LAST_SHARE:
        shares[:-1] *= (1 - MIN_LAST_SHARE) / shares[:-1].sum()
        shares[-1] = MIN_LAST_SHARE
    return shares


def _with_maps(
    examples: Examples, extractor: Extractor, indices: np.ndarray, step: int = 0
) -> Batch:
    batch = examples.load(indices, step)
    images = batch["images"]
    if images is None:
        raise UserError("control maps are made of images: pass the dataset itself, not token maps")
    batch["maps"] = torch.from_numpy(extractor(images.permute(0, 2, 3, 1).numpy()))
    return batch


def _entropy(
    model: nn.Module, tokenizer: MultiscaleVQ, batch: Batch, count: int
) -> Float[Tensor, "b t"]:
    """Cross-entropy of the tokens of the first `count` scales."""
    tokens, schedule = batch_tokens(batch, tokenizer), tokenizer.schedule
    length = schedule.slices[count - 1].stop
    inputs = tokenizer.teacher_inputs(tokens)[:, : length - schedule.lengths[0]]
    logits = model(inputs, batch["ids"], batch["maps"], batch["keep"], count)
    return F.cross_entropy(logits.transpose(1, 2).float(), tokens[:, :length], reduction="none")


def _mean(entropy: Tensor, slices: Any, weight: str) -> Tensor:
    if weight == "token":
        return entropy.mean()
    return torch.stack([entropy[:, where].mean() for where in slices]).mean()


def _optimizer(
    model: ControlledTransformer, config: ControlTrainingConfig
) -> torch.optim.Optimizer:
    def keep(name: str) -> bool:
        return name.endswith(("position", "gate", "log_scale", "start", "scale_embedding.weight"))

    own = [(n, p) for n, p in model.control.named_parameters() if p.requires_grad]
    rest = [(n, p) for n, p in model.transformer.named_parameters() if p.requires_grad]
    groups = decay_groups(own, keep)
    groups += [g | {"lr_scale": config.base_lr_scale} for g in decay_groups(rest, keep)]
    return adamw([g for g in groups if g["params"]], config)


def _begin_with(module: ControlModule, initial: str, model: Path) -> None:
    """Take over the weights of another module."""
    own = {path.name: path for path in (model / "controls").glob("*")}
    other = read_control(own[initial] if initial in own else find_control(initial))
    asked = replace(module.config, encoder=replace(module.config.encoder, pretrained=False))
    if type(other) is not type(module):
        raise UserError(
            f"initial {initial} is {other.architecture} control, this run makes "
            f"{module.architecture} control: pass --architecture {other.architecture}"
        )
    theirs, wanted = asdict(other.config), asdict(asked)
    if differing := [name for name in wanted if wanted[name] != theirs[name]]:
        changes = ", ".join(f"{n} {wanted[n]} for its {theirs[n]}" for n in differing)
        raise UserError(f"initial {initial} has other sizes; this run has {changes}")
    if other.base != module.base:
        raise UserError(f"initial {initial} was made for a base of another size")
    if other.record.base_fingerprint != module.record.base_fingerprint:
        raise UserError(f"initial {initial} was trained on other weights than this base's")
    module.load_state_dict(other.state_dict())


def _copy_feed_forward(module: ControlModule, base: NextScaleTransformer) -> None:
    assert isinstance(module, AdapterControl)
    for feed_forward, site in zip(module.feed_forward, module.sites, strict=False):
        theirs = base.blocks[site].feed_forward
        assert isinstance(theirs, nn.Module)
        if module.config.mlp_ratio != base.config.mlp_ratio:
            raise UserError(
                f"init_ffn_from_base needs adapter.mlp_ratio {base.config.mlp_ratio}, the base's"
            )
        feed_forward.load_state_dict(theirs.state_dict())


@torch.no_grad()
def _measure(
    model: ControlledTransformer,
    tokenizer: MultiscaleVQ,
    validation: Examples,
    extractor: Extractor,
    config: ControlTrainingConfig,
) -> dict[str, float]:
    """Nats per token with and without control, over all scales and by scale."""
    count = min(config.num_validation_images, len(validation))
    sums: dict[bool, list[Tensor]] = {True: [], False: []}
    for start in range(0, count, config.train_batch_size):
        indices = np.arange(start, min(start + config.train_batch_size, count))
        batch = _with_maps(validation, extractor, indices)
        for kept, parts in sums.items():
            batch["keep"] = torch.full((len(indices),), kept)
            parts.append(_entropy(model, tokenizer, batch, tokenizer.schedule.num_scales))
    entropy = {kept: torch.cat(parts).mean(dim=0) for kept, parts in sums.items()}
    report = {"loss": entropy[True].mean().item(), "loss_without": entropy[False].mean().item()}
    for k, where in enumerate(tokenizer.schedule.slices):
        report[f"loss_{k}"] = entropy[True][where].mean().item()
    return report


@torch.no_grad()
def _save_samples(
    model: ControlledTransformer,
    tokenizer: MultiscaleVQ,
    validation: Examples,
    extractor: Extractor,
    generation: SamplingConfig,
    path: Path,
) -> None:
    """Rows: control maps, without control, under it, the real pictures."""
    batch = _with_maps(validation, extractor, np.arange(min(SHOWN, len(validation))))
    images, maps, ids = batch["images"], batch["maps"], batch["ids"]
    assert images is not None
    assert maps is not None
    assert ids is not None
    base, seeds = model.transformer, list(range(len(ids)))
    part = attach(model.control, maps, Control(image=None, type=model.control.record.type))
    rows = [maps]
    for hooks in (None, ControlHooks(base, [part], cached=True)):
        *_, last = sample(
            base, tokenizer, base.condition(ids), generation, seeds=seeds, hooks=hooks
        )
        rows.append(((tokenizer.decode_latents(last.f_hat) + 1) / 2).cpu())
    rows.append(images.float() / 255)
    save_grid(torch.cat(rows), path, columns=len(ids))


def _save(
    model: ControlledTransformer,
    tokenizer: MultiscaleVQ,
    generation: SamplingConfig,
    config: ControlTrainingConfig,
    *,
    fused: bool,
) -> None:
    folder = Path(config.output_dir) / "model"
    base, control = model.transformer, model.control
    if config.unfreeze == "none":
        with storage.replace_folder(folder) as target:
            control.save_pretrained(target)
        return
    if fused:
        _fuse_lora(base)
    control.record = replace(control.record, base_fingerprint=base_fingerprint(base))
    save_model(folder, tokenizer, base, generation, {control.record.type: control})


def _fuse_lora(model: nn.Module) -> None:
    """Add the LoRA into the weights; peft's own handle belongs to the module before averaging."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()  # pyright: ignore[reportAttributeAccessIssue]
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
