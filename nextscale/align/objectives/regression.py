"""Reg-GRPO: the log-ratios of a group regress on its advantages."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_EPS = 1e-8


def reg_grpo_loss(
    log_ratios: Float[Tensor, "p g"],
    advantages: Float[Tensor, "p g"],
    *,
    beta: float | None = None,
) -> Float[Tensor, ""]:
    """Mean (A - rho)^2, rho_i = (L_i - mean L) / (std L + 1e-8) in each group (arXiv 2506.07464).

    L is the mean log-ratio of a sample to the policy that drew it; deviations are the population's.
    No clip, no minimum. On policy all L are 0 and have no deviation: give beta for the first step.

    Args:
        log_ratios: L, one row per group.
        advantages: A, of the same samples.
        beta: rho_i = (L_i - mean L) / beta instead, which is defined at L = 0.
    """
    centred = log_ratios - log_ratios.mean(1, keepdim=True)
    if beta is None:
        scale = log_ratios.std(1, correction=0, keepdim=True) + _EPS
    else:
        scale = torch.full_like(centred[:, :1], beta)
    return (advantages - centred / scale).square().mean()
