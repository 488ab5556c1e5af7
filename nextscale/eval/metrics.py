"""The metrics by name: from the features of both sets to values with their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from nextscale.errors import UserError
from nextscale.eval import pairwise
from nextscale.eval.features import Features
from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.reconstruction import PAIRED, psnr
from nextscale.eval.scorers import SCORERS
from nextscale.eval.scores import SplitProbabilities, clip_scores
from nextscale.eval.statistics import Statistics

BLOCKS = 20  # of the jackknife
SPACES = ("scenes", "clip", "dinov2")  # features besides Inception's, each with its family
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Metric:
    """What a metric needs of the features of both sets.

    Attributes:
        tap: The features it is computed from.
        compute: (both sets) -> one or more named values.
        moments: It needs mean and covariance.
        rows: It needs the features of every picture.
        reference: It compares with a reference set.
        paired: It compares picture i with original i.
        prompts: It needs the prompt of every picture.
    """

    tap: str
    compute: Callable[[Pair], dict[str, Value]]
    moments: bool = False
    rows: bool = False
    reference: bool = False
    paired: bool = False
    prompts: bool = False


@dataclass(frozen=True)
class Value:
    """A figure, its standard error where there is one, and its direction.

    None is the PSNR of pictures that all equal their originals.
    """

    value: float | None
    higher_is_better: bool
    se: float | None = None
    params: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Pair:
    """What metrics are computed from: the measured set and the reference."""

    fake: Features
    real: Features | None
    statistics: Statistics | None
    prompts: Sequence[str]
    k: int
    seed: int
    jackknife: bool
    progress: bool

    def rows(self, tap: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of the reference and of the measured set."""
        assert self.real is not None  # refused before the pass
        return self.real.rows[tap], self.fake.rows[tap]

    @property
    def order(self) -> np.ndarray:
        """Of the measured pictures, so that picture i is in part i mod BLOCKS."""
        rank = np.empty(self.fake.count, np.int64)
        for block in range(BLOCKS):
            members = np.flatnonzero(self.fake.part == block)
            rank[members] = np.arange(len(members)) * BLOCKS + block
        return np.argsort(rank)

    def error(self, name: str, without: Callable[[], Iterable[float]]) -> float | None:
        """Of a figure's values without each of the BLOCKS parts of the measured set.

        Unlike the bootstrap's, whose duplicates bias distances upwards.
        """
        if not self.jackknife or self.fake.count < 2 * BLOCKS:
            return None
        bar = tqdm(without(), desc=f"{name} error", total=BLOCKS, disable=not self.progress)
        return pairwise.jackknife_error(np.array(list(bar)))


def mean_value(scores: np.ndarray, clusters: Sequence[Any], **params: Any) -> Value:
    """Mean over the pictures; the error counts pictures of one cluster (prompt) as one draw."""
    scores = scores.astype(np.float64)
    mean = float(scores.mean())
    sums: dict[Any, float] = {}
    for cluster, score in zip(clusters, scores, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + score - mean
    squares, count = np.array(list(sums.values())) ** 2, len(sums)
    se = None  # also of scores that are all the same: no spread was seen, which is not none
    if count > 1 and np.ptp(scores) > 0:
        se = float(np.sqrt(count / (count - 1) * squares.sum()) / len(scores))
    return Value(mean, True, se, params)


def _frechet(name: str, tap: str, *, paired: bool = False) -> Metric:
    def compute(pair: Pair) -> dict[str, Value]:
        assert pair.statistics is not None
        if tap not in pair.statistics.values:
            raise UserError(f"{pair.statistics.name} has no statistics of the {tap} features")
        mean, covariance = pair.statistics.values[tap]
        whole = pair.fake.moments(tap)
        if len(mean) != len(whole.mean):
            raise UserError(
                f"{pair.statistics.name} has {len(mean)} {tap} features, the network "
                f"{len(whole.mean)}"
            )

        def distance(moments: Moments) -> float:
            return frechet_distance(mean, covariance, moments.mean, moments.covariance)

        blocks = pair.fake.blocks[tap]
        se = pair.error(name, lambda: (distance(whole.without(block)) for block in blocks))
        return {name: Value(distance(whole), False, se)}

    return Metric(tap, compute, moments=True, reference=True, paired=paired)


def _inception(pair: Pair) -> dict[str, Value]:
    parts = pair.fake.probabilities
    whole = SplitProbabilities.sum(parts)
    mean, std = whole.score()
    se = pair.error("isc", lambda: (whole.without(part).score()[0] for part in parts))
    return {"isc": Value(mean, True, se, {"splits": len(whole.counts), "std_over_splits": std})}


def _pairwise(tap: str, suffix: str) -> dict[str, Metric]:
    """KID, neighbours and Vendi score on one kind of features."""

    def kernel(pair: Pair) -> dict[str, Value]:
        real, fake = pair.rows(tap)
        mean, std = pairwise.kernel_distance_subsets(real, fake, seed=pair.seed)
        size = min(1000, len(real), len(fake))
        params = {"subsets": 100, "subset_size": size, "std": std}
        error, se = None, None
        if pair.jackknife and len(fake) >= 2 * BLOCKS:
            error = pairwise.kernel_distance_error(real, fake[pair.order], BLOCKS)
            # The subsets share the set: their spread alone would forget the set's own.
            se = float(np.hypot(error, std / 10))
        return {
            f"kid{suffix}": Value(mean, False, se, params),
            f"kid_full{suffix}": Value(pairwise.kernel_distance(real, fake), False, error),
        }

    def neighbours(pair: Pair) -> dict[str, Value]:
        found = pairwise.precision_recall(*pair.rows(tap), k=pair.k)
        errors = {
            "precision": found.precision_error or None,
            "density": found.density_error or None,
        }
        return {
            f"{name}{suffix}": Value(getattr(found, name), True, errors.get(name), {"k": pair.k})
            for name in ("precision", "recall", "density", "coverage")
        }

    def vendi(pair: Pair) -> dict[str, Value]:
        name, rows = f"vendi{suffix}", pair.fake.rows[tap]
        se = pair.error(name, lambda: pairwise.vendi_without(rows[pair.order], BLOCKS))
        return {name: Value(pairwise.vendi_score(rows), True, se)}

    return {
        f"kid{suffix}": Metric(tap, kernel, rows=True, reference=True),
        f"prc{suffix}": Metric(tap, neighbours, rows=True, reference=True),
        f"vendi{suffix}": Metric(tap, vendi, rows=True),
    }


def _cmmd(pair: Pair) -> dict[str, Value]:
    """Jayasumana et al., arXiv 2401.09603: its biased form, and the unbiased one beside it."""
    params = {"sigma": CMMD_SIGMA, "scale": CMMD_SCALE}
    real, fake = pair.rows("cmmd")
    found = pairwise.rbf_distance(real, fake, sigma=CMMD_SIGMA)
    se = None
    if pair.jackknife and len(fake) >= 2 * BLOCKS:
        error = pairwise.rbf_distance_error(real, fake[pair.order], BLOCKS, sigma=CMMD_SIGMA)
        se = CMMD_SCALE * error
    names = ("cmmd", "cmmd_unbiased")
    return {
        name: Value(CMMD_SCALE * value, False, se, params)
        for name, value in zip(names, found, strict=True)
    }


def _clip(pair: Pair) -> dict[str, Value]:
    """The published conventions of CLIPScore; see `scores.clip_scores`."""
    cosines = pair.fake.rows["cosine"][:, 0].astype(np.float64)
    values = clip_scores(cosines)
    cosine = mean_value(cosines, pair.prompts)
    positive = mean_value(2.5 * cosines.clip(min=0), pair.prompts)
    errors = {
        "clipscore_w2.5": positive.se,
        "clip_x100": None if cosine.se is None else 100 * cosine.se,
        "clip_cosine": cosine.se,
    }
    params = {"negative": int((cosines < 0).sum())}
    return {name: Value(value, True, errors[name], params) for name, value in values.items()}


def _psnr(pair: Pair) -> dict[str, Value]:
    """On [0, 1] after rounding to uint8; pictures equal to their original are counted apart."""
    errors = pair.fake.rows["mse"][:, 0]
    differing = errors[errors > 0]
    params: dict[str, Any] = {"infinite": len(errors) - len(differing)}
    if not len(differing):  # JSON has no infinity
        return {"psnr": Value(None, True, None, params)}
    # Papers on tokenizers report the mean of the pictures' values, torchmetrics' class this one.
    params["of_pooled_error"] = float(psnr(errors.mean(keepdims=True))[0])
    return {"psnr": mean_value(psnr(differing), range(len(differing)), **params)}


def _mean_of(name: str, higher_is_better: bool = True) -> Callable[[Pair], dict[str, Value]]:
    """A score of each picture, averaged; by prompt, where there are prompts."""

    def compute(pair: Pair) -> dict[str, Value]:
        scores = pair.fake.rows[name][:, 0]
        params = {"prompts": len(set(pair.prompts))} if pair.prompts else {}
        found = mean_value(scores, pair.prompts or range(len(scores)), **params)
        return {name: Value(found.value, higher_is_better, found.se, found.params)}

    return compute


def scored(name: str) -> Metric:
    """The mean of a scorer over the pictures."""
    return Metric(name, _mean_of(name), rows=True, prompts=name in SCORERS)


METRICS: dict[str, Metric] = {
    "fid": _frechet("fid", "pool"),
    "sfid": _frechet("sfid", "spatial"),
    "rfid": _frechet("rfid", "pool", paired=True),
    "isc": Metric("logits", _inception),
    **_pairwise("pool", ""),
    "cmmd": Metric("cmmd", _cmmd, rows=True, reference=True),
    "clip": Metric("cosine", _clip, rows=True, prompts=True),
    **{f"fd_{space}": _frechet(f"fd_{space}", space) for space in SPACES},
    **{name: m for space in SPACES for name, m in _pairwise(space, f"_{space}").items()},
    "psnr": Metric("mse", _psnr, rows=True, paired=True),
    **{
        name: Metric(name, _mean_of(name, name != "lpips"), rows=True, paired=True)
        for name in PAIRED
        if name != "psnr"
    },
    **{name: scored(name) for name in SCORERS},
}
