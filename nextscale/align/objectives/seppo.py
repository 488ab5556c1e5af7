"""SePPO: given pictures are preferred to the model's own, unless a model's own is judged good."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def seppo_loss(
    given: Float[Tensor, " b"],
    drawn: Float[Tensor, " b"],
    *,
    beta: float = 0.1,
    flip: bool = True,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """-log sigma(beta (h(x_w) - xi h(x_r))), h = log pi / pi_old, of each pair (arXiv 2410.05255).

    x_w is a given picture and x_r one that an earlier policy pi_old drew. xi is -1, so that both
    are made likelier, where the policy has come to find x_r likelier than pi_old did; else 1.

    Args:
        given: h(x_w), sums over units.
        drawn: h(x_r).
        beta: Pull towards pi_old.
        flip: Off: xi is always 1, which is SPIN (arXiv 2401.01335).

    Returns:
        The losses, and xi.
    """
    sign = torch.ones_like(drawn)
    if flip:
        sign = torch.where(drawn.detach() > 0, -1.0, sign)
    return -F.logsigmoid(beta * (given - sign * drawn)), sign
