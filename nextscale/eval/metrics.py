"""The metrics of the FID family: from the features of both sets to values with their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from nextscale.errors import UserError
from nextscale.eval import pairwise
from nextscale.eval.features import Features
from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.statistics import Statistics

BLOCKS = 20  # of the jackknife


@dataclass(frozen=True)
class Metric:
    """What a metric needs of the features of both sets, and its direction.

    Attributes:
        tap: The features it is computed from.
        moments: It needs mean and covariance.
        rows: It needs the features of every picture.
        reference: It compares with a reference set.
        compute: (context) -> one or more named values.
    """

    tap: str
    compute: Callable[[Pair], dict[str, Value]]
    moments: bool = False
    rows: bool = False
    reference: bool = True


@dataclass(frozen=True)
class Value:
    """A figure, its standard error where there is one, and its direction."""

    value: float
    higher_is_better: bool
    se: float | None = None
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pair:
    """What metrics are computed from: the measured set and the reference."""

    fake: Features
    real: Features | None
    statistics: Statistics | None
    k: int
    seed: int
    progress: bool

    def rows(self, tap: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of the reference and of the measured set."""
        assert self.real is not None  # refused before the pass
        return self.real.rows[tap], self.fake.rows[tap]


def _frechet(pair: Pair, tap: str, name: str) -> dict[str, Value]:
    assert pair.statistics is not None
    if tap not in pair.statistics.values:
        raise UserError(f"{pair.statistics.name} has no statistics of the {tap} features")
    mean, covariance = pair.statistics.values[tap]
    whole = pair.fake.moments(tap)
    if len(mean) != len(whole.mean):
        raise UserError(
            f"{pair.statistics.name} has {len(mean)} {tap} features, the network {len(whole.mean)}"
        )

    def distance(moments: Moments) -> float:
        return frechet_distance(mean, covariance, moments.mean, moments.covariance)

    se = None
    if len(pair.fake.blocks[tap]) > 1 and whole.count >= 2 * BLOCKS:
        # Delete-block jackknife; the bootstrap's duplicates would bias the distance upwards.
        bar = tqdm(pair.fake.blocks[tap], desc=f"{name} error", disable=not pair.progress)
        without = np.array([distance(whole.without(block)) for block in bar])
        se = float(np.sqrt((BLOCKS - 1) / BLOCKS * ((without - without.mean()) ** 2).sum()))
    return {name: Value(distance(whole), False, se)}


def _inception(pair: Pair) -> dict[str, Value]:
    assert pair.fake.probabilities is not None
    mean, std = pair.fake.probabilities.score()
    splits = len(pair.fake.probabilities.counts)
    return {"isc": Value(mean, True, None, {"splits": splits, "std_over_splits": std})}


def _kernel(pair: Pair) -> dict[str, Value]:
    real, fake = pair.rows("pool")
    mean, std = pairwise.kernel_distance_subsets(real, fake, seed=pair.seed)
    size = min(1000, len(real), len(fake))
    params = {"subsets": 100, "subset_size": size, "std": std}
    # Subsets that are most of a set hardly differ: their spread says nothing of the error.
    se = std / 10 if 2 * size <= min(len(real), len(fake)) else None
    return {
        "kid": Value(mean, False, se, params),
        "kid_full": Value(pairwise.kernel_distance(real, fake), False),
    }


def _neighbours(pair: Pair) -> dict[str, Value]:
    found = pairwise.precision_recall(*pair.rows("pool"), k=pair.k)
    return {name: Value(v, True, None, {"k": pair.k}) for name, v in found._asdict().items()}


def _vendi(pair: Pair) -> dict[str, Value]:
    return {"vendi": Value(pairwise.vendi_score(pair.fake.rows["pool"]), True)}


def mean_score(scores: np.ndarray, prompts: Sequence[str]) -> Value:
    """Mean over the pictures; the error counts pictures of one prompt as one draw (clusters)."""
    scores = scores.astype(np.float64)
    mean = float(scores.mean())
    clusters: dict[str, float] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        clusters[prompt] = clusters.get(prompt, 0.0) + score - mean
    sums, count = np.array(list(clusters.values())), len(clusters)
    se = None
    if count > 1:
        se = float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(scores))
    return Value(mean, True, se, {"prompts": count})


METRICS: dict[str, Metric] = {
    "fid": Metric("pool", lambda pair: _frechet(pair, "pool", "fid"), moments=True),
    "sfid": Metric("spatial", lambda pair: _frechet(pair, "spatial", "sfid"), moments=True),
    "isc": Metric("logits", _inception, reference=False),
    "kid": Metric("pool", _kernel, rows=True),
    "prc": Metric("pool", _neighbours, rows=True),
    "vendi": Metric("pool", _vendi, rows=True, reference=False),
}
