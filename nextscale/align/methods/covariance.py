"""Clip-Cov and KL-Cov (arXiv 2505.22617): tokens that drive the entropy down, by covariance.

The paper computes them in every minibatch by the current weights; here they are those of the whole
rollout, by the policy that drew it, so that no split of the batch changes them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def covariances(
    advantages: Float[Tensor, "b u"],
    logps: Float[Tensor, "b u"],
    counted: Bool[Tensor, "b u"] | None = None,
) -> Float[Tensor, "b u"]:
    """(A - mean A)(log p - mean log p), means over the tokens that count; 0 elsewhere.

    Args:
        advantages: Of every token.
        logps: Of every token.
        counted: Which tokens count; None: all.
    """
    counted = torch.ones_like(logps, dtype=torch.bool) if counted is None else counted
    centred = [x - x[counted].mean() for x in (advantages, logps)]
    return torch.where(counted, centred[0] * centred[1], 0.0)


def highest(
    values: Float[Tensor, "b u"], share: float, counted: Bool[Tensor, "b u"]
) -> Bool[Tensor, "b u"]:
    """The share of highest values among those that count, one or more."""
    count = max(1, int(share * int(counted.sum())))
    known = torch.where(counted, values, -torch.inf).flatten()
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[known.topk(count).indices] = True
    return chosen.view_as(values) & counted


def random_between(
    values: Float[Tensor, "b u"],
    low: float,
    high: float,
    share: float,
    counted: Bool[Tensor, "b u"],
    generator: torch.Generator,
) -> Bool[Tensor, "b u"]:
    """A share of those that count, drawn from low < value < high; fewer if these are few."""
    places = (counted & (values > low) & (values < high)).flatten().nonzero()[:, 0].cpu()
    count = min(max(1, int(share * int(counted.sum()))), len(places))
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    picked = places[torch.randperm(len(places), generator=generator)[:count]]
    chosen[picked.to(values.device)] = True
    return chosen.view_as(values)
