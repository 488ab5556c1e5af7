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
    predicted: Float[Tensor, "b ..."],
    old: Float[Tensor, "b ..."],
    clean: Float[Tensor, "b ..."],
    share: Float[Tensor, " b"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, " b"]:
    """DiffusionNFT (arXiv 2509.16117): the forward process learns from good and bad samples.

    x+ = beta x + (1 - beta) sg[x_old], x- = (1 + beta) sg[x_old] - beta x;
    L = (r e(x+) + (1 - r) e(x-)) / beta, e(y) = mean (y - x0)^2 / sg[mean |y - x0|].

    The paper writes velocities v of flow matching, x = x_t - t v; both are linear, so predictions
    of the clean sample serve any parametrisation alike.

    Args:
        predicted: Clean samples x that the policy predicts from a noised x_t.
        old: Those that the policy predicted which drew the samples; the same x_t.
        clean: The samples x0.
        share: r in [0, 1], how good each sample is; 1/2 teaches nothing on policy.
        beta: Strength of the implicit policies, (0, 1] in the paper: 1, or 0.1 for several rewards.

    Returns:
        One loss per sample.
    """
    require("beta", beta, beta > 0, "be above 0")
    old = old.detach()
    good = _error(beta * predicted + (1 - beta) * old, clean)
    bad = _error((1 + beta) * old - beta * predicted, clean)
    return (share * good + (1 - share) * bad) / beta


def _error(predicted: Tensor, clean: Tensor) -> Float[Tensor, " b"]:
    difference = (predicted - clean).flatten(1)
    scale = difference.detach().abs().mean(1).clamp_min(_LEAST_ERROR)
    return difference.square().mean(1) / scale
