"""Metrics on given features: golden values, invariances, oracles by definition."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.errors import UserError
from nextscale.eval import (
    frechet_distance,
    inception_score,
    kernel_distance,
    pairwise,
    precision_recall,
    vendi_score,
)
from nextscale.eval.frechet import Moments
from nextscale.eval.pairwise import (
    kernel_distance_error,
    kernel_distance_subsets,
    rbf_distance,
    rbf_distance_error,
    vendi_without,
)
from nextscale.eval.scores import clip_scores, geneval_aggregate

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"
FEATURES = np.load(GOLDEN / "features.npz")
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = EXPECTED["cases"]
# Peers on float32 features as they ship them are less exact.
AS_SHIPPED = "torch_fidelity_as_shipped_f32_features"
FIELDS = ("precision", "recall", "density", "coverage")


def features(case: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(FEATURES[f"{case}_{side}"].astype(np.float64) for side in ("ref", "gen"))  # type: ignore[return-value]


def distance(a: Moments, b: Moments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance(case: str) -> None:
    real, fake = map(Moments.of, features(case))
    expected = CASES[case]["fd"]
    trace = expected["trace_sigma_ref"] + expected["trace_sigma_gen"]
    value = distance(real, fake)
    assert value == pytest.approx(expected["exact_svd_of_data"], abs=1e-9 * trace)
    for name, peer in expected.items():
        if name.startswith(("pytorch_fid", "clean_fid", "torch_fid", "torchmetrics", "dgm")):
            tolerance = 3e-5 if name == AS_SHIPPED else 5e-6
            if case == "offset" and name == AS_SHIPPED:
                tolerance = 2e-3 * peer + tolerance  # their float32 mean: off by 0.2 %
            assert value == pytest.approx(peer, abs=tolerance), name


@pytest.mark.parametrize("case", CASES)
def test_moments_do_not_depend_on_batches_or_their_order(case: str) -> None:
    real, fake = features(case)
    whole, other = Moments.of(real), Moments.of(fake)
    trace = float(whole.covariance.trace() + other.covariance.trace())
    for size in (1, 7, 50):
        total = Moments.empty(real.shape[1])
        for start in reversed(range(0, len(real), size)):
            total = total.merge(Moments.of(real[start : start + size]))
        assert total.count == len(real)
        assert distance(total, other) == pytest.approx(distance(whole, other), abs=1e-12 * trace)
    part = Moments.of(real[:37])
    rest, direct = whole.without(part), Moments.of(real[37:])
    assert rest.count == direct.count
    assert distance(rest, direct) <= 1e-9 * trace


@pytest.mark.parametrize("case", CASES)
def test_frechet_distance_invariances(case: str) -> None:
    real, fake = features(case)
    a, b = Moments.of(real), Moments.of(fake)
    trace = float(a.covariance.trace() + b.covariance.trace())
    value = distance(a, b)
    assert distance(a, a) <= 1e-10 * trace
    assert distance(b, a) == pytest.approx(value, abs=1e-10 * trace)
    moved = distance(Moments.of(real + 1e4), Moments.of(fake + 1e4))
    assert moved == pytest.approx(value, rel=1e-8, abs=1e-9 * trace)
    scaled = distance(Moments.of(3 * real), Moments.of(3 * fake))
    assert scaled == pytest.approx(9 * value, rel=1e-8)


def test_frechet_distance_of_gaussians_by_its_formula() -> None:
    # Diagonal covariances commute: squared differences of means and of deviations add up.
    random = np.random.default_rng(0)
    m1, m2, d1, d2 = random.uniform(0.1, 2, (4, 20))
    expected = ((m1 - m2) ** 2 + (d1 - d2) ** 2).sum()
    value = frechet_distance(m1, np.diag(d1**2), m2, np.diag(d2**2))
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_refuses_what_is_no_covariance() -> None:
    mean, identity = np.zeros(3), np.eye(3)
    with pytest.raises(UserError, match=r"of one d, got \(3,\), \(3, 3\), \(3,\), \(4, 4\)"):
        frechet_distance(mean, identity, mean, np.eye(4))
    with pytest.raises(UserError, match="NaN or infinity"):
        frechet_distance(mean, identity * np.nan, mean, identity)
    with pytest.raises(UserError, match="not symmetric"):
        frechet_distance(mean, np.triu(np.ones((3, 3))), mean, identity)
    with pytest.raises(UserError, match="eigenvalue -1, so it is none"):
        frechet_distance(mean, -identity, mean, identity)
    with pytest.raises(UserError, match="2 images or more, got 1"):
        _ = Moments.of(np.ones((1, 3))).covariance


@pytest.mark.parametrize("case", [c for c in CASES if "kid" in CASES[c]])
def test_kernel_distance(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "TILE", 97)
    expected = CASES[case]["kid"]
    real, fake = features(case)
    assert kernel_distance(real, fake) == pytest.approx(expected["full_unbiased_all"], rel=1e-9)
    subsets = {name: expected[name] for name in ("subsets", "subset_size", "seed")}
    mean, std = kernel_distance_subsets(real, fake, **subsets)
    assert mean == pytest.approx(expected["mean"], rel=1e-9)
    assert std == pytest.approx(expected["std_population"], rel=1e-9)


def test_kernel_distance_error_is_the_spread_of_leaving_blocks_out() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(0.3, 1, size=(47, 6))
    block = np.arange(47) % 5
    values = np.array([kernel_distance(x, y[block != b]) for b in range(5)])
    expected = np.sqrt(4 / 5 * ((values - values.mean()) ** 2).sum())
    assert kernel_distance_error(x, y, blocks=5) == pytest.approx(expected, rel=1e-9)
    values = np.array([rbf_distance(x, y[block != b], sigma=2.0)[1] for b in range(5)])
    expected = np.sqrt(4 / 5 * ((values - values.mean()) ** 2).sum())
    assert rbf_distance_error(x, y, 5, sigma=2.0) == pytest.approx(expected, rel=1e-9)
    several = [rng.normal(0.3, 1, size=(200, 6)) for _ in range(200)]
    spread = np.std([kernel_distance(x, part) for part in several], ddof=1)
    typical = np.mean([kernel_distance_error(x, part) for part in several])
    assert 0.7 * spread < typical < 1.4 * spread


def test_kernel_distance_of_a_set_with_itself_is_below_zero() -> None:
    real, _ = features("gauss")
    assert kernel_distance(real, real) < 0


@pytest.mark.parametrize("tile", [97, 4096])
@pytest.mark.parametrize("case", [c for c in CASES if "prdc" in CASES[c]])
def test_precision_recall(case: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "TILE", tile)
    real, fake = features(case)
    for expected in CASES[case]["prdc"].values():
        found = precision_recall(real, fake, k=expected["k"])
        for name in FIELDS:
            assert getattr(found, name) == pytest.approx(expected["prdc_0_2"][name], abs=1e-12)
        for name in FIELDS[:2]:
            peer = expected["torch_fidelity"][name]
            assert getattr(found, name) == pytest.approx(peer, abs=1e-6)


def test_a_distance_equal_to_the_radius_is_inside() -> None:
    real = np.array([[0.0], [1.0], [3.0]])
    # 1-neighbour radii of the real points: 1, 1, 2. The fake points lie on a border, and beyond.
    found = precision_recall(real, np.array([[5.0], [5.5], [-1.0], [9.0]]), k=1)
    assert found.precision == 0.5
    assert found.coverage == pytest.approx(2 / 3)
    assert found.density == pytest.approx(2 / 4)


def test_precision_recall_of_collapsed_sets() -> None:
    """Equal rows need no exact differences: they would be as many as pairs."""
    row = np.random.default_rng(0).normal(size=(1, 2048))
    one, other = np.repeat(row, 700, axis=0), np.repeat(row + 1, 700, axis=0)
    began = time.perf_counter()
    assert precision_recall(one, one, k=3)[:4] == pytest.approx((1, 1, 700 / 3, 1))
    assert precision_recall(one, other, k=3)[:4] == (0.0, 0.0, 0.0, 0.0)
    mixed = np.concatenate([one[:350], other[:350]])
    assert precision_recall(one, mixed, k=3)[:2] == (0.5, 1.0)
    assert time.perf_counter() - began < 30  # a minute and more by differences


def test_precision_recall_of_a_set_with_itself_and_with_a_far_one() -> None:
    real, _ = features("gauss")
    assert precision_recall(real, real)[:2] == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0,) * 6
    with pytest.raises(UserError, match="k = 5 neighbours need more points, got 5 and 9"):
        precision_recall(real[:5], real[:9], k=5)


@pytest.mark.parametrize("width", [4, 90])
def test_vendi_score_without_blocks(width: int) -> None:
    rows = np.random.default_rng(0).normal(0.5, 1, size=(47, width))
    expected = [vendi_score(rows[np.arange(47) % 5 != b]) for b in range(5)]
    assert list(vendi_without(rows, 5)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if "vendi_gen" in CASES[c]])
def test_vendi_score(case: str) -> None:
    _, fake = features(case)
    for q, expected in CASES[case]["vendi_gen"]["q"].items():
        assert vendi_score(fake, float(q)) == pytest.approx(expected, rel=1e-9)


def test_vendi_score_counts_kinds() -> None:
    assert vendi_score(np.eye(6)) == pytest.approx(6)
    assert vendi_score(np.repeat(np.eye(2), 5, axis=0), math.inf) == pytest.approx(2)
    assert vendi_score(np.ones((9, 2))) == pytest.approx(1)
    with pytest.raises(UserError, match="q is 0"):
        vendi_score(np.eye(3), 0)
    with pytest.raises(UserError, match="zero"):
        vendi_score(np.zeros((3, 2)))


def test_rbf_distance() -> None:
    for expected in CASES["clip_like"]["mmd_rbf"]:
        biased, unbiased = rbf_distance(*features("clip_like"), sigma=expected["sigma"])
        scale = expected["scale"]
        assert scale * biased == pytest.approx(expected["biased_scaled"], rel=1e-9)
        assert scale * unbiased == pytest.approx(expected["unbiased_scaled"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "key"), [("logits", "logits"), ("logits_peaky", "logits_peaky_not_divisible")]
)
def test_inception_score(name: str, key: str) -> None:
    expected = EXPECTED["inception_score"][key]
    logits = FEATURES[name]
    mean, std = inception_score(logits, expected["splits"])
    assert mean == pytest.approx(expected["no_shuffle"]["mean"], rel=1e-9)
    assert std == pytest.approx(expected["no_shuffle"]["std_population"], rel=1e-9)
    order = np.random.RandomState(expected["shuffle_seed"]).permutation(len(logits))
    mean, std = inception_score(logits[order], expected["splits"])
    assert mean == pytest.approx(expected["shuffled"]["mean"], rel=1e-9)
    assert std == pytest.approx(expected["shuffled"]["std_population"], rel=1e-9)
    assert inception_score(logits, 1) == (pytest.approx(expected["single_split"], rel=1e-9), 0)


def test_inception_score_bounds_and_underflow() -> None:
    sure = 1e4 * torch.eye(8)  # probabilities underflow to 0
    assert inception_score(sure, 1)[0] == pytest.approx(8)
    assert inception_score(torch.zeros(8, 5), 2) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(UserError, match=r"splits is 10, but must lie in 1\.\.8"):
        inception_score(sure)


def test_clip_scores() -> None:
    expected = EXPECTED["clipscore"]
    found = clip_scores(np.array(expected["cos"]))
    assert found["clipscore_w2.5"] == pytest.approx(expected["hessel_w2_5_mean"], rel=1e-9)
    assert found["clip_x100"] == pytest.approx(expected["x100_clamp_after_mean"], rel=1e-9)
    assert found["clip_cosine"] == pytest.approx(expected["raw_cos_mean"], rel=1e-9)
    worst: Callable[[Any], float] = lambda cos: clip_scores(np.array(cos))["clip_x100"]  # noqa: E731
    assert worst([-0.2, -0.1]) == 0


def test_geneval_aggregate() -> None:
    expected = EXPECTED["geneval_aggregate"]
    found = geneval_aggregate(expected["rows"])
    assert found["tasks"] == pytest.approx(expected["per_task"], rel=1e-9)
    assert found["score"] == pytest.approx(expected["overall_mean_of_tasks"], rel=1e-9)
    assert found["image_accuracy"] == pytest.approx(expected["image_accuracy"], rel=1e-9)
    assert found["prompt_accuracy"] == pytest.approx(expected["prompt_any_accuracy"], rel=1e-9)
