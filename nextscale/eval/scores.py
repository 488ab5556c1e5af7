"""Scores that are means over images: Inception score, CLIPScore, benchmark aggregates."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nextscale.errors import UserError
from nextscale.eval.frechet import Array, as_float64


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
    log_p = as_float64(logits).log_softmax(dim=1)
    count = len(log_p)
    if not 1 <= splits <= count:
        raise UserError(f"splits is {splits}, but must lie in 1..{count}, the number of images")
    borders = [i * count // splits for i in range(splits + 1)]
    values = []
    for start, stop in itertools.pairwise(borders):
        part = log_p[start:stop]
        marginal = part.logsumexp(dim=0) - np.log(stop - start)
        values.append(float(((part.exp() * (part - marginal)).sum(dim=1)).mean().exp()))
    return float(np.mean(values)), float(np.std(values))


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
        prompts[row["tag"], row.get("prompt_id") or row["prompt"]].append(bool(row["correct"]))
    if not tasks:
        raise UserError("there are no GenEval rows to aggregate")
    accuracy = {task: float(np.mean(values)) for task, values in tasks.items()}
    return {
        "tasks": accuracy,
        "score": float(np.mean(list(accuracy.values()))),
        "image_accuracy": float(np.mean([v for values in tasks.values() for v in values])),
        "prompt_accuracy": float(np.mean([any(values) for values in prompts.values()])),
    }
