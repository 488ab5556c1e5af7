"""The scenes world: procedural pictures of 1 to 3 coloured shapes with exact ground truth.

A scene is a vector description, a function of (seed, index), and is rendered at any size. All
lengths are fractions of the picture's side; x grows to the right and y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextscale.data.captions import COLORS, FILLS, RELATIONS, SHAPES, SIZES, Caption, Group

# (colour, shape) pairs that never occur in training scenes: the `compositional` benchmark.
HELD_OUT = (("purple", "triangle"), ("yellow", "cross"))
RGB = {
    "red": (0.87, 0.11, 0.13),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.28, 0.88),
    "yellow": (0.97, 0.83, 0.08),
    "purple": (0.66, 0.14, 0.74),
}
RADII = {"small": (0.13, 0.15), "large": (0.19, 0.22)}
BAR_WIDTH = 0.08  # stripes: bars of the colour and of its dark shade, horizontal, centred
BAR_SHADE = 0.45
RELATION_MARGIN = 0.18  # distance of centres that makes a relation visible
MAX_HIDDEN = 0.2  # share of a shape's area that nearer shapes may hide
SAME_COLOR_GAP = 0.06
CLASS_NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Share of its bounding square (side 2 r) that a shape fills.
_AREA = {"circle": np.pi / 4, "square": 0.88**2, "triangle": 0.45, "cross": 0.5904}


@dataclass(frozen=True)
class Shape:
    """One shape; (x, y) is its centre and `radius` half of its extent, in units of the side."""

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    radius: float

    @property
    def depth(self) -> float:
        """Nearness in (0.2, 1): a fixed function of the vertical centre, lower is nearer."""
        return 0.2 + 0.8 * self.y


@dataclass(frozen=True)
class Background:
    """A tinted grey with a linear gradient and a soft wave; amplitudes in [0, 1] intensity."""

    rgb: tuple[float, float, float]
    gradient: tuple[float, float]
    wave: tuple[float, float, float]  # frequency x, frequency y (cycles per side), phase (radians)


@dataclass(frozen=True)
class Scene:
    """Shapes in caption order, the caption that describes them exactly, and the background."""

    shapes: tuple[Shape, ...]
    caption: Caption
    background: Background

    @property
    def class_label(self) -> int:
        """Index into CLASS_NAMES of the first shape that the caption names."""
        return CLASS_NAMES.index(f"{self.shapes[0].color} {self.shapes[0].shape}")


def sample_scene(
    seed: int, index: int, *, caption: Caption | None = None, held_out: bool = False
) -> Scene:
    """Draw scene `index` of the endless stream `seed`.

    Args:
        seed: Stream, 0 <= seed < 2^63. By convention 0 trains, 1 validates, 2 tests.
        index: Position in the stream, >= 0.
        caption: Draw a picture of this caption instead of a random one.
        held_out: Draw captions that contain at least one HELD_OUT pair instead of none.
    """
    rng = np.random.Generator(np.random.Philox(key=(int(seed) << 64) | int(index)))
    fixed = caption
    while True:
        caption = fixed or _sample_caption(rng, held_out)
        shapes = _place(rng, caption)
        if shapes is not None:
            return Scene(shapes, caption, _sample_background(rng))


def sample_caption(seed: int, index: int, *, held_out: bool = False) -> Caption:
    """Draw a caption alone, from the distribution that `sample_scene` uses."""
    return sample_scene(seed, index, held_out=held_out).caption


def _sample_caption(rng: np.random.Generator, held_out: bool) -> Caption:
    count = int(rng.choice(3, p=(0.25, 0.375, 0.375))) + 1
    layouts = {1: ([1],), 2: ([1, 1], [1, 1], [1, 1], [2]), 3: ([1, 1, 1], [2, 1], [1, 2], [3])}
    counts = layouts[count][rng.integers(len(layouts[count]))]
    while True:
        pairs = [(COLORS[rng.integers(5)], SHAPES[rng.integers(4)]) for _ in counts]
        distinct = len(set(pairs)) == len(pairs)
        if distinct and held_out == any(pair in HELD_OUT for pair in pairs):
            break
    modifiers = rng.random() < 1 / 3
    groups = []
    for number, (color, shape) in zip(counts, pairs, strict=True):
        named = int(rng.integers(1, 4)) if modifiers else 0  # 1 size, 2 fill, 3 both
        size = SIZES[rng.integers(2)] if named & 1 else None
        fill = FILLS[rng.integers(2)] if named & 2 else None
        groups.append(Group(number, color, shape, size, fill))
    relation = None
    if len(groups) > 1 and rng.random() < 0.5:
        relation = RELATIONS[rng.integers(4)]
    return Caption(tuple(groups), relation)


def _place(rng: np.random.Generator, caption: Caption) -> tuple[Shape, ...] | None:
    """Positions by rejection, 64 layouts at a time; None if the caption did not fit."""
    owner = [g for g, group in enumerate(caption.groups) for _ in range(group.count)]
    groups = [caption.groups[g] for g in owner]
    n = len(groups)
    colors = [group.color for group in groups]
    for _ in range(8):
        sizes = [group.size or SIZES[rng.integers(2)] for group in groups]
        fills = [group.fill or FILLS[int(rng.random() < 0.3)] for group in groups]
        radii = np.array([rng.uniform(*RADII[size]) for size in sizes])
        low = radii + 0.02
        centers = low[:, None] + rng.random((64, n, 2)) * (1 - 2 * low)[:, None]
        good = np.ones(64, dtype=bool)
        hidden = np.zeros((64, n))
        for i in range(n):
            for j in range(i + 1, n):
                distance = centers[:, j] - centers[:, i]
                overlap = radii[i] + radii[j] - np.abs(distance)
                if colors[i] == colors[j]:
                    good &= (overlap < -SAME_COLOR_GAP).any(axis=1)
                area = np.clip(overlap, 0, None).prod(axis=1)
                i_behind = distance[:, 1] > 0
                for k, behind in ((i, i_behind), (j, ~i_behind)):
                    own = 4 * radii[k] ** 2 * _AREA[groups[k].shape]
                    hidden[:, k] += np.where(behind, area / own, 0)
                if caption.relation and {owner[i], owner[j]} == {0, 1}:
                    axis = 0 if caption.relation in ("left of", "right of") else 1
                    sign = 1 if caption.relation in ("left of", "above") else -1
                    good &= sign * distance[:, axis] > RELATION_MARGIN
        good &= (hidden < MAX_HIDDEN).all(axis=1)
        if good.any():
            chosen = centers[good.argmax()]
            return tuple(
                Shape(
                    g.shape,
                    g.color,
                    sizes[k],
                    fills[k],
                    float(chosen[k, 0]),
                    float(chosen[k, 1]),
                    float(radii[k]),
                )
                for k, g in enumerate(groups)
            )
    return None


def _sample_background(rng: np.random.Generator) -> Background:
    grey = rng.uniform(0.3, 0.92)
    tint = rng.uniform(-0.04, 0.04, 3)
    angle = rng.uniform(0, 2 * np.pi)
    frequency = rng.uniform(-2.0, 2.0, 2)
    return Background(
        rgb=(float(grey + tint[0]), float(grey + tint[1]), float(grey + tint[2])),
        gradient=(float(0.05 * np.cos(angle)), float(0.05 * np.sin(angle))),
        wave=(float(frequency[0]), float(frequency[1]), float(rng.uniform(0, 2 * np.pi))),
    )


def render(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """Draw scenes with anti-aliased edges.

    Args:
        scenes: n scenes.
        size: Side in pixels.

    Returns:
        uint8 [n, size, size, 3], RGB.
    """
    images = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    for image, scene in zip(images, scenes, strict=True):
        canvas = _draw_background(scene.background, grid)
        for shape in _far_to_near(scene):
            rows, columns = _box(shape, size)
            dx = grid[None, columns] - np.float32(shape.x)
            dy = grid[rows, None] - np.float32(shape.y)
            alpha = np.clip(0.5 - signed_distance(shape, dx, dy) * size, 0, 1)[..., None]
            color = np.asarray(RGB[shape.color], np.float32) * _shade(shape, dy, size)[..., None]
            patch = canvas[rows, columns]
            patch += alpha * (color - patch)
        image[:] = canvas * 255 + 0.5
    return images


@dataclass(frozen=True)
class GroundTruth:
    """Exact maps of one scene, each [size, size].

    Attributes:
        instances: uint8, 0 for background, else 1 + index into `scene.shapes`.
        segmentation: uint8, 0 for background, else 1 + index into CLASS_NAMES.
        depth: float32 in [0, 1], nearness (larger is nearer), 0 for background.
        edges: bool, the pixels of a shape that touch another instance or the background.
    """

    instances: np.ndarray
    segmentation: np.ndarray
    depth: np.ndarray
    edges: np.ndarray


def ground_truth(scene: Scene, size: int) -> GroundTruth:
    """The scene's exact instance, segmentation, depth and edge maps at `size` pixels."""
    instances = np.zeros((size, size), dtype=np.uint8)
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    for shape in _far_to_near(scene):
        dx, dy = grid[None] - np.float32(shape.x), grid[:, None] - np.float32(shape.y)
        instances[signed_distance(shape, dx, dy) < 0] = 1 + scene.shapes.index(shape)
    classes = [0] + [1 + CLASS_NAMES.index(f"{s.color} {s.shape}") for s in scene.shapes]
    depths = [0.0] + [shape.depth for shape in scene.shapes]
    padded = np.pad(instances, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = np.zeros_like(instances, dtype=bool)
    for neighbour in neighbours:
        border |= neighbour != instances
    return GroundTruth(
        instances,
        np.asarray(classes, np.uint8)[instances],
        np.asarray(depths, np.float32)[instances],
        border & (instances > 0),
    )


def _far_to_near(scene: Scene) -> list[Shape]:
    return sorted(scene.shapes, key=lambda shape: shape.y)


def _box(shape: Shape, size: int) -> tuple[slice, slice]:
    reach = shape.radius + 1 / size

    def around(center: float) -> slice:
        return slice(max(int((center - reach) * size), 0), int((center + reach) * size) + 2)

    return around(shape.y), around(shape.x)


def _draw_background(background: Background, grid: np.ndarray) -> np.ndarray:
    fx, fy, phase = background.wave
    wave = np.sin(
        np.float32(2 * np.pi) * (np.float32(fx) * grid[None] + np.float32(fy) * grid[:, None])
        + np.float32(phase)
    )
    gx, gy = background.gradient
    light = np.float32(gx) * (grid[None] - 0.5) + np.float32(gy) * (grid[:, None] - 0.5)
    light = 2 * light + np.float32(0.015) * wave
    return np.clip(light[..., None] + np.asarray(background.rgb, np.float32), 0, 1)


def signed_distance(shape: Shape, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside, exact near edges and a bound at corners."""
    r = np.float32(shape.radius)
    if shape.shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - r
    ax, ay = np.abs(dx), np.abs(dy)
    if shape.shape == "square":
        return np.maximum(ax, ay) - np.float32(0.88) * r
    if shape.shape == "triangle":  # apex up, base at 0.8 r below the centre
        slope = np.float32(1.8)
        side = (ax * slope - (dy + r)) / np.float32(np.hypot(1.8, 1.0))
        return np.maximum(dy - np.float32(0.8) * r, side)
    arm = np.float32(0.36) * r
    return np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ay - r, ax - arm))


def _shade(shape: Shape, dy: np.ndarray, size: int) -> np.ndarray:
    """1 on bars of the pure colour, BAR_SHADE on dark bars, edges a pixel wide; [rows, 1]."""
    if shape.fill == "solid":
        return np.ones_like(dy)
    # Triangle wave in units of the side: distance to the nearest bar edge, positive on pure bars.
    phase = np.abs((dy / (2 * BAR_WIDTH) + 0.5) % 1.0 - 0.5) * 2 * BAR_WIDTH
    pure = np.clip(0.5 + (BAR_WIDTH / 2 - phase) * size, 0, 1)
    return BAR_SHADE + (1 - BAR_SHADE) * pure
