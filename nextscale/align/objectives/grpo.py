"""GRPO and its relatives: clipped importance ratios, and what takes the place of the clip.

Symbols: l = logp - old_logp per unit (a token or a denoising step), rho = exp(l), A the advantage,
m the mask, h = logp - ref_logp. A unit's loss L is averaged by the mask as `loss_type` says.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.objectives.kl import k3
from nextscale.errors import UserError, require

LOSS_TYPES = (
    *("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),  # trl's
    *("gbpo", "gbpo_square", "mdpo"),
)
BY_SAMPLE = ("grpo", "sapo", "gbpo", "gbpo_square", "mdpo")  # averaged sample by sample
LEVELS = ("token", "sequence")
_SAPO_POSITIVE, _SAPO_NEGATIVE = 1.0, 1.05
_VESPO_POSITIVE, _VESPO_NEGATIVE = (2.0, 3.0), (3.0, 2.0)
_TINY = 1e-12


def grpo_loss(
    logps: Float[Tensor, "b u"],
    old_logps: Float[Tensor, "b u"],
    advantages: Float[Tensor, "*b_or_bu"],
    mask: Tensor | None = None,
    *,
    ref_logps: Float[Tensor, "b u"] | None = None,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    importance_sampling_level: str = "token",
    max_completion_length: float | None = None,
    use_bias_correction_kl: bool = True,
    normalizer: float | Tensor | None = None,
    mirror_step: float = 1.0,
) -> Float[Tensor, ""]:
    """The policy-gradient loss of a batch of samples (GRPO, arXiv 2402.03300; names as trl 1.16).

    L = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta KL, KL = exp(-h) + h - 1.

    | loss_type | L instead | average |
    |---|---|---|
    | grpo | | mean_i (sum_u m L / sum_u m) |
    | bnpo, dapo | | sum m L / normalizer |
    | dr_grpo | | sum m L / (B max_completion_length) |
    | cispo | -sg[min(rho, epsilon_high)] A logp | as dapo |
    | sapo | -(4 / T) sigmoid(T (rho - 1)) A, T = 1 if A > 0 else 1.05 | as grpo |
    | luspo | rho of the whole sequence | mean_i sum_u m L |
    | vespo | -sg[exp(lam + k log W - lam W)] A logp, W = exp(sum_u m l) | as dapo |
    | gbpo | abs(A) abs(rho - rho*), rho* = 1 + epsilon_high if A > 0 else 1 - epsilon | as grpo |
    | gbpo_square | abs(A) (rho - rho*)^2 | as grpo |
    | mdpo | -rho A + (rho log rho - rho + 1) / mirror_step | as grpo |

    GSPO is `loss_type="grpo", importance_sampling_level="sequence"`: rho_i = exp(mean_u l).

    gbpo is our reading of bounded policy optimisation: the best policy within the ratio's bounds is
    pi_old (1 +- epsilon) by the sign of a median-centred advantage, and the loss is the weighted
    distance to it. mdpo is mirror descent (arXiv 2005.09814): its second term has the expectation
    KL(pi || pi_old) under samples of pi_old; its schedule of step sizes is left out.

    Differences from trl: the default of `loss_type` is grpo; the mask may hold weights, which then
    count in the denominators too; bnpo takes `normalizer` like dapo.

    Args:
        logps: Under the current policy, natural logarithm.
        old_logps: Under the policy that drew the samples.
        advantages: [B], the same for every unit of a sample, or [B, U].
        mask: [B, U], bool or weights of 0 or more; None: every unit counts once.
        ref_logps: Under the reference; needed if `beta` is not 0.
        loss_type: One of the table.
        epsilon: Lower side of the clip.
        epsilon_high: Upper side; None: `epsilon`. For cispo the cap itself (5.0 is usual).
        delta: Further cap of the unclipped ratio (two-sided clip), above 1 + epsilon_high.
        beta: Weight of the KL term.
        importance_sampling_level: token, or sequence: one ratio per sample.
        max_completion_length: dr_grpo's constant; None: U.
        use_bias_correction_kl: Multiply the KL term by rho, whose gradient is then that of the
            reverse KL.
        normalizer: Sum of the mask over everything that one optimizer step sees, so that the
            gradient does not depend on how it is split; None: over this batch. grpo and sapo, which
            average sample by sample, take [B], sums over all units of each sample, where this batch
            holds only some of them, and so do gbpo and mdpo; one number has no effect on them, nor
            on dr_grpo and luspo.
        mirror_step: mdpo's step size t: the larger, the weaker the pull to the old policy.

    Raises:
        UserError: For an unknown name, or shapes that do not fit.
    """
    _check(logps, old_logps, advantages, loss_type, importance_sampling_level)
    mask = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    high = epsilon if epsilon_high is None else epsilon_high
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio = logps - old_logps
    level = "sequence" if loss_type == "luspo" else importance_sampling_level
    exponent = _mean(log_ratio, mask) if level == "sequence" else log_ratio
    ratio = exponent.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=high).detach() * advantages * logps
    elif loss_type == "sapo":
        temperature = _choose(advantages > 0, _SAPO_POSITIVE, _SAPO_NEGATIVE, logps)
        loss = -(4 / temperature) * torch.sigmoid(temperature * (ratio - 1)) * advantages
    elif loss_type == "vespo":
        loss = -_vespo_weight(log_ratio, advantages, mask).detach() * advantages * logps
    elif loss_type in ("gbpo", "gbpo_square"):
        target = _choose(advantages > 0, 1 + high, 1 - epsilon, ratio)
        distance = ratio - target
        distance = distance.square() if loss_type == "gbpo_square" else distance.abs()
        loss = advantages.abs() * distance
    elif loss_type == "mdpo":
        require("mirror_step", mirror_step, mirror_step > 0, "be above 0")
        loss = -ratio * advantages + (ratio * exponent - ratio + 1) / mirror_step
    else:
        require("delta", delta, delta is None or delta > 1 + high, f"be above {1 + high}")
        capped = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1 - epsilon, 1 + high)
        loss = -torch.minimum(capped * advantages, clipped * advantages)
    if beta:
        if ref_logps is None:
            raise UserError(f"beta is {beta}, so grpo_loss needs ref_logps; pass them or beta=0")
        kl = k3(logps - ref_logps)
        loss = loss + beta * (kl * ratio if use_bias_correction_kl else kl)
    return aggregate(
        loss.expand_as(logps),
        mask,
        loss_type,
        max_completion_length=max_completion_length,
        normalizer=normalizer,
    )


def aggregate(
    loss: Float[Tensor, "b u"],
    mask: Float[Tensor, "b u"],
    loss_type: str,
    *,
    max_completion_length: float | None = None,
    normalizer: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """The average of unit losses that belongs to a `loss_type`, see `grpo_loss`."""
    weighted = loss * mask
    if loss_type in BY_SAMPLE:
        each = mask.sum(1)
        if isinstance(normalizer, Tensor) and normalizer.ndim == 1:
            each = normalizer.to(mask)
        return (weighted.sum(1) / each.clamp_min(_TINY)).mean()
    if loss_type == "dr_grpo":
        length = loss.shape[1] if max_completion_length is None else max_completion_length
        return weighted.sum() / (len(loss) * length)
    if loss_type == "luspo":
        return weighted.sum(1).mean()
    total = mask.sum() if normalizer is None else normalizer
    return weighted.sum() / torch.as_tensor(total, dtype=loss.dtype).clamp_min(_TINY)


@torch.no_grad()
def grpo_metrics(
    logps: Float[Tensor, "b u"],
    old_logps: Float[Tensor, "b u"],
    advantages: Float[Tensor, "*b_or_bu"],
    mask: Tensor | None = None,
    *,
    ref_logps: Float[Tensor, "b u"] | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
) -> dict[str, float]:
    """What trl logs beside the loss.

    Returns:
        "clip_ratio/low_mean", "clip_ratio/high_mean" and "clip_ratio/region_mean": weighted shares
        of units (of samples, if each has one ratio) whose gradient the clip takes away, because
        A < 0 and rho < 1 - epsilon, because A > 0 and rho > 1 + epsilon_high, or either;
        "ratio/max_deviation": max |rho - 1|; "kl" with `ref_logps`: the mean of exp(-h) + h - 1,
        times rho with `use_bias_correction_kl`.
    """
    mask = torch.ones_like(logps) if mask is None else mask.to(logps.dtype)
    high = epsilon if epsilon_high is None else epsilon_high
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio = logps - old_logps
    sequence = importance_sampling_level == "sequence"
    ratio = (_mean(log_ratio, mask) if sequence else log_ratio).exp()
    weight = torch.ones_like(ratio) if sequence and advantages.shape[1] == 1 else mask
    total = weight.sum().clamp_min(_TINY)
    low = ((ratio < 1 - epsilon) & (advantages < 0)).to(weight) * weight
    over = ((ratio > 1 + high) & (advantages > 0)).to(weight) * weight
    deviation = torch.where(weight > 0, (ratio - 1).abs(), 0.0)
    metrics = {
        "clip_ratio/low_mean": float(low.sum() / total),
        "clip_ratio/high_mean": float(over.sum() / total),
        "clip_ratio/region_mean": float((low + over).sum() / total),
        "ratio/max_deviation": float(deviation.max()),
    }
    if ref_logps is not None:
        kl = k3(logps - ref_logps) * (ratio if use_bias_correction_kl else 1)
        metrics["kl"] = float((kl * mask).sum() / mask.sum().clamp_min(_TINY))
    return metrics


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Weighted mean over the units, [B, 1]."""
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(_TINY))[:, None]


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def _vespo_weight(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """phi(W) = exp(lam + k log W - lam W), the same for all units of a sample."""
    log_w = (log_ratio * mask).sum(1, keepdim=True)
    positive = advantages >= 0
    k = _choose(positive, _VESPO_POSITIVE[0], _VESPO_NEGATIVE[0], log_w)
    lam = _choose(positive, _VESPO_POSITIVE[1], _VESPO_NEGATIVE[1], log_w)
    return (lam + k * log_w - lam * log_w.exp()).exp()


def _check(logps: Tensor, old: Tensor, advantages: Tensor, loss_type: str, level: str) -> None:
    require("loss_type", loss_type, loss_type in LOSS_TYPES, f"be one of {', '.join(LOSS_TYPES)}")
    require("importance_sampling_level", level, level in LEVELS, f"be one of {', '.join(LEVELS)}")
    if logps.ndim != 2 or old.shape != logps.shape:
        raise UserError(
            f"logps and old_logps must both be [B, U], got {tuple(logps.shape)} and "
            f"{tuple(old.shape)}"
        )
    if advantages.shape not in (logps.shape, logps.shape[:1]):
        raise UserError(
            f"advantages must be [{logps.shape[0]}] or {list(logps.shape)}, "
            f"got {list(advantages.shape)}"
        )
