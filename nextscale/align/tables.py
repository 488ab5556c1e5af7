"""The report's figures: means before and after with their intervals, and the tables of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor


def compare(
    before: Float[Tensor, " n"],
    after: Float[Tensor, " n"],
    groups: Int[Tensor, " n"] | None,
    limits: tuple[float, float] = (-math.inf, math.inf),
    *,
    bootstrap: bool = False,
) -> dict[str, Any]:
    """Means with 95 % intervals, and their paired difference.

    Pictures of one prompt depend on each other: intervals are Student's over means of prompts, or
    percentiles of means of prompts drawn with replacement.

    Args:
        before: One value per picture; NaN on either side leaves the picture out.
        after: Of the same prompts and seeds.
        groups: Prompt of each picture; None: every value is one.
        limits: Lowest and highest value there can be; Student's intervals end there.
        bootstrap: Percentiles of 9,999 resamples, in place of Student's intervals.

    Returns:
        "before", "after" and "difference", each with value and ci95; for values of 0 and 1 also
        "mcnemar": pictures that only one side got right, and the exact two-sided p.
    """
    valid = ~(before.isnan() | after.isnan())
    if not bool(valid.any()):
        return {"before": None, "after": None, "difference": None, "n": 0}
    before, after = before[valid].double(), after[valid].double()
    groups = torch.arange(len(before)) if groups is None else groups[valid]
    found: dict[str, Any] = {
        "before": _interval(before, groups, limits, bootstrap),
        "after": _interval(after, groups, limits, bootstrap),
        "difference": _interval(
            after - before, groups, (limits[0] - limits[1], limits[1] - limits[0]), bootstrap
        ),
        "n": len(before),
    }
    binary = torch.cat([before, after])
    if bool(((binary == 0) | (binary == 1)).all()):
        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        found["mcnemar"] = {"gained": gained, "lost": lost, "p": float(p)}
    return found


def _interval(
    values: Tensor, groups: Tensor, limits: tuple[float, float], bootstrap: bool
) -> dict[str, Any]:
    """Mean and 95 % interval over means of groups."""
    numbers = groups.unique(return_inverse=True)[1]
    sums = values.new_zeros(int(numbers.max()) + 1)
    counts = sums.index_add(0, numbers, torch.ones_like(values))
    means = sums.index_add(0, numbers, values) / counts
    mean = float(values.mean())
    if len(means) < 2:
        return {"value": mean, "ci95": None}
    if bootstrap:
        drawn = stats.bootstrap((means.numpy(),), np.mean, method="percentile", rng=0)
        return {"value": mean, "ci95": [float(x) for x in drawn.confidence_interval]}
    half = float(stats.t.ppf(0.975, len(means) - 1) * means.std() / len(means) ** 0.5)
    low, high = max(mean - half, limits[0]), min(mean + half, limits[1])
    return {"value": mean, "ci95": [low, high]}


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = [
        f"{record['method']} on {record['model']}: {record['steps']} steps, "
        f"{record['minutes']} minutes; {record['images_per_prompt']} pictures per prompt.",
    ]
    if not record["reward_trend"]["kept"]:
        lines += ["", "The reward did not rise over the rollouts: the model was saved as it was."]
    for source, found in record["prompts"].items():
        title = f"{source}, {found['num_prompts']} prompts"
        lines += ["", f"| {title} | before | after | difference |", "|---|---|---|---|"]
        lines += _rows(found)
    steps = " ".join(f"{value:.3g}" for value in record["kl"]["per_step"])
    lines += ["", f"KL from the base, {record['kl']['unit']}, by scale or step: {steps}."]
    return "\n".join(lines) + "\n"


def _rows(found: dict[str, Any]) -> list[str]:
    rows, lines = dict(found["rewards"]), []
    if "vendi_within_prompt" in found:
        rows["Vendi score within prompt"] = found["vendi_within_prompt"]
    for name, row in rows.items():
        cells = [_cell(row[side]) for side in ("before", "after", "difference")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        if "mcnemar" in row:
            test = row["mcnemar"]
            cells = [f"lost {test['lost']}", f"gained {test['gained']}", f"p = {test['p']:.2g}"]
            lines.append(f"| {name}: McNemar | {' | '.join(cells)} |")
    for metric in ("fd_scenes", "fid"):
        if metric in found:
            sides = [found[metric][side] for side in ("before", "after")]
            errors = ["" if s["se"] is None else f" ± {s['se']:.3f}" for s in sides]
            cells = [f"{s['value']:.3f}{e}" for s, e in zip(sides, errors, strict=True)]
            lines.append(f"| {metric} | {cells[0]} | {cells[1]} | |")
    return lines


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["ci95"] is None:
        return f"{value['value']:.4g}"
    low, high = value["ci95"]
    return f"{value['value']:.4g} ({low:.4g} to {high:.4g})"
