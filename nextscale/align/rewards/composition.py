"""Several rewards as one, on one scale, and the guard against rewards that are gamed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.rewards.reward import (
    CheckedReward,
    Metadata,
    Prompts,
    Reward,
    RewardOutput,
    as_reward,
)
from nextscale.errors import UserError, require

MODES = ("sum", "min", "majority")


def combine(
    columns: Float[Tensor, "b k"], weights: Sequence[float], mode: str = "sum"
) -> Float[Tensor, " b"]:
    """Make one reward of several per sample.

    To bring rewards of different scales to one first, use the aggregation normalize_then_sum of
    `combined_advantages`, which works on groups.

    Args:
        columns: One column per reward.
        weights: One per reward; one of weight 0 is only watched.
        mode: sum: sum_k w_k r_k, NaN if any is. min: the least w_k r_k, NaN if any is: all must be
            good at once. majority: 1 where rewards above one half hold more than half of the
            weight of those that are not NaN, else 0; for verdicts in [0, 1].
    """
    require("mode", mode, mode in MODES, f"be one of {', '.join(MODES)}")
    if columns.ndim != 2 or columns.shape[1] != len(weights):
        raise UserError(
            f"rewards must be [B, {len(weights)}], one column per weight, got {list(columns.shape)}"
        )
    factors = columns.new_tensor(weights)
    columns, factors = columns[:, factors != 0], factors[factors != 0]
    if not len(factors):
        return columns.new_zeros(len(columns))
    if mode == "sum":
        return (columns * factors).sum(dim=1)
    if mode == "min":
        return (columns * factors).amin(dim=1)
    voting = (~columns.isnan()) * factors
    share = ((columns > 0.5) * factors).sum(dim=1) / voting.sum(dim=1)
    return torch.where(share.isnan(), math.nan, (share > 0.5).to(columns))


def normalized(reward: Reward, scale: float, offset: float = 0.0) -> CheckedReward:
    """A reward on another scale: (r - offset) / scale. The log gets the raw value as extra "raw".

    Args:
        reward: Of single pictures.
        scale: How much becomes 1. Flow-GRPO divides PickScore by 26 and JPEG kB by 500; aesthetic
            scores end at 10; HPSv2, ImageReward, CLIP cosines and OCR are used raw.
        offset: What becomes 0.
    """
    require("scale", scale, scale > 0, "be above 0")

    def changed(
        images: Float[Tensor, "b 3 h w"], prompts: Prompts, metadata: Metadata
    ) -> RewardOutput:
        output = as_reward(reward)(images, prompts, metadata)
        extra = {**output.extra, "raw": output.values.detach()}
        return RewardOutput((output.values - offset) / scale, extra)

    low, high = ((bound - offset) / scale for bound in reward.range)
    return as_reward(
        changed,
        reward.name,
        range=(low, high),
        needs_prompt=reward.needs_prompt,
        differentiable=reward.differentiable,
    )


class Preference:
    """P(i > j) = sigma((r_i - r_j) / temperature): another reward as preferences.

    With `preference_scores` the self-play of SPO (arXiv 2401.04056): only the order of a group
    counts, by and by, and outliers do not. Differences from the paper: the preferences come from a
    reward, and so are transitive; those of people or of a model are a `PairwiseReward` of your own.
    The reward sees no metadata.

    Args:
        reward: Of single pictures.
        temperature: Difference of rewards that is a preference of 73 %.
    """

    def __init__(self, reward: Reward, temperature: float = 1.0) -> None:
        require("temperature", temperature, temperature > 0, "be above 0")
        self.name = f"preference_{reward.name}"
        self.reward, self.temperature = as_reward(reward), temperature

    def compare(self, images: Float[Tensor, "n 3 h w"], prompts: Prompts) -> Float[Tensor, "n n"]:
        """See `PairwiseReward`."""
        values = self.reward(images, prompts, [{} for _ in prompts]).values.double()
        return torch.sigmoid((values[:, None] - values[None]) / self.temperature)


class HeldOutMonitor:
    """Says when to stop, because the trained reward rises while rewards that are not trained fall.

    A guard against reward hacking; the rule is ours. Evaluations are compared with the one before.

    Args:
        patience: Evaluations in a row that must disagree.
        min_held_out: How many held-out rewards must fall; all of them, if there are fewer.
    """

    def __init__(self, patience: int = 3, min_held_out: int = 2) -> None:
        require("patience", patience, patience > 0, "be above 0")
        require("min_held_out", min_held_out, min_held_out > 0, "be above 0")
        self.patience, self.min_held_out = patience, min_held_out
        self._streak = 0
        self._train: float | None = None
        self._held_out: dict[str, float] = {}

    def update(self, train_reward: float, held_out: Mapping[str, float]) -> bool:
        """Take the means of an evaluation; True: stop.

        Args:
            train_reward: Of the reward that is trained.
            held_out: Of the others, by name. A NaN, or a name that the last evaluation did not
                have, has not fallen.
        """
        fell = sum(held_out[name] < self._held_out.get(name, -math.inf) for name in held_out)
        rose = self._train is not None and train_reward > self._train
        apart = rose and 0 < min(self.min_held_out, len(held_out)) <= fell
        self._streak = self._streak + 1 if apart else 0
        self._train, self._held_out = float(train_reward), dict(held_out)
        return self._streak >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        return {"streak": self._streak, "train": self._train, "held_out": dict(self._held_out)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._streak, self._train = int(state["streak"]), state["train"]
        self._held_out = dict(state["held_out"])


class RewardTrend:
    """Whether the reward rises from rollout to rollout, or only wanders.

    The policy gradient of a reward that cannot be learnt is noise, which Adam turns into steps of
    the usual size: the weights leave the base for nothing. The rule is ours: Student's t-test,
    one-sided, of the means of the last half of the rollouts against those of the first fifth. (A
    straight line through all of them misses a rise that is over early.)

    Args:
        least: Rollouts below which nothing is said.
    """

    def __init__(self, least: int = 20) -> None:
        require("least", least, least >= 10, "be 10 or more")
        self.least = least
        self._means: dict[int, float] = {}

    def update(self, rollout: int, reward: float) -> None:
        """Take the mean reward of a rollout, by its number; a NaN is left out."""
        if not math.isnan(reward):
            self._means[rollout] = float(reward)

    def p_value(self) -> float | None:
        """Probability that chance makes such a rise; None: too few rollouts."""
        from scipy.stats import ttest_ind

        count = len(self._means)
        if count < self.least:
            return None
        means = [mean for _, mean in sorted(self._means.items())]
        first, last = means[: count // 5], means[count // 2 :]
        if len(set(first)) == len(set(last)) == 1:
            return float(last[0] <= first[0])
        with warnings.catch_warnings():  # of rewards that are nearly all equal
            warnings.simplefilter("ignore", RuntimeWarning)
            test: Any = ttest_ind(last, first, alternative="greater")
        return float(test.pvalue)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        return {"means": sorted(self._means.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._means = dict(state["means"])
