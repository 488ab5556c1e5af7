"""KTO: samples that are good or bad each on their own, without pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def kto_loss(
    logps: Float[Tensor, "b u"],
    ref_logps: Float[Tensor, "b u"],
    desirable: Bool[Tensor, " b"],
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight: Float[Tensor, " b"] | None = None,
    z0: float | None = None,
) -> Float[Tensor, ""]:
    """Prospect-theoretic loss (KTO, arXiv 2402.01306, equation 8).

    h = sum_u m (logp - ref), z0 = sg[max(0, mean h)];
    L = mean_i w_i (1 - sigma(+-beta (h_i - z0))), + for desirable samples, - for the others.

    Differs from the paper: the reference point z0 is the mean over given samples, not over
    mismatched pairs of prompt and sample.

    Args:
        logps: Under the policy, natural logarithm.
        ref_logps: Under the reference.
        desirable: True for good samples.
        mask: [B, U], bool or weights of 0 or more; None: every unit counts once.
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight of good samples; keep weight times number equal on both sides.
        undesirable_weight: Weight of bad samples.
        weight: Of each sample, besides; None: 1.
        z0: The reference point, 0 or more; None: that of this batch.
    """
    ratio = logps - ref_logps
    h = (ratio if mask is None else ratio * mask.to(ratio.dtype)).sum(1)
    point = h.mean().clamp_min(0).detach() if z0 is None else z0
    sign = torch.where(desirable, h.new_tensor(1.0), h.new_tensor(-1.0))
    weights = h.new_tensor(desirable_weight), h.new_tensor(undesirable_weight)
    each = torch.where(desirable, *weights)
    each = each if weight is None else each * weight
    return (each * (1 - torch.sigmoid(sign * beta * (h - point)))).mean()
