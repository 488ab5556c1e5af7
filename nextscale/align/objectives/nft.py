"""Negative-aware fine-tuning: likelihood of good samples, and of what bad ones leave over."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import require

_LEAST = 1e-3  # of the implicit negative policy's ratio
_LEAST_ERROR = 1e-5


def nft_loss(
    logps: Float[Tensor, "b u"],
    old_logps: Float[Tensor, "b u"],
    positive: Float[Tensor, " b"],
    accuracy: Float[Tensor, " b"],
    mask: Tensor | None = None,
    *,
    weighted: bool = False,
) -> Float[Tensor, ""]:
    """NFT (arXiv 2505.18116): a negative sample raises the policy that is left without negatives.

    With q the share of positives of a prompt: positives -log rho, negatives
    -log max((1 - q rho) / (1 - q), 1e-3), mean over units and samples. On policy its gradient is
    that of GRPO with advantages of 1 and -q / (1 - q).

    Differences from the released code: below the floor there is no gradient, where it hands the
    gradient through; ratios of positives have no floor, q is not held in [0.02, 0.98], negatives
    have no weight of their own, and the mean is over units, not a sum over 1000. Its weights of
    prompts are 1 - q or sqrt((1 - q) / q), which makes the on-policy gradient that of GRPO with
    normalised advantages; `weighted` is the ratio without the root.

    Args:
        logps: Under the current policy.
        old_logps: Under the policy that drew the samples.
        positive: 1 for samples that count as right, 0 for others.
        accuracy: q of each sample's prompt, in (0, 1); other prompts teach nothing and are to be
            left out.
        mask: [B, U], bool or weights of 0 or more.
        weighted: Multiply each sample by (1 - q) / q: hard prompts count more.
    """
    mask = torch.ones_like(logps) if mask is None else mask.to(logps)
    ratio = (logps - old_logps).exp()
    share = accuracy[:, None]
    rest = ((1 - share * ratio) / (1 - share)).clamp_min(_LEAST)
    loss = torch.where(positive[:, None] > 0, old_logps - logps, -rest.log())
    if weighted:
        loss = loss * (1 - share) / share
    return ((loss * mask).sum(1) / mask.sum(1).clamp_min(1e-12)).mean()


def diffusion_nft_loss(
    errors: Float[Tensor, "b ..."],
    old_errors: Float[Tensor, "b ..."],
    share: Float[Tensor, " b"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, " b"]:
    """DiffusionNFT (arXiv 2509.16117): the forward process learns from good and bad samples.

    With d = x - x0, x the clean sample that is predicted from a noised x_t:
    d+ = beta d + (1 - beta) sg[d_old], d- = (1 + beta) sg[d_old] - beta d;
    L = (r e(d+) + (1 - r) e(d-)) / beta, e(d) = mean d^2 / sg[mean |d|].

    The paper writes velocities v of flow matching, x = x_t - t v; mixing them is mixing errors.

    Args:
        errors: d of the policy.
        old_errors: Of the policy that drew the samples; the same x_t.
        share: r in [0, 1], how good each sample is; 1/2 teaches nothing on policy.
        beta: Strength of the implicit policies, (0, 1] in the paper: 1, or 0.1 for several rewards.

    Returns:
        One loss per sample.
    """
    require("beta", beta, beta > 0, "be above 0")
    old = old_errors.detach()
    good = _scaled(beta * errors + (1 - beta) * old)
    bad = _scaled((1 + beta) * old - beta * errors)
    return (share * good + (1 - share) * bad) / beta


def _scaled(errors: Tensor) -> Float[Tensor, " b"]:
    errors = errors.flatten(1)
    scale = errors.detach().abs().mean(1).clamp_min(_LEAST_ERROR)
    return errors.square().mean(1) / scale
