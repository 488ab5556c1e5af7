"""How far one policy is from another: estimators from log-ratios, and exact forms.

h = log pi - log ref at samples of pi. In expectation k1 and k3 are KL(pi || ref), k2 is not; but
the gradient of k2 under on-policy sampling is that of the KL, as is that of rho k3 (methods of
Schulman's note "Approximating KL divergence", 2020).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def k1(h: Tensor) -> Tensor:
    """H."""
    return h


def k2(h: Tensor) -> Tensor:
    """h^2 / 2."""
    return h.square() / 2


def k3(h: Tensor) -> Tensor:
    """exp(-h) - 1 + h, never negative."""
    return torch.exp(-h) + h - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def categorical_kl(
    log_p: Float[Tensor, "*n v"], log_q: Float[Tensor, "*n v"]
) -> Float[Tensor, " *n"]:
    """Sum over the vocabulary of p (log p - log q), nats; codes with p = 0 count nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


def gaussian_kl(
    mean: Float[Tensor, "b ..."], other_mean: Float[Tensor, "b ..."], std: Tensor
) -> Float[Tensor, " b"]:
    """Mean over dimensions of (mu - mu')^2 / (2 std^2), nats per dimension, of equal deviations.

    Flow-GRPO's code divides by g^2 instead of std^2 = -g^2 dt: its beta is in other units.
    """
    return ((mean - other_mean).square() / (2 * std**2)).flatten(1).mean(1)
