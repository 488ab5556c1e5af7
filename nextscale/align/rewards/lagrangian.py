"""Rewards under constraints: weights that rise while a threshold is missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nextscale.errors import UserError, require


class Lagrangian:
    """mu_k <- max(0, mu_k + rate (threshold_k - mean reward_k)) (arXiv 2310.04373).

    The sum of the rewards without threshold by their weights, and of those with one by mu_k, is
    what is trained: a constraint that holds with room loses its weight, so that nothing is gained
    by driving its reward further up. Differences from the paper: the mu move once per rollout, by
    its mean reward; one value baseline for each reward is left out, groups are the baseline.

    Args:
        weights: One per reward; those with a threshold are where mu_k starts.
        thresholds: One per reward; None or NaN: it is no constraint.
        rate: Of the ascent in mu.

    Raises:
        UserError: If none, or every reward, has a threshold, or the numbers differ.
    """

    def __init__(
        self, weights: Sequence[float], thresholds: Sequence[float | None], rate: float = 0.1
    ) -> None:
        require("lagrangian_rate", rate, rate > 0, "be above 0")
        if len(weights) != len(thresholds):
            raise UserError(
                f"reward_thresholds has {len(thresholds)} numbers for {len(weights)} rewards; nan "
                "stands for one without a threshold"
            )
        limits = [None if t is None or math.isnan(t) else t for t in thresholds]
        if all(t is None for t in limits) or all(t is not None for t in limits):
            raise UserError(
                "reward_mode lagrangian needs rewards with a threshold and one or more without, "
                f"got {list(thresholds)}"
            )
        self.thresholds, self.rate = limits, rate
        self.weights = [float(weight) for weight in weights]

    def update(self, means: Sequence[float]) -> None:
        """Move mu by the mean rewards of a rollout; a NaN moves nothing."""
        for k, (threshold, mean) in enumerate(zip(self.thresholds, means, strict=True)):
            if threshold is not None and not math.isnan(mean):
                self.weights[k] = max(0.0, self.weights[k] + self.rate * (threshold - mean))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        return {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.weights = list(state["weights"])
