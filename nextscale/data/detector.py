"""Reading a picture of the scenes world back into its shapes, without a network.

Near a shape every pixel is a blend of the background B and the shape's colour C in some shade s:
p = (1 - a) B + a s C. B is smooth and nearly grey, so it is fitted once; then (a, a s) follow from
p in closed form, and the coverage a is the same for pure and for dark bars. The templates of
`scenes.signed_distance` are fitted to the coverage by Gauss-Newton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from scipy import ndimage

from nextscale.data.captions import COLORS, SHAPES
from nextscale.data.scenes import BAR_WIDTH, RADII, RGB, Shape, signed_distance
from nextscale.errors import UserError

MIN_SIDE = 24
WORKING_SIDE = 64  # larger pictures are averaged down to about this side
SIZE_BORDER = (RADII["small"][1] + RADII["large"][0]) / 2

BACKGROUND_CHROMA = 0.16  # twice the strongest tint of the world's backgrounds
BACKGROUND_SHARE = 0.25  # shapes cover less than half of a picture
BACKGROUND_ROUGHNESS = 0.09  # rms deviation from a plane; noise of 8/255 gives 0.04
SMOOTHED_SIDE = 48  # below it smoothing would close the gap between shapes of one colour
MIN_SHADE = 0.22  # of the pure colour; dark bars have 0.45
MIN_HUE_COSINE = 0.86
CRUMB = 0.006  # share of the picture below which a coloured patch is no shape
MAX_UNEXPLAINED = 0.012  # share of the picture that may be coloured and no part of a shape
MIN_QUALITY = 0.55
OUTLINE_BAND = 0.06  # how far from an outline its blur is measured, in units of the side
MAX_BLUR = 0.035  # sigma of the outlines in units of the side
MIN_CONTRAST = 0.15  # of a solid fill 0, of bars 0.35

_PALETTE = np.array([RGB[color] for color in COLORS], np.float32)
_HUES = _PALETTE - _PALETTE.mean(axis=1, keepdims=True)
_CHROMAS = np.linalg.norm(_HUES, axis=1)
_GREY, _OTHER = 0, len(COLORS) + 1  # labels; 1 + i is COLORS[i]
_UNITS = {kind: Shape(kind, "red", "large", "solid", 0.0, 0.0, 1.0) for kind in SHAPES}
_STEPS = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], np.float32)


@dataclass(frozen=True)
class DetectedShape(Shape):
    """A shape read from a picture; lengths in units of the side.

    Attributes:
        visible: Share of the shape that no other shape hides, in [0, 1].
        quality: Soft intersection over union of the picture's coverage and the template's.
    """

    visible: float = 1.0
    quality: float = 1.0


@dataclass(frozen=True)
class Detection:
    """The shapes of a picture, largest patch first, and why it is none of the world, if so."""

    shapes: tuple[DetectedShape, ...]
    rejected: str | None = None


@dataclass(frozen=True)
class _Patch:
    """The surroundings of one coloured patch; positions are pixel centres in working pixels."""

    rows: slice
    columns: slice
    y: np.ndarray  # [h, 1]
    x: np.ndarray  # [1, w]
    own: np.ndarray  # bool [h, w], the patch itself
    coverage: np.ndarray  # [h, w], a in [0, 1]
    shaded: np.ndarray  # [h, w], a s
    weight: np.ndarray  # [h, w], 0 where another shape may lie


def detect(image: np.ndarray) -> Detection:
    """Find the shapes of a picture.

    Args:
        image: uint8 [side, side, 3]; a picture rendered, reconstructed or generated.

    Raises:
        UserError: If the array is no square uint8 RGB picture of at least 24 pixels.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise UserError(f"image must have the shape [side, side, 3], got {list(image.shape)}")
    if image.dtype != np.uint8 or image.shape[0] < MIN_SIDE:
        raise UserError(
            f"image must be uint8 with a side of at least {MIN_SIDE} pixels, "
            f"got {image.dtype} and {image.shape[0]}"
        )
    pixels = _shrink(image)
    return _detect(pixels.tobytes(), len(pixels))


@lru_cache(maxsize=512)  # two rewards of a rollout ask for the same pictures
def _detect(data: bytes, side: int) -> Detection:
    pixels = np.frombuffer(data, dtype=np.float32).reshape(side, side, 3)
    plain = pixels.max(axis=2) - pixels.min(axis=2) < BACKGROUND_CHROMA
    if plain.mean() < BACKGROUND_SHARE:
        return Detection((), "noise: too few pixels are grey enough for a background")
    background, roughness = _fit_background(pixels, plain)
    if roughness > BACKGROUND_ROUGHNESS:
        return Detection((), "noise: the background is not smooth")
    return _explain(pixels, background)


def _explain(pixels: np.ndarray, background: np.ndarray) -> Detection:
    """Fit a shape to each coloured patch, largest first, and look at what is left."""
    labels = _label_colors(pixels, background)
    owners, colors = _components(labels)
    side = len(pixels)
    shapes: list[DetectedShape] = []
    blurs: list[float] = []
    claimed = np.zeros((side, side), dtype=bool)
    for number, color in enumerate(colors, start=1):
        own = (owners == number) & ~claimed
        if own.mean() < CRUMB:  # cut off by an occluder from a shape that was found before
            continue
        patch = _cut(pixels, background, labels, own, color)
        shape, blur, inside = _fit(patch, COLORS[color - 1], side)
        claimed[patch.rows, patch.columns] |= inside & (labels[patch.rows, patch.columns] == color)
        shapes.append(shape)
        blurs.append(blur)
    leftover = float(_erode((labels != _GREY) & ~claimed).mean())
    reason = None
    if leftover > MAX_UNEXPLAINED:
        reason = f"unexplained coloured pixels: {leftover:.1%} of the picture"
    elif not shapes:
        reason = "blank: there is no coloured shape"
    elif max(blurs) > MAX_BLUR:
        reason = f"blurred: outlines are {max(blurs):.3f} of the side wide"
    elif min(s.quality for s in shapes) < MIN_QUALITY:
        reason = "unexplained coloured pixels: a patch that looks like no shape"
    return Detection(tuple(shapes), reason)


def _shrink(image: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]; whole blocks of pixels are averaged, the last ones padded."""
    factor = max(round(len(image) / WORKING_SIDE), 1)
    pixels = image.astype(np.float32) / 255
    if factor == 1:
        return pixels
    extra = -len(image) % factor
    pixels = np.pad(pixels, ((0, extra), (0, extra), (0, 0)), mode="edge")
    side = len(pixels) // factor
    return pixels.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))


def _fit_background(pixels: np.ndarray, plain: np.ndarray) -> tuple[np.ndarray, float]:
    """Least-squares plane per channel through the plain pixels, and their rms distance from it."""
    side = len(pixels)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    basis = np.stack(np.broadcast_arrays(np.float32(1), axis[None, :], axis[:, None]), axis=-1)
    chosen, values = basis[plain], pixels[plain]
    moments = chosen.T @ chosen + 1e-3 * np.eye(3, dtype=np.float32)
    weights = np.linalg.solve(moments, chosen.T @ values)
    # Outlines are plain too where colour and background mix: the second fit leaves them out.
    error = np.abs(values - chosen @ weights).max(axis=1)
    near = error < max(0.08, 1.5 * float(np.median(error)))
    chosen, values = chosen[near], values[near]
    moments = chosen.T @ chosen + 1e-3 * np.eye(3, dtype=np.float32)
    weights = np.linalg.solve(moments, chosen.T @ values)
    roughness = float(np.sqrt(np.mean(error[near] ** 2)))
    return np.clip(basis @ weights, 0, 1), roughness


def _label_colors(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Per pixel _GREY, 1 + index into COLORS, or _OTHER for a hue outside the palette."""
    excess = pixels - background
    if len(pixels) >= SMOOTHED_SIDE:
        excess = _smooth(excess)
    excess -= excess.mean(axis=2, keepdims=True)
    along = excess @ (_HUES / _CHROMAS[:, None]).T
    best = along.argmax(axis=2)
    strength = np.take_along_axis(along, best[..., None], axis=2)[..., 0]
    chroma = np.sqrt((excess**2).sum(axis=2))
    labels = np.where(strength > MIN_HUE_COSINE * chroma, best + 1, _OTHER)
    return np.where(chroma > MIN_SHADE * _CHROMAS[best], labels, _GREY)


def _components(labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Connected patches of one colour that are no crumbs, largest first: their map and colours."""
    owners = np.zeros(labels.shape, dtype=np.int32)
    patches = []
    for color in range(1, _OTHER):
        mask = labels == color
        if mask.mean() < CRUMB:
            continue
        parts, count = cast("tuple[np.ndarray, int]", ndimage.label(mask))
        core = np.bincount(parts[_erode(mask)], minlength=count + 1)
        area = np.bincount(parts.ravel(), minlength=count + 1)
        for part in range(1, count + 1):
            # Where two colours mix along an outline, a line of a third may appear: it has no core.
            if area[part] >= CRUMB * mask.size and core[part] >= 0.15 * area[part]:
                patches.append((area[part], color, parts == part))
    patches.sort(key=lambda patch: -patch[0])
    for number, (_, _, mask) in enumerate(patches, start=1):
        owners[mask] = number
    return owners, [color for _, color, _ in patches]


def _cut(
    pixels: np.ndarray, background: np.ndarray, labels: np.ndarray, own: np.ndarray, color: int
) -> _Patch:
    side = len(pixels)
    rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
    margin = 2 + max(int(0.3 * max(np.ptp(rows), np.ptp(columns))), 2)
    top, bottom = max(rows[0] - margin, 0), min(rows[-1] + margin + 1, side)
    left, right = max(columns[0] - margin, 0), min(columns[-1] + margin + 1, side)
    area = np.s_[top:bottom, left:right]
    own, near = own[area], labels[area]
    base, tone = background[area], _PALETTE[color - 1]
    # p - B = (a s) C - a B, a least-squares problem with two unknowns per pixel.
    difference = pixels[area] - base
    cc, bb, cb = tone @ tone, (base * base).sum(axis=2), base @ tone
    dc, db = difference @ tone, (difference * base).sum(axis=2)
    determinant = np.maximum(cc * bb - cb * cb, 1e-4)
    foreign = (near != _GREY) & ~_dilate(own)
    return _Patch(
        rows=area[0],
        columns=area[1],
        y=np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5,
        x=np.arange(left, right, dtype=np.float32)[None, :] + 0.5,
        own=own,
        coverage=np.clip((cb * dc - cc * db) / determinant, 0, 1),
        shaded=(bb * dc - cb * db) / determinant,
        weight=(~_dilate(foreign)).astype(np.float32),
    )


def _fit(patch: _Patch, color: str, side: int) -> tuple[DetectedShape, float, np.ndarray]:
    """The best of the four templates, the blur of its outline, and the pixels that it explains."""
    fits = []
    for kind in SHAPES:
        place = _refine(patch, kind, _first_guess(patch, kind), width=3.0, steps=3)
        fits.append((_mismatch(patch, kind, place, 2.0), kind, place))
    fits.sort(key=lambda fit: fit[0])
    finals = []
    for _, kind, place in fits[:2]:
        place = _refine(patch, kind, place, width=2.0, steps=3)
        finals.append((_mismatch(patch, kind, place, 1.5), kind, place))
    _, kind, place = min(finals, key=lambda fit: fit[0])
    # A ramp 2.5 sigma wide is as steep as a Gaussian edge; a template of another blur is biased.
    blur = _blur(patch, _distance(kind, patch, place[None])[0], side)
    place = _refine(patch, kind, place, width=max(1.0, 2.5 * blur), steps=2)
    x, y, radius = (float(v) for v in place)
    distance = _distance(kind, patch, place[None])[0]
    blur = _blur(patch, distance, side)
    cover = np.clip(0.5 - distance / max(1.0, 2.5 * blur), 0, 1)
    low = (np.minimum(cover, patch.coverage) * patch.weight).sum()
    high = (np.maximum(cover, patch.coverage) * patch.weight).sum()
    inside = distance < 1.5 + 1.5 * blur
    shape = DetectedShape(
        shape=kind,
        color=color,
        size="small" if radius / side < SIZE_BORDER else "large",
        fill="striped" if _contrast(patch, distance, y, side) > MIN_CONTRAST else "solid",
        x=x / side,
        y=y / side,
        radius=radius / side,
        visible=float((cover * patch.weight).sum() / max(cover.sum(), 1e-6)),
        quality=float(low / max(high, 1e-6)),
    )
    return shape, blur / side, inside


def _first_guess(patch: _Patch, kind: str) -> np.ndarray:
    """(x, y, r) from the patch's box; nearer shapes are lower, so the upper edge is safe."""
    rows, columns = np.flatnonzero(patch.own.any(axis=1)), np.flatnonzero(patch.own.any(axis=0))
    top, height = patch.y[rows[0], 0] - 0.5, rows[-1] - rows[0] + 1
    left, width = patch.x[0, columns[0]] - 0.5, columns[-1] - columns[0] + 1
    if kind == "triangle":
        radius = max(width / 2, height / 1.8)
        return np.array([left + width / 2, top + radius, radius], np.float32)
    half = max(width, height) / 2
    radius = half / 0.88 if kind == "square" else half
    return np.array([left + width / 2, top + half, radius], np.float32)


def _distance(kind: str, patch: _Patch, places: np.ndarray) -> np.ndarray:
    """[n, h, w] signed distances in pixels for n places (x, y, r); the template scales with r."""
    x, y, radius = (places[:, i, None, None] for i in range(3))
    return radius * signed_distance(_UNITS[kind], (patch.x - x) / radius, (patch.y - y) / radius)


def _refine(patch: _Patch, kind: str, place: np.ndarray, *, width: float, steps: int) -> np.ndarray:
    """Gauss-Newton on (x, y, r) with outlines `width` pixels wide, by finite differences."""
    for _ in range(steps):
        covers = np.clip(0.5 - _distance(kind, patch, place + _STEPS) / width, 0, 1)
        covers = (covers * patch.weight).reshape(4, -1)
        slopes = (covers[1:] - covers[0]) * 2
        error = (patch.coverage * patch.weight).ravel() - covers[0]
        normal = slopes @ slopes.T
        normal[np.diag_indices(3)] += 0.02 * np.trace(normal) / 3 + 1e-3
        place = place + np.clip(np.linalg.solve(normal, slopes @ error), -2.5, 2.5)
        place[2] = max(place[2], 2.0)
    return place


def _mismatch(patch: _Patch, kind: str, place: np.ndarray, width: float) -> float:
    cover = np.clip(0.5 - _distance(kind, patch, place[None])[0] / width, 0, 1)
    return float((patch.weight * (cover - patch.coverage) ** 2).sum())


def _blur(patch: _Patch, distance: np.ndarray, side: int) -> float:
    """Sigma of the outline in pixels: across a Gaussian edge a (1 - a) sums to sigma / sqrt(pi)."""
    band = patch.weight * (np.abs(distance) < OUTLINE_BAND * side)
    outline = (band * (np.abs(distance) < 1)).sum() / 2
    mixed = (band * patch.coverage * (1 - patch.coverage)).sum()
    return float(np.sqrt(np.pi) * mixed / max(outline, 1.0))


def _contrast(patch: _Patch, distance: np.ndarray, y: float, side: int) -> float:
    """Share of the fill's shade that follows the bars' fundamental wave."""
    wave = np.cos(np.pi / BAR_WIDTH * (patch.y - y) / side)
    weight = patch.weight * np.clip(-0.5 - distance, 0, 1)
    wave = np.broadcast_to(wave, weight.shape)
    total = max(weight.sum(), 1e-6)
    shade, mean = (weight * patch.shaded).sum() / total, (weight * wave).sum() / total
    centered = weight * (wave - mean)
    slope = (centered * patch.shaded).sum() / max((centered * wave).sum(), 1e-6)
    return float(slope / max(shade, 0.1))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Binomial 3x3 average of [h, w, c] with repeated borders."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def _erode(mask: np.ndarray) -> np.ndarray:
    return ~_dilate(~mask)


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Grow by one pixel to the four sides."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown
