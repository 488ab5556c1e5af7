"""What every control module is: features of a map in, additions to the residual stream out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import storage
from nextscale.control.conditions import Extractor, open_extractor
from nextscale.control.encoder import ControlEncoder, EncoderConfig
from nextscale.errors import UserError, require
from nextscale.tokenizers import ScaleSchedule
from nextscale.var import NextScaleTransformer, TransformerConfig
from nextscale.var.cache import KeyValueCache

FORMAT_VERSION = 1
ENCODER = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """What all control modules have in common; `config.json` stores it with their own fields."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Network that reads the control map."""
    sites: tuple[int, ...] | None = None
    """Blocks of the base where it acts, from 0; None: the module's own rule."""

    def __post_init__(self) -> None:
        if isinstance(self.encoder, dict):
            object.__setattr__(self, "encoder", EncoderConfig(**self.encoder))
        if isinstance(self.sites, list):
            object.__setattr__(self, "sites", tuple(self.sites))


@dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """What a module was trained for and on."""

    type: str
    """canny, depth, ...: what `--control_type` says."""
    resolution: tuple[int, int]
    """(height, width) of the pictures."""
    base_fingerprint: str
    """Hash of the base's weights."""
    extractor: dict[str, Any] = field(default_factory=dict)
    """How the maps were made: name, version, settings."""

    def open_extractor(self) -> Extractor:
        """What made the maps; the type's own extractor if that is not known."""
        return open_extractor(
            self.extractor.get("spec") or self.type, **self.extractor.get("settings", {})
        )


class ControlState(ABC):
    """A module at work on one batch: what it adds, position by position."""

    @abstractmethod
    def contribution(
        self,
        block: int,
        where: slice,
        x: Float[Tensor, "r l d"],
        pooled: Float[Tensor, "r 1 d"],
        pictures: Int[Tensor, " r"],
    ) -> Float[Tensor, "r l d"] | None:
        """What is added to the residual stream at a block; None: nothing.

        Args:
            block: Block of the base.
            where: Positions: whole scales.
            x: The residual stream, of the rows under control.
            pooled: The base's condition.
            pictures: Which control map each row has.
        """

    def select(self, rows: Tensor | slice) -> None:
        """From here on these rows alone; states that keep something of earlier scales follow."""
        return


class ControlModule(nn.Module, ABC):
    """A spatial condition for a next-scale transformer that itself stays as it is.

    An untrained module adds exactly zero: its base's logits stay equal. A row without control runs
    through none of it.

    Args:
        config: Sizes.
        base: Sizes of the transformer.
        record: What it is for.
    """

    architecture: str
    config_class: type[ControlConfig]
    point: Literal["before", "after"] = "before"
    sites: tuple[int, ...]

    def __init__(
        self, config: ControlConfig, base: TransformerConfig, record: ControlRecord
    ) -> None:
        super().__init__()
        self.config, self.base, self.record = config, base, record
        self.schedule = ScaleSchedule(base.scales)
        self.encoder = ControlEncoder(config.encoder, self.schedule, record.resolution)
        sites = config.sites or ()
        for site in sites:
            require("sites", sites, 0 <= site < base.depth, f"lie in 0..{base.depth - 1}")
        require("sites", sites, sorted(set(sites)) == list(sites), "rise, each named once")

    def encode(self, maps: Float[Tensor, "m 3 H W"]) -> Float[Tensor, "m t e"]:
        """Features of control maps in [0, 1] at the cells of all scales: once per picture."""
        return self.encoder(maps)

    @abstractmethod
    def state(
        self, features: Float[Tensor, "m t e"], base: NextScaleTransformer, *, cached: bool
    ) -> ControlState:
        """At work on a batch.

        Args:
            features: From `encode`.
            base: The transformer.
            cached: Scale by scale with a cache, not teacher-forced.
        """

    def block_mask(self, where: slice, device: torch.device) -> Tensor | None:
        """True where a position may see another: scales not finer than its own; None: all."""
        index = self.schedule.scale_index()[where].to(device)
        if index[0] == index[-1]:
            return None
        return index[None] <= index[:, None]

    def new_cache(self, depth: int, rows: int) -> KeyValueCache:
        """Keys and values of the module's own attention."""
        heads, weight = self.base.resolved_heads, next(self.parameters())
        return KeyValueCache(
            depth=depth,
            batch=rows,
            heads=heads,
            num_tokens=self.schedule.num_tokens,
            head_size=self.base.resolved_width // heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v if dtype is None else v.to(dtype) for k, v in self.state_dict().items()}
        storage.write_tensors(folder / "model.safetensors", state)
        values = {
            "format_version": FORMAT_VERSION,
            "class": "ControlModule",
            "architecture": self.architecture,
            "module": asdict(self.config),
            "base": asdict(self.base),
            "record": asdict(self.record),
        }
        storage.write_json(folder / "config.json", values)
        if self.config.encoder.kind == "dinov2":  # so that reading it needs no hub
            network: Any = self.encoder.network
            network.config.to_json_file(folder / ENCODER)


def evenly(count: int, depth: int) -> tuple[int, ...]:
    """`count` blocks spread over the depth, from block 0.

    The released ControlAR takes every block i with i mod floor(depth / 3) = 0, which is four blocks
    for three projections unless 3 divides the depth.
    """
    require("num_sites", count, 0 < count <= depth, f"lie in 1..{depth}")
    return tuple(i * depth // count for i in range(count))


def check_base(module: ControlModule, model: NextScaleTransformer, fingerprint: str) -> None:
    """Refuse a module of another base.

    Args:
        module: The module.
        model: The transformer that it is put on.
        fingerprint: `base_fingerprint` of that transformer.

    Raises:
        UserError: If sizes or weights differ.
    """
    for name in ("scales", "depth", "resolved_width"):
        theirs, ours = getattr(module.base, name), getattr(model.config, name)
        if theirs != ours:
            raise UserError(
                f'the control module "{module.record.type}" was trained on a transformer of '
                f"{name.removeprefix('resolved_')} {theirs}, this one has {ours}"
            )
    if module.record.base_fingerprint != fingerprint:
        raise UserError(
            f'the control module "{module.record.type}" was trained on other weights than this '
            "model's; load the model that it was trained on"
        )
