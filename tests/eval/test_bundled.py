"""The bundled networks that score without a download: what their cards claim."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from bundled_networks import COUNT, FAULTS, meter, true_scenes

from nextscale import storage

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """The reference and the measured half."""
    return true_scenes(2 * COUNT)


@pytest.fixture(scope="module")
def measure(scenes: np.ndarray) -> Callable[[np.ndarray], tuple[float, float]]:
    return meter(scenes[:COUNT])


@pytest.fixture(scope="module")
def clean(
    measure: Callable[[np.ndarray], tuple[float, float]], scenes: np.ndarray
) -> tuple[float, float]:
    return measure(scenes[COUNT:])


@pytest.mark.parametrize("fault", FAULTS)
def test_fd_scenes_grows_with_the_fault(
    measure: Callable[[np.ndarray], tuple[float, float]],
    clean: tuple[float, float],
    scenes: np.ndarray,
    fault: str,
) -> None:
    damage, amounts = FAULTS[fault]
    found = [clean, *(measure(damage(scenes[COUNT:], amount)) for amount in amounts)]
    for (less, error), (more, other) in itertools.pairwise(found):
        assert more - less > 2 * (error**2 + other**2) ** 0.5, found


def test_bundled_networks_are_small() -> None:
    folders = (storage.ASSETS / name for name in ("scenes-features", "scenes-clip"))
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir()]
    assert sum(sizes) <= 10e6
