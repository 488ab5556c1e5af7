"""The bundled networks that score without a download: what their cards claim."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from bundled_networks import COUNT, FAULTS, meter, right_caption_first, true_scenes

from nextscale import storage
from nextscale.data.scenes import sample_scene
from nextscale.eval.clip import open_clip_model

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


QUICK = ("blur", "colour shift")  # the others are slow tests, for a short default suite


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAULTS]
)
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


@pytest.mark.parametrize("held_out", [False, True])
def test_the_small_clip_ranks_the_right_caption_first(held_out: bool) -> None:
    """On scenes of the test stream, and on those whose pairs the generator never met."""
    pytest.importorskip("open_clip")
    scenes = [sample_scene(2, index, held_out=held_out) for index in range(400)]
    assert right_caption_first(open_clip_model("scenes-clip"), scenes) >= 0.95
