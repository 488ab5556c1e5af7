"""`Control`: a map, a module and where it acts; `ControlHooks`: controls inside the transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.control.module import ControlModule, ControlState
from nextscale.errors import UserError, require
from nextscale.tokenizers import ScaleSchedule
from nextscale.var import NextScaleTransformer
from nextscale.var.block import Prepared

MAX_STRENGTH = 10.0
MAPS_AT_ONCE = 64
GUESS_FIRST = 0.1  # strength at the first site in guess mode, rising to 1 (ControlNet)


@dataclass(frozen=True, kw_only=True)
class Control:
    """One spatial condition of a call.

    Attributes:
        image: The control map, not a photo: a PIL image, uint8 [H, W, 3], or float [3, H, W] or
            [n, 3, H, W] in [0, 1]; or a list of one per prompt (or per image).
        type: Name of a loaded control module.
        strength: Factor on what the module adds: one number, one per scale, or {block: factor}.
        start_scale: First scale under control, from 0.
        end_scale: First scale that is not any more; None: to the last. What was drawn under
            control still steers the scales after it.
        mask: float [H, W] in [0, 1], strength by place; None: 1 everywhere.
        guess_mode: Strength rises over the module's sites from 0.1 to 1, evenly in its logarithm.
    """

    image: Any
    type: str
    strength: float | Sequence[float] | Mapping[int, float] = 1.0
    start_scale: int = 0
    end_scale: int | None = None
    mask: Any = None
    guess_mode: bool = False


@dataclass(frozen=True)
class Attached:
    """A control ready for a batch: the module's features and the strength of every addition.

    Attributes:
        module: The module.
        features: [m, t, e], from `ControlModule.encode`.
        pictures: Which of the m maps each image of the batch has, [b].
        weights: Per site a factor for all positions: None (1), or [1, t, 1].
        end: Position from which on the module does not run.
        guess_mode: It may stand without a prompt.
    """

    module: ControlModule
    features: Float[Tensor, "m t e"]
    pictures: Int[Tensor, " b"]
    weights: Mapping[int, Float[Tensor, "1 t 1"] | None]
    end: int
    guess_mode: bool = False

    def __getitem__(self, rows: slice | Tensor) -> Attached:
        """Some images of the batch, with their maps alone."""
        used, pictures = self.pictures[rows].unique(return_inverse=True)
        return replace(self, features=self.features[used], pictures=pictures)


def attach(
    module: ControlModule,
    maps: Float[Tensor, "m 3 H W"],
    control: Control,
    pictures: Int[Tensor, " b"] | None = None,
) -> Attached:
    """Encode the maps of a control and work out where it acts how strongly.

    Args:
        module: Its module.
        maps: Control maps in [0, 1] at the model's resolution.
        control: Strength and range; its `image` is not read.
        pictures: Which map each image has; None: map i belongs to image i.

    Raises:
        UserError: For a strength, a range or a mask that does not fit the model.
    """
    weight = next(module.parameters())
    parts = maps.to(weight.device).split(MAPS_AT_ONCE)
    features = torch.cat([module.encode(part) for part in parts])
    if pictures is None:
        pictures = torch.arange(len(maps))
    schedule = module.schedule
    end = scale_range(control.start_scale, control.end_scale, schedule.num_scales)[1]
    stop = schedule.slices[end - 1].stop
    weights = site_weights(module, control, weight.device)
    return Attached(module, features, pictures.to(weight.device), weights, stop, control.guess_mode)


def scale_range(start: int, end: int | None, num_scales: int) -> tuple[int, int]:
    """A checked half-open range of scales."""
    last = num_scales if end is None else end
    for value in (start, last):
        if not isinstance(value, int):
            raise UserError(f"start_scale and end_scale are whole numbers, got {value!r}")
    if not 0 <= start < last <= num_scales:
        raise UserError(
            f"control acts on the scales [start_scale, end_scale), got [{start}, {last}); they "
            f"must lie in 0..{num_scales}, the start before the end"
        )
    return start, last


def site_weights(
    module: ControlModule, control: Control, device: torch.device
) -> dict[int, Tensor | None]:
    """strength(scale, block) * mask(position) per site; None where it is 1 everywhere."""
    schedule, count = module.schedule, module.schedule.num_scales
    first, end = scale_range(control.start_scale, control.end_scale, count)
    layers = dict.fromkeys(module.sites, 1.0)
    given = control.strength
    _check_numbers(given)
    if isinstance(given, Mapping):
        if unknown := set(given) - set(layers):
            raise UserError(
                f"control_scale names the blocks {sorted(unknown, key=str)}; this module acts at "
                f"{sorted(layers)}"
            )
        layers |= {block: float(value) for block, value in given.items()}
        scales = [1.0] * count
    elif isinstance(given, Sequence):
        if len(given) != count:
            raise UserError(
                f"control_scale is one number or one for each of the {count} scales, got "
                f"{len(given)}"
            )
        scales = [float(value) for value in given]
    else:
        scales = [float(given)] * count
    for value in (*layers.values(), *scales):
        require("control_scale", value, 0 <= value <= MAX_STRENGTH, f"lie in [0, {MAX_STRENGTH}]")
    if control.guess_mode:
        steps = max(len(layers) - 1, 1)
        for i, block in enumerate(sorted(layers)):
            layers[block] *= GUESS_FIRST ** (1 - i / steps) if len(layers) > 1 else 1.0
    scales = [s if first <= k < end else 0.0 for k, s in enumerate(scales)]
    places = torch.tensor(scales)[schedule.scale_index()]
    if control.mask is not None:
        places = places * _mask_per_position(control.mask, schedule)
    return {
        block: None
        if bool((places * factor == 1).all())
        else (places * factor)[None, :, None].to(device)
        for block, factor in layers.items()
    }


def _check_numbers(given: Any) -> None:
    """Refuse strengths that are neither a number nor several."""
    values = [given]
    if isinstance(given, Mapping):
        values = list(given.values())
    elif isinstance(given, Sequence):
        values = list(given)
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UserError(
                f"control_scale is {given!r}; it is a number, one per scale, or {{block: number}}"
            )


def _mask_per_position(mask: Any, schedule: ScaleSchedule) -> Float[Tensor, " t"]:
    """A strength mask at the cells of every scale, by area."""
    grid = torch.as_tensor(mask, dtype=torch.float32)
    if grid.ndim != 2:
        raise UserError(f"a control mask is [H, W], got the shape {list(grid.shape)}")
    if not bool(((grid >= 0) & (grid <= 1)).all()):
        low, high = grid.min().item(), grid.max().item()
        raise UserError(f"a control mask has values in [0, 1], got [{low:g}, {high:g}]")
    parts = [F.adaptive_avg_pool2d(grid[None, None], side).flatten() for side in schedule.sides]
    return torch.cat(parts)


class ControlHooks:
    """Controls at the blocks of one sampling run or forward pass (`var.BlockHooks`).

    Contributions of several controls add up. Rows come in groups of one row per image: those under
    control, then, for guidance, those of the same images without; there the base runs as if there
    were no control.

    Args:
        model: The transformer.
        controls: What acts, one or more, for the same b images.
        cached: The run goes scale by scale with a cache.
        every_row: All groups are under control (`SamplingConfig.control_in_negative`).
        keep: Images under control at all (training drops some); None: all.
    """

    def __init__(
        self,
        model: NextScaleTransformer,
        controls: Sequence[Attached],
        *,
        cached: bool,
        every_row: bool = False,
        keep: Bool[Tensor, " b"] | None = None,
    ) -> None:
        self.parts = [(c, c.module.state(c.features, model, cached=cached)) for c in controls]
        self.pictures = [c.pictures for c in controls]
        self.every_row = every_row
        self.keep = None if keep is None else keep.to(model.device)
        self.groups: Tensor | None = None  # of each row of the run; None before the first block
        self.count = 0  # rows under control, which come first

    def before_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        """The stream with what the controls add to a block's input."""
        if self.groups is None:
            self._begin(len(x))
        return self._add("before", block, where, x, prepared)

    def after_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        """The stream with what the controls add to a block's output."""
        return self._add("after", block, where, x, prepared)

    def select(self, rows: Tensor | slice) -> None:
        """Drop or repeat rows, as the sampler does between scales."""
        if self.groups is None:  # before the first scale, where rows are only ever repeated
            assert isinstance(rows, Tensor)
            self._begin(int(rows.max()) + 1)
        assert self.groups is not None
        if isinstance(rows, slice):
            rows = torch.arange(len(self.groups))[rows]
        index = rows.to(self.pictures[0].device)
        self._hold(self.groups[rows.cpu()], [p[index] for p in self.pictures])
        for _, state in self.parts:
            state.select(rows[: self.count])

    def _begin(self, rows: int) -> None:
        images = len(self.pictures[0])
        if rows % images:
            raise UserError(f"controls of {images} images in a run of {rows} rows")
        every = [p.repeat(rows // images) for p in self.pictures]
        self._hold(torch.arange(rows) // images, every)

    def _hold(self, groups: Tensor, pictures: list[Tensor]) -> None:
        self.groups, self.pictures = groups, pictures
        self.count = len(groups) if self.every_row else int((groups == 0).sum())

    def _add(self, point: str, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        count = self.count
        rows, total = x[:count], None
        for (part, state), pictures in zip(self.parts, self.pictures, strict=True):
            if part.module.point != point or where.start >= part.end:
                continue
            pooled = prepared.pooled[:count]
            added = state.contribution(block, where, rows, pooled, pictures[:count])
            if added is None:
                continue
            weight = part.weights[block]
            if weight is not None:
                added = added * weight[:, where].to(added.dtype)
            total = added if total is None else total + added
        if total is None:
            return x
        if self.keep is not None:
            total = total * self.keep[:, None, None]
        rows = rows + total.to(x.dtype)
        return rows if count == len(x) else torch.cat([rows, x[count:]])


__all__ = ["Attached", "Control", "ControlHooks", "ControlState", "attach", "site_weights"]
