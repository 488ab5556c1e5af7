"""From rewards to advantages: how much better a sample is than its siblings.

Rewards that are NaN are unscorable: they count in no mean and no deviation, and their advantage
is 0. A group is the samples of one prompt of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.errors import UserError, require

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_FLAT = 1e-6  # deviation below which a group's rewards are all the same


def group_advantages(
    rewards: Float[Tensor, " b"],
    groups: Int[Tensor, " b"],
    *,
    scale_rewards: str = "group",
    std_eps: float = 1e-4,
    std_ddof: int = 1,
) -> Float[Tensor, " b"]:
    """A_i = (r_i - mean_group r) / (std + std_eps) (GRPO, arXiv 2402.03300, section 4.1).

    Args:
        rewards: One per sample; NaN is unscorable.
        groups: Group of each sample, 0 .. number of groups - 1, in any order.
        scale_rewards: group divides by the group's deviation, batch by that of all rewards, none
            by nothing (Dr. GRPO, arXiv 2503.20783).
        std_eps: 1e-4 in trl and Flow-GRPO, 1e-6 in DDPO.
        std_ddof: 1 is the unbiased deviation (trl), 0 the population's (DDPO, Flow-GRPO).
    """
    require("scale_rewards", scale_rewards, scale_rewards in SCALES, f"be one of {SCALES}")
    mean, std = group_moments(rewards, groups, std_ddof)
    centred = rewards - mean[groups]
    if scale_rewards == "group":
        centred = centred / (std[groups] + std_eps)
    elif scale_rewards == "batch":
        centred = centred / (_std(rewards[~rewards.isnan()], std_ddof) + std_eps)
    return centred.nan_to_num(0.0, 0.0, 0.0)


def combined_advantages(
    rewards: Float[Tensor, "b k"],
    weights: Sequence[float],
    groups: Int[Tensor, " b"],
    *,
    multi_objective_aggregation: str = "sum_then_normalize",
    scale_rewards: str = "group",
    std_eps: float = 1e-4,
    std_ddof: int = 1,
) -> Float[Tensor, " b"]:
    """Advantages of several rewards.

    Args:
        rewards: One column per reward. With sum_then_normalize a sample is unscorable if any of
            its rewards is; with normalize_then_sum only that reward drops out.
        weights: One per reward.
        groups: Group of each sample.
        multi_objective_aggregation: sum_then_normalize: the weighted sum is one reward.
            normalize_then_sum (GDPO, arXiv 2601.05242): each reward is normalised in its group, the
            weighted sum over the batch; `scale_rewards` is then without effect.
        scale_rewards: See `group_advantages`.
        std_eps: See `group_advantages`.
        std_ddof: See `group_advantages`.
    """
    mode = multi_objective_aggregation
    require("multi_objective_aggregation", mode, mode in AGGREGATIONS, f"be one of {AGGREGATIONS}")
    if rewards.ndim != 2 or rewards.shape[1] != len(weights):
        raise UserError(
            f"rewards must be [B, {len(weights)}], one column per reward weight, got "
            f"{list(rewards.shape)}"
        )
    factors = torch.tensor(weights, dtype=rewards.dtype, device=rewards.device)
    if mode == "sum_then_normalize":
        return group_advantages(
            (rewards * factors).sum(1),
            groups,
            scale_rewards=scale_rewards,
            std_eps=std_eps,
            std_ddof=std_ddof,
        )
    options = {"scale_rewards": "group", "std_eps": std_eps, "std_ddof": std_ddof}
    each = [group_advantages(column, groups, **options) for column in rewards.unbind(1)]
    total = (torch.stack(each, dim=1) * factors).sum(1)
    return (total - total.mean()) / (_std(total, std_ddof) + std_eps)


def soft_mean(
    rewards: Float[Tensor, "b k"], temperature: float, dim: int = -1
) -> Float[Tensor, " b"]:
    """V = tau log mean exp(r / tau): the value of a prefix from K completions of it.

    The middle-return value of VAR-RL (arXiv 2601.02256); tau -> infinity is the mean, tau -> 0 the
    best. Completions that are NaN do not count; a prefix without any has NaN.
    """
    require("temperature", temperature, temperature > 0, "be above 0")
    valid = ~rewards.isnan()
    scaled = torch.where(valid, rewards / temperature, -torch.inf)
    count = valid.sum(dim).to(rewards.dtype)
    value = temperature * (scaled.logsumexp(dim) - count.log())
    return torch.where(count > 0, value, torch.nan)


def informative(advantages: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Which samples belong to a group whose rewards differ; the others give no gradient."""
    largest = advantages.new_zeros(int(groups.max()) + 1)
    largest.scatter_reduce_(0, groups, advantages.abs(), "amax")
    return (largest > _FLAT)[groups]


def group_moments(
    rewards: Float[Tensor, " b"], groups: Int[Tensor, " b"], ddof: int
) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
    """Mean and deviation of every group without its NaNs; 0 where there are too few.

    The deviation of equal rewards is 0, not what rounding leaves of it.
    """
    valid = ~rewards.isnan()
    zeros = rewards.new_zeros(int(groups.max()) + 1)
    counts = zeros.index_add(0, groups, valid.to(rewards))
    mean = zeros.index_add(0, groups, rewards.nan_to_num(0.0)) / counts.clamp_min(1)
    low = zeros.scatter_reduce(0, groups[valid], rewards[valid], "amin", include_self=False)
    high = zeros.scatter_reduce(0, groups[valid], rewards[valid], "amax", include_self=False)
    mean = torch.where(low == high, low, mean)
    squares = torch.where(valid, rewards - mean[groups], 0.0).square()
    variance = zeros.index_add(0, groups, squares) / (counts - ddof).clamp_min(1)
    return mean, variance.sqrt()


def _std(values: Tensor, ddof: int) -> Tensor:
    if len(values) <= ddof:
        return values.new_zeros(())
    return values.std(correction=ddof)
