"""Metrics of control: known values, bounds, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from nextscale.errors import UserError
from nextscale.eval.controllability import METRIC_OF, control_score, f1, mean_iou, rmse

RANDOM = np.random.default_rng(0)


def maps(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, None].astype(np.float32), 3, axis=1)


def test_f1_of_counted_pixels() -> None:
    given, found = np.zeros((2, 8, 8)), np.zeros((2, 8, 8))
    given[0, 0, :4] = 1
    found[0, 0, 2:8] = 1  # 2 shared, 4 and 6 in all
    assert f1(maps(given), maps(found)).tolist() == [2 * 2 / 10, 1.0]
    score = control_score("canny", maps(given), maps(found))
    assert (score.metric, score.value, score.higher_is_better) == ("canny_f1", 0.7, True)


def test_f1_is_scikit_learn_s() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    given, found = (RANDOM.random((5, 16, 16)) > 0.7 for _ in range(2))
    expected = [metrics.f1_score(a.ravel(), b.ravel()) for a, b in zip(given, found, strict=True)]
    np.testing.assert_allclose(f1(maps(given), maps(found)), expected, rtol=1e-12)


def test_rmse_is_in_units_of_bytes() -> None:
    given = np.zeros((1, 4, 4))
    assert rmse(maps(given), maps(given + 0.5))[0] == pytest.approx(127.5)
    assert not control_score("depth", maps(given), maps(given)).higher_is_better


def test_mean_iou_is_scikit_learn_s() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    given, found = (RANDOM.integers(0, 4, (3, 9, 9)).astype(np.uint8) for _ in range(2))
    expected = metrics.jaccard_score(given.ravel(), found.ravel(), average="macro")
    assert mean_iou(given, found) == pytest.approx(expected, rel=1e-12)
    kept = given != 0
    expected = np.mean(
        [
            ((given == c) & (found == c) & kept).sum()
            / (((given == c) | (found == c)) & kept).sum()
            for c in range(4)
        ]
    )
    assert mean_iou(given, found, ignore=0) == pytest.approx(expected, rel=1e-12)


def test_normals_at_right_angles_are_90_degrees_apart() -> None:
    one, other = np.full((1, 3, 4, 4), 0.5, np.float32), np.full((1, 3, 4, 4), 0.5, np.float32)
    one[:, 2], other[:, 0] = 1, 1
    assert control_score("normal", one, other).value == pytest.approx(90, abs=1e-3)
    assert control_score("normal", one, one).value == pytest.approx(0, abs=1e-2)


def test_equal_maps_are_perfect_by_every_metric() -> None:
    pytest.importorskip("torchmetrics")
    given = RANDOM.random((3, 3, 32, 32)).astype(np.float32)
    best = {"canny_f1": 1, "edge_ssim": 1, "depth_rmse": 0, "lowres_psnr": 100, "seg_miou": 1}
    for kind, metric in METRIC_OF.items():
        if metric in best:
            score = control_score(kind, given, given, lambda m: (m[:, 0] * 4).astype(np.uint8))
            assert score.value == pytest.approx(best[metric], abs=1e-4), kind


def test_what_cannot_be_compared_is_refused(without_shape_checks: None) -> None:
    given = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(UserError, match=r"\[2, 3, 8, 8\] control maps against \[1, 3, 8, 8\]"):
        control_score("canny", given, given[:1])
    with pytest.raises(UserError, match="no controllability metric for the type openpose"):
        control_score("openpose", given, given)
    with pytest.raises(UserError, match="pass labels"):
        control_score("segmentation", given, given)
