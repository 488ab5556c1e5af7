"""The checker: what it accepts, what it refuses, and that it judges statement by statement."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nextscale.data.captions import parse
from nextscale.data.checker import (
    KINDS,
    check,
    check_batch,
    checker_error,
    falsifiable,
    falsify,
    judge,
    prompt_accuracy,
    recover_depth,
    recover_segmentation,
    wilson_interval,
)
from nextscale.data.detector import detect
from nextscale.data.scenes import Scene, Shape, ground_truth, render, sample_scene
from nextscale.errors import UserError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(1, index) for index in range(200)]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> np.ndarray:
    return render(scenes, 64)


def degraded(images: np.ndarray, *, sigma: float, noise: float) -> np.ndarray:
    blurred = ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))
    noisy = blurred + np.random.default_rng(0).normal(0, noise, images.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def agreement(images: np.ndarray, scenes: list[Scene]) -> float:
    reports = check_batch(images, [scene.caption for scene in scenes])
    return float(np.mean([report.holds for report in reports]))


def test_errors_on_rendered_scenes_are_at_most_half_a_percent() -> None:
    figures = checker_error(n=300, size=64, seed=2)
    assert figures["true_error"] <= 0.005
    assert figures["false_error"] <= 0.005
    tried = [kind["n"] for kind in figures["false_kinds"].values()]
    assert len(tried) == len(KINDS)
    assert max(tried) - min(tried) <= 1


@pytest.mark.parametrize("size", [32, 48, 100, 128, 256])
def test_it_reads_pictures_of_any_size(size: int, scenes: list[Scene]) -> None:
    assert agreement(render(scenes[:50], size), scenes[:50]) == 1.0


def test_it_reads_pairs_that_training_never_shows() -> None:
    scenes = [sample_scene(1, index, held_out=True) for index in range(60)]
    assert agreement(render(scenes, 64), scenes) == 1.0


def test_mild_blur_and_noise_change_nothing(scenes: list[Scene], images: np.ndarray) -> None:
    assert agreement(degraded(images, sigma=1.0, noise=8.0), scenes) >= 0.97


def test_strongly_blurred_pictures_fail(scenes: list[Scene], images: np.ndarray) -> None:
    for sigma in (5.0, 8.0):
        assert agreement(degraded(images, sigma=sigma, noise=0.0), scenes) == 0.0


def test_blank_and_noise_pictures_are_rejected() -> None:
    rng = np.random.default_rng(0)
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)]
    pictures += [np.full((64, 64, 3), (222, 28, 33), np.uint8)]
    pictures += list(rng.integers(0, 256, (20, 64, 64, 3)).astype(np.uint8))
    for std in (10, 30, 80):
        noise = rng.normal(128, std, (10, 64, 64, 3))
        pictures += list(np.clip(noise, 0, 255).astype(np.uint8))
    for sigma in (2, 5, 10):
        blobs = ndimage.gaussian_filter(rng.normal(size=(20, 64, 64, 3)), (0, sigma, sigma, 0))
        pictures += list(np.clip(128 + 60 * blobs / blobs.std(), 0, 255).astype(np.uint8))
    for picture in pictures:
        assert detect(picture).rejected is not None
        report = check(picture, "a red circle")
        assert not report.holds
        assert report.score == 0.0
        assert not any(statement.holds for statement in report.statements)


def test_a_shape_of_a_foreign_colour_is_unexplained() -> None:
    picture = np.full((64, 64, 3), 200, np.uint8)
    picture[20:40, 20:40] = (0, 200, 200)
    assert "unexplained" in str(detect(picture).rejected)


def test_positions_and_sizes_are_read_to_a_third_of_a_pixel(
    scenes: list[Scene], images: np.ndarray
) -> None:
    for scene, image in zip(scenes, images, strict=True):
        detection = detect(image)
        assert len(detection.shapes) == len(scene.shapes)
        for shape in scene.shapes:
            distance, found = min(
                (np.hypot(s.x - shape.x, s.y - shape.y), i) for i, s in enumerate(detection.shapes)
            )
            match = detection.shapes[found]
            assert distance < 1 / 3 / 64 * 1.5
            assert abs(match.radius - shape.radius) < 1 / 3 / 64
            assert (match.shape, match.color, match.size, match.fill) == (
                shape.shape,
                shape.color,
                shape.size,
                shape.fill,
            )
            assert match.visible > 0.6
            assert match.quality > 0.8


def test_a_false_statement_fails_alone(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for scene in scenes:
        for kind in falsifiable(scene.caption, scene):
            wrong, changed = falsify(scene.caption, scene, rng, kind)
            assert changed == kind
            assert parse(str(wrong)) == wrong
            failed = [s.kind for s in judge(scene.shapes, wrong) if not s.holds]
            assert failed == [kind], (str(scene.caption), str(wrong))
            seen.add(kind)
    assert seen == set(KINDS)


def shape(color: str, kind: str, x: float, y: float, size: str = "large") -> Shape:
    return Shape(kind, color, size, "solid", x, y, 0.2 if size == "large" else 0.14)


def failures(shapes: list[Shape], caption: str) -> list[str]:
    return [s.kind for s in judge(shapes, parse(caption)) if not s.holds]


def test_statements_are_judged_in_a_closed_world() -> None:
    red, blue = shape("red", "circle", 0.3, 0.5), shape("blue", "square", 0.7, 0.5)
    assert failures([red, blue], "a red circle left of a blue square") == []
    assert failures([red, blue], "a blue square right of a red circle") == []
    assert failures([red, blue], "a red circle right of a blue square") == ["relation"]
    assert failures([red, blue], "a red circle") == ["closed_world"]
    assert failures([red], "two red circles") == ["count"]
    assert failures([red, shape("red", "circle", 0.7, 0.5)], "a red circle") == ["count"]
    assert failures([red], "a red circle and a blue square") == ["color", "shape", "count"]
    assert failures([red], "a small striped red circle") == ["size", "fill"]
    assert failures([], "a red circle") == ["color", "shape", "count"]


def test_a_relation_needs_each_pair_and_a_visible_offset() -> None:
    left = [shape("red", "circle", 0.2, 0.2), shape("red", "circle", 0.6, 0.8)]
    right = [shape("blue", "square", 0.5, 0.5)]
    assert failures(left + right, "two red circles left of a blue square") == ["relation"]
    near = [shape("red", "circle", 0.48, 0.2), shape("blue", "square", 0.5, 0.7)]
    assert failures(near, "a red circle left of a blue square") == ["relation"]
    assert failures(near, "a red circle above a blue square") == []


def test_colour_and_shape_decide_which_shape_is_meant() -> None:
    """Neither a size nor a relation may swap the roles of two shapes."""
    shapes = [
        shape("red", "circle", 0.8, 0.5, size="small"),
        shape("blue", "circle", 0.2, 0.5, size="large"),
    ]
    caption = "a large red circle left of a small blue circle"
    assert failures(shapes, caption) == ["size", "size", "relation"]


def test_score_is_the_share_of_statements_that_hold(
    scenes: list[Scene], images: np.ndarray
) -> None:
    scene, image = scenes[0], images[0]
    report = check(image, str(scene.caption))
    assert report.holds
    assert report.score == 1.0
    wrong, _ = falsify(scene.caption, scene, np.random.default_rng(0), "color")
    report = check(image, wrong)
    assert not report.holds
    assert report.score == pytest.approx(1 - 1 / len(report.statements))


def test_depth_and_segmentation_are_recovered(scenes: list[Scene], images: np.ndarray) -> None:
    for scene, image in zip(scenes[:60], images, strict=False):
        truth = ground_truth(scene, 64)
        segmentation, depth = recover_segmentation(image), recover_depth(image)
        assert segmentation.dtype == np.uint8
        assert depth.dtype == np.float32
        for label in np.unique(truth.segmentation[truth.segmentation > 0]):
            one, other = segmentation == label, truth.segmentation == label
            assert (one & other).sum() / (one | other).sum() > 0.95
        both = (depth > 0) & (truth.depth > 0)
        assert both.sum() / ((depth > 0) | (truth.depth > 0)).sum() > 0.95
        assert np.median(np.abs(depth - truth.depth)[both]) < 0.005


def test_a_blank_picture_has_empty_maps() -> None:
    blank = np.full((64, 64, 3), 128, np.uint8)
    assert not recover_depth(blank).any()
    assert not recover_segmentation(blank).any()


def test_accuracy_is_summarised_with_its_interval(scenes: list[Scene], images: np.ndarray) -> None:
    captions = [scene.caption for scene in scenes[:19]]
    reports = check_batch(images[:19], captions)
    reports += check_batch(np.full((1, 64, 64, 3), 128, np.uint8), ["a red circle"])
    figures = prompt_accuracy(reports)
    assert figures["n"] == 20
    assert figures["accuracy"] == 0.95
    assert figures["rejected"] == 1
    assert figures["interval"] == pytest.approx((0.7639, 0.9911), abs=1e-3)
    assert figures["kinds"]["closed_world"] == {"accuracy": 0.95, "n": 20}
    assert 0 <= figures["values"]["red"]["accuracy"] < 1


def test_wilson_interval_of_known_cases() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="side, side, 3"):
        detect(np.zeros((64, 32, 3), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        detect(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(UserError, match="grammar"):
        check(np.zeros((64, 64, 3), np.uint8), "a dog")
    with pytest.raises(UserError, match="as many captions"):
        check_batch(np.zeros((2, 64, 64, 3), np.uint8), ["a red circle"])
    with pytest.raises(UserError, match="at least one"):
        prompt_accuracy([])
