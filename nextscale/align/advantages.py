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

SCALES = ("group", "batch", "none", "beta_norm")
BASELINES = ("mean", "median", "score_norm")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_MOST_WEIGHT = 1e6
_FLAT = 1e-6  # deviation below which a group's rewards are all the same


def group_advantages(
    rewards: Float[Tensor, " b"],
    groups: Int[Tensor, " b"],
    *,
    scale_rewards: str = "group",
    std_eps: float = 1e-4,
    std_ddof: int = 1,
    baseline: str = "mean",
    score_norms: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """A_i = (r_i - mean_group r) / (std + std_eps) (GRPO, arXiv 2402.03300, section 4.1).

    Args:
        rewards: One per sample; NaN is unscorable.
        groups: Group of each sample, 0 .. number of groups - 1, in any order.
        scale_rewards: group divides by the group's deviation, batch by that of all rewards, none
            by nothing (Dr. GRPO, arXiv 2503.20783), beta_norm by a Beta density (see `beta_norm`).
        std_eps: 1e-4 in trl and Flow-GRPO, 1e-6 in DDPO.
        std_ddof: 1 is the unbiased deviation (trl), 0 the population's (DDPO, Flow-GRPO).
        baseline: What is subtracted: the group's mean, its median (GBPO), or score_norm, the mean
            weighted by `score_norms`, which has the least variance of all constants (OBLR-PO,
            without its learning rate by the gradient's signal over noise).
        score_norms: Of score_norm: squared norms of each sample's score, or a proxy of them.
    """
    require("scale_rewards", scale_rewards, scale_rewards in SCALES, f"be one of {SCALES}")
    require("baseline", baseline, baseline in BASELINES, f"be one of {BASELINES}")
    mean, std = group_moments(rewards, groups, std_ddof)
    if scale_rewards == "beta_norm":
        return beta_norm(rewards, groups)
    if baseline == "median":
        mean = torch.stack([rewards[groups == g].nanquantile(0.5) for g in range(len(mean))])
    elif baseline == "score_norm":
        if score_norms is None:
            raise UserError("baseline score_norm needs score_norms, one per sample")
        # of differences from the mean: equal rewards must leave none, by rounding neither
        mean = mean + _weighted_means(rewards - mean[groups], score_norms, groups)
    centred = rewards - mean[groups]
    if scale_rewards == "group":
        centred = centred / (std[groups] + std_eps)
    elif scale_rewards == "batch":
        centred = centred / (_std(rewards[~rewards.isnan()], std_ddof) + std_eps)
    return centred.nan_to_num(0.0, 0.0, 0.0)


def beta_norm(rewards: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """A = (r - p) / Beta(p; alpha, beta), p the group's mean (BNPO, arXiv 2506.02864).

    With mean m and unbiased variance v of p, over groups with a reward: a = (m (1 - m) / v - 1) m,
    b the same with 1 - m; alpha = max(1, 1 + a / 3), beta = max(1, 1 + b / 3). 1 / density is at
    most 1e6. Where the p are all alike, and for a single group, the density is 1. Left out: the sum
    of several rewards' advantages. trl's loss_type bnpo is something else.

    Args:
        rewards: In [0, 1]; NaN is unscorable.
        groups: Group of each sample.

    Raises:
        UserError: For rewards out of [0, 1].
    """
    known = rewards[~rewards.isnan()]
    fits = bool(((known >= 0) & (known <= 1)).all())
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    require("beta_norm's rewards", f"{low:g} to {high:g}", fits, "lie in [0, 1]")
    values = rewards.double()  # densities of nearly equal means cancel
    means = group_moments(values, groups, 1)[0]
    drawn = means[groups[~values.isnan()].unique()]
    m, v = drawn.mean(), drawn.var() if len(drawn) > 1 else means.new_zeros(())
    if float(v) <= _FLAT**2:
        return (values - means[groups]).nan_to_num(0.0).to(rewards)
    spread = m * (1 - m) / v - 1
    alpha, beta = ((1 + spread * x / 3).clamp_min(1.0) for x in (m, 1 - m))
    inside = means.clamp(1e-12, 1 - 1e-12)
    density = torch.distributions.Beta(alpha, beta).log_prob(inside)
    weight = (-density).exp().clamp_max(_MOST_WEIGHT)
    return ((values - means[groups]) * weight[groups]).nan_to_num(0.0).to(rewards)


def _weighted_means(values: Tensor, weights: Tensor, groups: Tensor) -> Float[Tensor, " g"]:
    """Means of the values that are numbers, by weight."""
    weights = torch.where(values.isnan(), 0.0, weights)
    zeros = values.new_zeros(int(groups.max()) + 1)
    sums = zeros.index_add(0, groups, values.nan_to_num(0.0) * weights)
    return sums / zeros.index_add(0, groups, weights).clamp_min(1e-12)


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
