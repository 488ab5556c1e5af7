"""What a caller gives as control -> maps at the model's resolution, checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.control.attach import Attached, Control, attach
from nextscale.control.conditions import suspect_map
from nextscale.control.module import ControlModule
from nextscale.data.images import to_rgb
from nextscale.errors import UserError

log = logging.getLogger(__name__)

LINES = ("canny", "scribble")  # of one pixel: a smaller map keeps each cell's brightest
EXACT = (*LINES, "segmentation")  # means of their values would be no map


def as_controls(image: Any, kind: Any, scale: Any) -> list[Control]:
    """Controls of `control_image`, `control_type` and `control_scale` of a call.

    One of each, or lists of one per control; a list with one entry is a list.

    Raises:
        UserError: If something is missing or lists differ in length.
    """
    if image is None or kind is None:
        missing = "control_image" if image is None else "control_type"
        raise UserError(f"{missing} is missing: control needs control_image and control_type")
    if isinstance(kind, str):
        return [Control(image=image, type=kind, strength=1.0 if scale is None else scale)]
    kinds = list(kind) if isinstance(kind, list | tuple) else []
    if not kinds or not all(isinstance(one, str) for one in kinds):
        raise UserError(f"control_type is {kind!r}; it is a name, or a list of names")
    if not isinstance(image, Sequence) or len(image) != len(kinds):
        got = len(image) if isinstance(image, Sequence) else 1
        raise UserError(
            f"{len(kinds)} control types and {got} control images; pass one image per type"
        )
    scales = [1.0] * len(kinds) if scale is None else scale
    if not isinstance(scales, Sequence):
        scales = [scales] * len(kinds)
    if len(scales) != len(kinds):
        raise UserError(
            f"{len(kinds)} control types and {len(scales)} control scales; pass one or one per type"
        )
    triples = zip(image, kinds, scales, strict=True)
    return [Control(image=i, type=k, strength=s) for i, k, s in triples]


@torch.no_grad()
def attach_all(
    controls: Sequence[Control],
    modules: Mapping[str, ControlModule],
    prompts: int,
    images_per_prompt: int,
) -> list[Attached]:
    """Controls ready for the images of a call, prompt-major.

    Args:
        controls: What the caller gave.
        modules: Those that they name.
        prompts: Prompts or labels of the call.
        images_per_prompt: Images of each.

    Raises:
        UserError: If maps fit neither the prompts nor the images, or are no maps at all.
    """
    count, attached = prompts * images_per_prompt, []
    for control in controls:
        module = modules[control.type]
        maps = as_maps(control.image, module.record.type, module.record.resolution)
        if len(maps) not in (1, prompts, count):
            raise UserError(
                f"{len(maps)} maps of the control {control.type} for {prompts} prompts and "
                f"{count} images; pass one, or one for each prompt or image"
            )
        rows = torch.arange(count) // (count // len(maps))
        if control.mask is not None:
            control = replace(control, mask=as_mask(control.mask, module.record.resolution))
        attached.append(attach(module, maps, control, rows))
    return attached


def as_maps(given: Any, kind: str, resolution: tuple[int, int]) -> Float[Tensor, "m 3 H W"]:
    """Maps in [0, 1] of PIL images, arrays or tensors, resized to the model's resolution.

    Args:
        given: A PIL image, uint8 [H, W, 3] or [H, W], float [3, H, W], [1, H, W] or [n, 3, H, W] in
            [0, 1] (tensor or array), or a list of such.
        kind: Control type, for its checks and how it is resized.
        resolution: (height, width).

    Raises:
        UserError: For another shape, range or aspect.
    """
    parts = [_tensor(one, kind) for one in (given if isinstance(given, list | tuple) else [given])]
    if not parts:
        raise UserError(f"the list of maps of the control {kind} is empty")
    count = sum(len(part) for part in parts)
    reasons = [r for part in parts for map_ in part if (r := suspect_map(kind, map_.numpy()))]
    if reasons:
        log.warning(
            "%s: %s probably no map of this type: %s",
            kind,
            "the control image is" if count == 1 else f"{len(reasons)} of {count} images are",
            reasons[0],
        )
    for height, width in {(part.shape[2], part.shape[3]) for part in parts} - {resolution}:
        _check_aspect("control image", (height, width), resolution)
        log.warning(
            "the control image has %d x %d pixels and is resized to %d x %d",
            width, height, resolution[1], resolution[0],
        )  # fmt: skip
    return torch.cat([_resized(part, kind, resolution) for part in parts])


def _resized(maps: Tensor, kind: str, resolution: tuple[int, int]) -> Float[Tensor, "m 3 H W"]:
    """Lines stay lines, classes stay classes; other maps are averaged or interpolated."""
    if maps.shape[2:] == resolution:
        return maps
    shrink = maps.shape[2] >= resolution[0]
    if kind in LINES and shrink:
        return F.adaptive_max_pool2d(maps, resolution)
    if kind in EXACT:
        return F.interpolate(maps, size=resolution, mode="nearest-exact")
    return F.interpolate(maps, size=resolution, mode="area" if shrink else "bilinear")


def as_mask(given: Any, resolution: tuple[int, int]) -> Tensor:
    """A strength mask [H, W] in [0, 1] of a PIL image, an array or a tensor.

    Raises:
        UserError: If it is no single picture, or has another aspect than (height, width).
    """
    if isinstance(given, Tensor) and given.ndim == 2:
        given = given[None]
    masks = _tensor(given, "mask")
    if len(masks) != 1:
        raise UserError(f"a control has one mask for all pictures, got {len(masks)}")
    _check_aspect("control mask", (masks.shape[2], masks.shape[3]), resolution)
    if float((masks.amax(dim=1) - masks.amin(dim=1)).mean()) > 0.02:
        log.warning("the control mask has colours and is read as grey: white is 1, black 0")
    return masks[0].mean(dim=0)


def _check_aspect(what: str, size: tuple[int, int], resolution: tuple[int, int]) -> None:
    if abs(size[0] * resolution[1] - size[1] * resolution[0]) > max(size) * 0.02 * max(resolution):
        raise UserError(
            f"the {what} has {size[1]} x {size[0]} pixels, another aspect than the model's "
            f"{resolution[1]} x {resolution[0]}; crop it first"
        )


def _tensor(given: Any, kind: str) -> Float[Tensor, "m 3 H W"]:
    from PIL import Image

    if isinstance(given, Image.Image):
        try:
            given = np.asarray(to_rgb(given))
        except ValueError as error:
            raise UserError(f"the {kind} control is no map: {error}") from error
    if isinstance(given, np.ndarray) and np.issubdtype(given.dtype, np.floating):
        given = torch.from_numpy(np.ascontiguousarray(given, np.float32))
        given = given[None] if given.ndim == 2 else given
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim not in (2, 3):
            raise UserError(
                f"the {kind} control is an array of {given.dtype} with the shape "
                f"{list(given.shape)}; arrays are uint8 [H, W, 3] or [H, W]"
            )
        pixels = torch.from_numpy(given.astype(np.float32) / 255)
        given = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if not isinstance(given, Tensor):
        raise UserError(
            f"the {kind} control is a {type(given).__name__}; pass an image, an array or a tensor"
        )
    maps = given.detach().float().cpu()
    maps = maps[None] if maps.ndim == 3 else maps
    if maps.ndim != 4 or maps.shape[1] not in (1, 3) or not maps.numel():
        raise UserError(
            f"the {kind} control has the shape {list(given.shape)}; maps are [3, H, W] or "
            "[n, 3, H, W], with one channel or three"
        )
    if not bool(((maps >= 0) & (maps <= 1)).all()):
        low, high = maps.min().item(), maps.max().item()
        raise UserError(f"the {kind} control has values in [{low:g}, {high:g}]; maps are in [0, 1]")
    return maps.expand(-1, 3, -1, -1)
