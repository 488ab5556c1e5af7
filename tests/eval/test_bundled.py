"""The bundled networks that score without a download: what their cards claim."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from tiny_network import bundled_features

from nextscale import storage
from nextscale.data.scenes import render, sample_scene
from nextscale.eval import evaluate
from nextscale.eval.feature_network import SmallFeatures
from nextscale.eval.features import extract
from nextscale.eval.images import open_images
from nextscale.eval.statistics import statistics_of

pytest.importorskip("timm")
COUNT = 5000
SEED = 2  # the test stream: neither trained nor validated on


@pytest.fixture(scope="module")
def network() -> SmallFeatures:
    return bundled_features()


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """Twice COUNT scenes: the reference and the measured half."""
    drawn = [sample_scene(SEED, index) for index in range(2 * COUNT)]
    return np.concatenate([render(drawn[i : i + 500], 64) for i in range(0, 2 * COUNT, 500)])


def rounded(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    parts = np.array_split(pixels, 10)
    return np.concatenate(
        [rounded(gaussian_filter(p.astype(np.float32), (0, sigma, sigma, 0))) for p in parts]
    )


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    rng, parts = np.random.default_rng(0), np.array_split(pixels, 10)
    return np.concatenate(
        [rounded(p + 255 * sigma * rng.standard_normal(p.shape, dtype=np.float32)) for p in parts]
    )


def shifted(pixels: np.ndarray, amount: float) -> np.ndarray:
    change = np.array([1.0, -0.5, -1.0], dtype=np.float32)
    return rounded(pixels + np.float32(255 * amount) * change)


def unbalanced(pixels: np.ndarray, share: float) -> np.ndarray:
    """So many of the pictures show a red circle first, whatever else they show."""
    count = int(share * len(pixels))
    scenes = (sample_scene(SEED, 10 * COUNT + i) for i in range(100 * COUNT))
    red = [s for s, _ in zip((s for s in scenes if s.class_label == 0), range(count), strict=False)]
    more = render(red, 64) if red else pixels[:0]
    return np.concatenate([more, pixels[count:]])


@pytest.mark.parametrize(
    ("damage", "amounts"),
    [
        (blurred, (0.5, 0.7, 1.2)),
        (noisy, (0.02, 0.05, 0.1)),
        (shifted, (0.02, 0.05, 0.1)),
        (unbalanced, (0.1, 0.2, 0.4)),
    ],
)
def test_fd_scenes_grows_with_the_fault(
    measure: Callable[[np.ndarray], tuple[float, float]],
    clean: tuple[float, float],
    scenes: np.ndarray,
    damage: Callable[[np.ndarray, float], np.ndarray],
    amounts: Sequence[float],
) -> None:
    found = [clean, *(measure(damage(scenes[COUNT:], amount)) for amount in amounts)]
    for (less, error), (more, other) in itertools.pairwise(found):
        assert more - less > 2 * (error**2 + other**2) ** 0.5, found


@pytest.fixture(scope="module")
def measure(
    network: SmallFeatures, scenes: np.ndarray
) -> Callable[[np.ndarray], tuple[float, float]]:
    features = extract(open_images(scenes[:COUNT]), network, moments=["scenes"], batch_size=250)
    reference = statistics_of(features, network.fingerprint(), "true scenes")

    def of(pixels: np.ndarray) -> tuple[float, float]:
        settings = {"network": network, "metrics": ["fd_scenes"], "batch_size": 250}
        found = evaluate(pixels, reference, **settings)["metrics"]["fd_scenes"]
        return found["value"], found["se"]

    return of


@pytest.fixture(scope="module")
def clean(
    measure: Callable[[np.ndarray], tuple[float, float]], scenes: np.ndarray
) -> tuple[float, float]:
    return measure(scenes[COUNT:])


def test_bundled_networks_are_small() -> None:
    folders = (storage.ASSETS / name for name in ("scenes-features", "scenes-clip"))
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir()]
    assert sum(sizes) <= 10e6
