"""D2O: away from given negatives, towards what the model itself draws."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def d2o_loss(
    own_logps: Float[Tensor, "b k"],
    own_ref_logps: Float[Tensor, "b k"],
    negative_logps: Float[Tensor, " b"],
    negative_ref_logps: Float[Tensor, " b"],
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
) -> Float[Tensor, ""]:
    """-log sigma(beta mean_k [log pi/ref-](y_k) - alpha [log pi/ref+](y)).

    Distributional dispreference optimisation (arXiv 2403.03419): y is a negative, y_k are K samples
    of the model itself.

    Args:
        own_logps: Log-probabilities of the K samples under the policy.
        own_ref_logps: Under the reference that the negatives come from.
        negative_logps: Of the negative under the policy.
        negative_ref_logps: Under the reference without negatives.
        beta: Strength of the pull towards the samples.
        alpha: Strength of the push away from the negative.
    """
    own = (own_logps - own_ref_logps).mean(dim=1)
    return -F.logsigmoid(beta * own - alpha * (negative_logps - negative_ref_logps)).mean()
