"""Scores that are means over images: Inception score, CLIPScore, benchmark aggregates."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import UserError
from nextscale.eval.frechet import Array, as_float64


@dataclass
class SplitProbabilities:
    """Sums for the Inception score by splits of the set, whatever the batches.

    Attributes:
        marginal: Sum of p(y|x), [splits, classes], float64.
        negentropy: Sum of sum_y p log p, [splits].
        counts: Pictures per split.
    """

    marginal: Float[Tensor, "s v"]
    negentropy: Float[Tensor, " s"]
    counts: Float[Tensor, " s"]

    @classmethod
    def empty(cls, splits: int, classes: int) -> SplitProbabilities:
        """No pictures yet."""
        zero = torch.zeros(splits, dtype=torch.float64)
        return cls(torch.zeros(splits, classes, dtype=torch.float64), zero, zero.clone())

    def add(self, logits: Tensor, splits: np.ndarray) -> None:
        """Pictures, and the split that each belongs to."""
        log_p = logits.cpu().double().log_softmax(dim=1)
        p, index = log_p.exp(), torch.from_numpy(splits)
        self.marginal.index_add_(0, index, p)
        self.negentropy.index_add_(0, index, (p * log_p).sum(dim=1))
        self.counts.index_add_(0, index, torch.ones(len(splits), dtype=torch.float64))

    def merge(self, other: SplitProbabilities) -> SplitProbabilities:
        """Sums of both."""
        return SplitProbabilities(
            self.marginal + other.marginal,
            self.negentropy + other.negentropy,
            self.counts + other.counts,
        )

    @classmethod
    def sum(cls, parts: Sequence[SplitProbabilities]) -> SplitProbabilities:
        """Of one part or more."""
        return functools.reduce(lambda a, b: a.merge(b), parts)

    def without(self, part: SplitProbabilities) -> SplitProbabilities:
        """Less the sums of a part."""
        return SplitProbabilities(
            self.marginal - part.marginal,
            self.negentropy - part.negentropy,
            self.counts - part.counts,
        )

    def score(self) -> tuple[float, float]:
        """Mean and population standard deviation over the splits that have pictures."""
        filled = self.counts > 0
        counts = self.counts[filled]
        # `without` may round below 0.
        mean = (self.marginal[filled] / counts[:, None]).clamp(min=0)
        entropy = -torch.special.xlogy(mean, mean).sum(dim=1)
        values = (self.negentropy[filled] / counts + entropy).exp()
        return float(values.mean()), float(values.std(correction=0))


def inception_score(logits: Array, splits: int = 10) -> tuple[float, float]:
    """Exp of the mean KL(p(y|x) || p(y)), per split.

    Salimans et al., arXiv 1606.03498. Splits are consecutive rows as given, with borders
    floor(i N / splits): torch-fidelity's, and ADM's where N divides. Shuffle before if the rows are
    sorted by class.

    Args:
        logits: [n, classes]; the published figures use Inception's without the bias of its last
            layer.
        splits: How many.

    Returns:
        Mean and population standard deviation over the splits; each value in [1, classes].

    Raises:
        UserError: If there are fewer rows than splits.
    """
    rows = as_float64(logits)
    if not 1 <= splits <= len(rows):
        raise UserError(f"splits is {splits}, but must lie in 1..{len(rows)}, the number of images")
    sums = SplitProbabilities.empty(splits, rows.shape[1])
    sums.add(rows, consecutive_splits(len(rows), splits))
    return sums.score()


def consecutive_splits(count: int, splits: int) -> np.ndarray:
    """The split of each of `count` rows, int64 [count]; borders lie at floor(i count / splits)."""
    borders = [(i + 1) * count // splits for i in range(splits)]
    return np.searchsorted(borders, np.arange(count), side="right")


def clip_scores(cosines: Array) -> dict[str, float]:
    """The three published conventions of CLIPScore, from raw cosines of image and text.

    Args:
        cosines: [n], each in [-1, 1].

    Returns:
        `clipscore_w2.5`: mean of 2.5 max(cos, 0) (Hessel et al., arXiv 2104.08718); `clip_x100`:
        100 max(mean cos, 0), torchmetrics' clamp after the mean; `clip_cosine`: the mean.
    """
    values = as_float64(cosines)
    mean = float(values.mean())
    return {
        "clipscore_w2.5": 2.5 * float(values.clamp(min=0).mean()),
        "clip_x100": 100 * max(mean, 0.0),
        "clip_cosine": mean,
    }


def geneval_aggregate(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """GenEval's figures from the rows of its evaluation (Ghosh et al., arXiv 2310.11513).

    Args:
        rows: Per image `tag` (the task), `correct`, and `prompt_id` or else `prompt`.

    Returns:
        `tasks`: accuracy per task; `score`: their mean, the published one; `image_accuracy` over
        all images; `prompt_accuracy`: share of prompts with any correct image.
    """
    tasks: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(bool(row["correct"]))
        prompt = row["prompt"] if row.get("prompt_id") is None else row["prompt_id"]
        prompts[row["tag"], prompt].append(bool(row["correct"]))
    if not tasks:
        raise UserError("there are no GenEval rows to aggregate")
    accuracy = {task: float(np.mean(values)) for task, values in tasks.items()}
    return {
        "tasks": accuracy,
        "score": float(np.mean(list(accuracy.values()))),
        "image_accuracy": float(np.mean([v for values in tasks.values() for v in values])),
        "prompt_accuracy": float(np.mean([any(values) for values in prompts.values()])),
    }
