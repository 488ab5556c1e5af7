"""The scenes world: deterministic, the same at any size, and true to its captions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from nextscale.data.captions import parse
from nextscale.data.checker import judge
from nextscale.data.scenes import (
    CLASS_NAMES,
    HELD_OUT,
    RELATION_MARGIN,
    Scene,
    ground_truth,
    render,
    sample_caption,
    sample_scene,
    signed_distance,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "scenes.npz"


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(7, index) for index in range(400)]


def visible_shares(scene: Scene, size: int = 128) -> list[float]:
    instances = ground_truth(scene, size).instances
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    shares = []
    for number, shape in enumerate(scene.shapes, start=1):
        inside = signed_distance(shape, grid[None] - shape.x, grid[:, None] - shape.y) < 0
        shares.append(float((instances == number).sum() / inside.sum()))
    return shares


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert sample_scene(3, 11) == sample_scene(3, 11)
    assert sample_scene(3, 11) != sample_scene(3, 12)
    assert sample_scene(3, 11) != sample_scene(4, 11)
    assert sample_caption(3, 11) == sample_scene(3, 11).caption


def test_scenes_are_the_committed_ones() -> None:
    """The world is frozen: weights, benchmarks and rewards depend on its pixels."""
    golden = np.load(GOLDEN)
    scenes = [sample_scene(2, index) for index in range(4)]
    assert [str(scene.caption) for scene in scenes] == golden["captions"].tolist()
    pixels = render(scenes, 64).astype(int)
    difference = np.abs(pixels - golden["images"].astype(int))
    # Rounding of float32 may differ between machines by one level.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_scene_looks_the_same_at_any_size(scenes: list[Scene]) -> None:
    small = render(scenes[:40], 32).astype(float)
    for factor in (2, 4):
        large = render(scenes[:40], 32 * factor).astype(float)
        shrunk = large.reshape(40, 32, factor, 32, factor, 3).mean(axis=(2, 4))
        error = np.abs(shrunk - small)
        assert error.mean() < 2
        assert np.quantile(error, 0.95) < 16


def test_a_picture_does_not_depend_on_the_others_in_the_call(scenes: list[Scene]) -> None:
    together = render(scenes[:6], 48)
    alone = np.concatenate([render([scene], 48) for scene in scenes[:6]])
    np.testing.assert_array_equal(together, alone)


def test_captions_are_true_of_their_scenes(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert all(statement.holds for statement in judge(scene.shapes, scene.caption))
        assert parse(str(scene.caption)) == scene.caption


def test_most_of_each_shape_stays_visible(scenes: list[Scene]) -> None:
    shares = np.concatenate([visible_shares(scene) for scene in scenes])
    assert shares.min() >= 0.6
    assert (shares < 0.98).mean() > 0.02  # occlusion does occur


def test_held_out_pairs_are_never_shown_in_training(scenes: list[Scene]) -> None:
    shown = {(shape.color, shape.shape) for scene in scenes for shape in scene.shapes}
    assert not shown & set(HELD_OUT)
    assert len(shown) == len(CLASS_NAMES) - len(HELD_OUT)
    for index in range(50):
        scene = sample_scene(7, index, held_out=True)
        assert {(shape.color, shape.shape) for shape in scene.shapes} & set(HELD_OUT)


def test_relations_are_shown_with_a_margin() -> None:
    related = 0
    for index in range(200):
        scene = sample_scene(8, index)
        if scene.caption.relation is None:
            continue
        related += 1
        border = scene.caption.groups[0].count
        end = border + scene.caption.groups[1].count
        axis = "x" if scene.caption.relation in ("left of", "right of") else "y"
        sign = 1 if scene.caption.relation in ("left of", "above") else -1
        for one, other in itertools.product(scene.shapes[:border], scene.shapes[border:end]):
            assert sign * (getattr(other, axis) - getattr(one, axis)) > RELATION_MARGIN
    assert related > 30


def test_a_given_caption_is_drawn() -> None:
    caption = parse("two small striped purple triangles above a large solid yellow cross")
    scene = sample_scene(0, 5, caption=caption)
    assert scene.caption == caption
    assert [shape.size for shape in scene.shapes] == ["small", "small", "large"]
    assert all(statement.holds for statement in judge(scene.shapes, caption))


def test_ground_truth_maps_agree_with_each_other(scenes: list[Scene]) -> None:
    for scene in scenes[:60]:
        truth = ground_truth(scene, 64)
        assert truth.instances.dtype == truth.segmentation.dtype == np.uint8
        assert truth.depth.dtype == np.float32
        assert set(np.unique(truth.instances)) == set(range(len(scene.shapes) + 1))
        for number, shape in enumerate(scene.shapes, start=1):
            mask = truth.instances == number
            label = CLASS_NAMES.index(f"{shape.color} {shape.shape}") + 1
            assert set(truth.segmentation[mask]) == {label}
            np.testing.assert_allclose(truth.depth[mask], shape.depth, rtol=1e-6)
        outside = truth.instances == 0
        assert not truth.segmentation[outside].any()
        assert not truth.depth[outside].any()
        assert not truth.edges[outside].any()
        assert truth.edges.any()
    assert scenes[0].class_label == CLASS_NAMES.index(
        f"{scenes[0].shapes[0].color} {scenes[0].shapes[0].shape}"
    )


def test_the_lower_shape_is_nearer_and_hides_the_other() -> None:
    for index in range(200):
        scene = sample_scene(9, index)
        shares = visible_shares(scene, 64)
        lowest = max(range(len(shares)), key=lambda i, scene=scene: scene.shapes[i].y)
        assert shares[lowest] == 1.0
