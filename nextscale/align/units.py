"""Weights of units in losses: tokens of a scale, or denoising steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.trajectory import Policy
from nextscale.errors import UserError, require
from nextscale.tokenizers import ScaleSchedule


def scale_weights(
    lengths: Sequence[int], scale_weight: str | Sequence[float], alpha: float = 0.5
) -> Float[Tensor, " t"]:
    """Weight of each token in losses, coarse to fine.

    The last scale of the 256 px VAR holds 38 % of all tokens, the first a single one.

    Args:
        lengths: n_k, tokens per scale.
        scale_weight: token: 1; scale: 1 / n_k, each scale is one action (the per-action
            normalisation of VAR-RL, arXiv 2601.02256); power: n_k^-alpha; or one number per scale.
        alpha: Exponent of power.
    """
    if isinstance(scale_weight, str):
        rules = {"token": 0.0, "scale": 1.0, "power": alpha}
        known = scale_weight in rules
        require("scale_weight", scale_weight, known, "be token, scale, power or a list of numbers")
        weights = [n ** -rules[scale_weight] for n in lengths]
    else:
        weights = list(scale_weight)
        if len(weights) != len(lengths) or min(weights) < 0:
            raise UserError(
                f"scale_weight needs {len(lengths)} numbers of 0 or more, one per scale, got "
                f"{weights}"
            )
    return torch.tensor(weights).repeat_interleave(torch.tensor(lengths))


def trained_weights(
    policy: Policy, scale_weight: str | Sequence[float], alpha: float = 0.5
) -> Float[Tensor, " u"]:
    """`scale_weights` of a policy's units, 0 in steps that are not trained."""
    weights = scale_weights(policy.units, scale_weight, alpha)
    return weights * torch.isin(unit_steps(policy), torch.tensor(list(policy.trained)))


def unit_steps(policy: Policy) -> Int[Tensor, " u"]:
    """The step of each unit."""
    return torch.arange(policy.num_steps).repeat_interleave(torch.tensor(policy.units))


def pull_back(
    mask: Float[Tensor, "b H W"], schedule: ScaleSchedule, *, floor: float = 0.0
) -> Float[Tensor, "b t"]:
    """A weight per pixel as a weight per token of every scale, for `token_mask`.

    A token's weight is that of the pixel at its centre (nearest resize, as in VAR-RL, arXiv
    2601.02256, which derives such masks from boxes or gradients).

    Args:
        mask: In [0, 1].
        schedule: The scales.
        floor: Smallest weight, so that no token is left out for good.
    """
    parts = [
        F.interpolate(mask[:, None].float(), size=sides, mode="nearest-exact").flatten(1)
        for sides in schedule.sides
    ]
    return torch.cat(parts, dim=1).clamp_min(floor)
