"""Rewards of a rollout as columns of numbers, one per reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.rewards.reward import (
    AnyReward,
    Metadata,
    PairwiseReward,
    Prompts,
    SetReward,
    as_reward,
    call,
    numbers,
)
from nextscale.errors import UserError


def score(
    rewards: Sequence[AnyReward],
    images: Float[Tensor, "b 3 h w"],
    prompts: Prompts,
    metadata: Metadata = (),
) -> tuple[Float[Tensor, "b k"], dict[str, Tensor]]:
    """Score pictures by several rewards.

    Args:
        rewards: K of them. Columns of set rewards and pairwise rewards are NaN: they need the
            samples of all processes (`set_column`), or the groups (`pairwise_column`).
        images: In [0, 1].
        prompts: Texts or class labels, one per picture.
        metadata: One mapping per picture, or none.

    Returns:
        One column per reward, and the rewards' extra columns as "NAME/EXTRA".
    """
    metadata = metadata or [{} for _ in prompts]
    columns, extra = [], {}
    for reward in rewards:
        if isinstance(reward, SetReward | PairwiseReward):
            columns.append(images.new_full((len(images),), math.nan, dtype=torch.float32))
            continue
        output = as_reward(reward)(images, prompts, metadata)
        columns.append(output.values)
        extra |= {f"{reward.name}/{key}": value for key, value in output.extra.items()}
    return torch.stack(columns, dim=1), extra


def set_features(
    reward: SetReward, images: Float[Tensor, "b 3 h w"], prompts: Prompts
) -> Float[Tensor, "b d"]:
    """Features of this process's pictures for a set reward, to be gathered.

    Raises:
        UserError: With exit code 1, if the reward raises or returns anything but finite [B, d].
    """
    found = call(reward.name, reward.features, images, prompts)
    what = f"one row of finite features per picture, [{len(images)}, d]"
    found = numbers(f'the reward "{reward.name}"', found, (len(images), None), what)
    if not bool(found.isfinite().all()):
        raise UserError(
            f'the reward "{reward.name}" must return {what}; {int((~found.isfinite()).sum())} are '
            "not finite",
            exit_code=1,
        )
    return found


def set_column(reward: SetReward, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """A set reward as a column: each row's contribution times n, float32.

    The contribution of one of n rows is of the order of 1 / n of the set's score; times n it weighs
    beside rewards of single pictures as the score itself would.

    Args:
        reward: A set reward.
        features: Of `set_features`, gathered from all processes.

    Raises:
        UserError: With exit code 1, if the reward raises or returns anything but [n] numbers.
    """
    found = call(reward.name, reward.contributions, features)
    what = f"one finite contribution per row, [{len(features)}]"
    found = numbers(f'the reward "{reward.name}"', found, (len(features),), what)
    if bool(found.isinf().any()):
        raise UserError(f'the reward "{reward.name}" must return {what}; got inf', exit_code=1)
    return found.float() * len(features)


def set_score(reward: SetReward, features: Float[Tensor, "n d"]) -> float:
    """A set reward of the whole set.

    Raises:
        UserError: With exit code 1, if the reward raises or returns anything but a number.
    """
    found = call(reward.name, reward.score_set, features)
    return float(numbers(f'the reward "{reward.name}"', found, (), "one number for a whole set"))


def preference_scores(preferences: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """r_i = mean over j != i of P(i is preferred to j) (SPO, arXiv 2401.04056).

    Args:
        preferences: Entry [i, j] is P(i > j); NaN pairs do not count.

    Returns:
        In [0, 1]; NaN for what is compared with nothing.
    """
    own = torch.eye(len(preferences), dtype=torch.bool, device=preferences.device)
    return preferences.masked_fill(own, math.nan).nanmean(dim=1)


def pairwise_column(
    reward: PairwiseReward,
    images: Float[Tensor, "b 3 h w"],
    prompts: Prompts,
    groups: Int[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """A pairwise reward as a column: `preference_scores` within each group.

    Raises:
        UserError: With exit code 1, for anything but a matrix of probabilities per group.
    """
    column = images.new_full((len(images),), math.nan, dtype=torch.float32)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        own = [prompts[row] for row in rows.tolist()]
        found = call(reward.name, reward.compare, images[rows], own)
        size = len(rows)
        what = f"a matrix [{size}, {size}] of probabilities that compares {size} pictures"
        found = numbers(f'the reward "{reward.name}"', found, (size, size), what)
        if bool(((found < 0) | (found > 1)).any()):
            raise UserError(
                f'the reward "{reward.name}" must return {what}; got values from '
                f"{float(found.min()):g} to {float(found.max()):g}",
                exit_code=1,
            )
        column[rows] = preference_scores(found.to(column))
    return column
