"""DPO and its relatives: losses of a preferred and a rejected sample of one condition.

a = sum_u m (logp - ref) of the chosen sample, b of the rejected one, n their unit counts,
z = beta (s(a) - s(b)) with s of the f-divergence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import UserError, require

# z alone decides the first group, which may be combined with any divergence.
_OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "sft")
_REVERSE_KL_ONLY = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
LOSS_TYPES = _OF_DIFFERENCE + _REVERSE_KL_ONLY
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def dpo_loss(
    chosen_logps: Float[Tensor, "b u"],
    rejected_logps: Float[Tensor, "b u"],
    ref_chosen_logps: Float[Tensor, "b u"],
    ref_rejected_logps: Float[Tensor, "b u"],
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    label_smoothing: float = 0.0,
    rpo_alpha: float = 0.0,
    weight: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """The mean preference loss of B pairs (DPO, arXiv 2305.18290; names as trl 1.16).

    | loss_type | loss |
    |---|---|
    | sigmoid | -log sigma(z) |
    | sigmoid_norm | -log sigma(beta (s(a) / n_a - s(b) / n_b)) |
    | hinge | max(0, 1 - z) |
    | ipo | (s(a) / n_a - s(b) / n_b - 1 / (2 beta))^2 |
    | robust | [-(1 - e) log sigma(z) + e log sigma(-z)] / (1 - 2e) |
    | exo_pair | KL([sigma(z), sigma(-z)] || [1 - e, e]) |
    | nca_pair | -log sigma(beta a) - 0.5 log sigma(-beta a) - 0.5 log sigma(-beta b) |
    | bco_pair | -log sigma(beta a) - log sigma(-beta b) |
    | sppo_hard | (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2 |
    | apo_zero | 1 - sigma(beta a) + sigma(beta b) |
    | apo_down | sigma(beta a) + 1 - sigma(beta (a - b)) |
    | sft | mean over all units of -log pi(chosen) |

    e is `label_smoothing`; sigmoid uses it too (conservative DPO). s(h) is h (reverse_kl),
    1 - exp(-h) (forward_kl), log 2 + log sigma(h) (js_divergence), or
    (exp((alpha - 1) h) - 1) / (alpha - 1) (alpha_divergence); only the types above nca_pair, and
    sft, go with the last three.

    For diffusion, where the likelihood of a picture is intractable, pass [B, 1] scores
    -0.5 mean_d (network - target)^2 of one shared (t, noise) as logps: with `beta` = 5000 this is
    the loss of Diffusion-DPO (arXiv 2311.12908) and of Flow-GRPO's script; diffusers' research
    script leaves the 0.5 out, so its 2500 is this 5000.

    Args:
        chosen_logps: Of the preferred samples under the policy, per unit, natural logarithm.
        rejected_logps: Of the others; the number of units may differ.
        ref_chosen_logps: Under the reference.
        ref_rejected_logps: Under the reference.
        chosen_mask: Bool or weights of 0 or more; None: every unit counts once.
        rejected_mask: As `chosen_mask`.
        loss_type: One of the table.
        beta: Strength of the pull towards the reference.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: alpha, not 1.
        label_smoothing: e, the share of pairs that are labelled the wrong way round, in [0, 0.5).
        rpo_alpha: Adds rpo_alpha times -sum_u m log pi(chosen) (RPO, arXiv 2405.16436), which
            keeps the likelihood of the chosen samples from falling.
        weight: Of each pair; None: 1. The mean is sum w L / B, so that dropped pairs (0) leave
            the others' gradients as they are.

    Raises:
        UserError: For an unknown name or a combination that is not defined.
    """
    check_settings(loss_type, f_divergence_type, f_alpha_divergence_coef, label_smoothing)
    chosen, n_chosen = _sums(chosen_logps, chosen_mask)
    rejected, n_rejected = _sums(rejected_logps, rejected_mask)
    a = chosen - _sums(ref_chosen_logps, chosen_mask)[0]
    b = rejected - _sums(ref_rejected_logps, rejected_mask)[0]
    s_a, s_b = (_score(h, f_divergence_type, f_alpha_divergence_coef) for h in (a, b))
    normed = s_a / n_chosen - s_b / n_rejected
    z = beta * (normed if loss_type == "sigmoid_norm" else s_a - s_b)
    e = label_smoothing
    if loss_type in ("sigmoid", "sigmoid_norm"):
        loss = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    elif loss_type == "hinge":
        loss = F.relu(1 - z)
    elif loss_type == "ipo":
        loss = (normed - 1 / (2 * beta)).square()
    elif loss_type == "robust":
        loss = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    elif loss_type == "exo_pair":
        log_label = torch.tensor([1 - e, e], dtype=z.dtype, device=z.device).log()
        wins, loses = F.logsigmoid(z), F.logsigmoid(-z)
        loss = wins.exp() * (wins - log_label[0]) + loses.exp() * (loses - log_label[1])
    elif loss_type == "nca_pair":
        loss = -F.logsigmoid(beta * a) - (F.logsigmoid(-beta * a) + F.logsigmoid(-beta * b)) / 2
    elif loss_type == "bco_pair":
        loss = -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b)
    elif loss_type == "sppo_hard":
        loss = (a - 1 / (2 * beta)).square() + (b + 1 / (2 * beta)).square()
    elif loss_type == "apo_zero":
        loss = 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b)
    elif loss_type == "apo_down":
        loss = torch.sigmoid(beta * a) + 1 - torch.sigmoid(beta * (a - b))
    else:  # sft: a mean over units, so that long samples weigh more
        loss = -chosen * len(chosen) / n_chosen.sum()
    if rpo_alpha:
        loss = loss - rpo_alpha * chosen
    return (loss if weight is None else loss * weight).mean()


@torch.no_grad()
def dpo_metrics(
    chosen_logps: Float[Tensor, "b u"],
    rejected_logps: Float[Tensor, "b u"],
    ref_chosen_logps: Float[Tensor, "b u"],
    ref_rejected_logps: Float[Tensor, "b u"],
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    weight: Float[Tensor, " b"] | None = None,
) -> dict[str, float]:
    """What trl logs beside the loss, over the pairs whose weight is not 0.

    Returns:
        "rewards/chosen" and "rewards/rejected": beta a and beta b; "rewards/margins": their
        difference; "rewards/accuracies": share of pairs with a > b; "logps/chosen" and
        "logps/rejected": mean log-likelihoods, which can fall together.
    """
    chosen, rejected = _sums(chosen_logps, chosen_mask)[0], _sums(rejected_logps, rejected_mask)[0]
    a = beta * (chosen - _sums(ref_chosen_logps, chosen_mask)[0])
    b = beta * (rejected - _sums(ref_rejected_logps, rejected_mask)[0])
    used = torch.ones_like(a, dtype=torch.bool) if weight is None else weight > 0
    values = {
        "rewards/chosen": a,
        "rewards/rejected": b,
        "rewards/margins": a - b,
        "rewards/accuracies": (a > b).to(a),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {name: float(v[used].mean()) for name, v in values.items()} if used.any() else {}


def _sums(logps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over the units and their number, [B] each."""
    if mask is None:
        return logps.sum(1), torch.full_like(logps[:, 0], logps.shape[1])
    mask = mask.to(logps.dtype)
    return (logps * mask).sum(1), mask.sum(1)


def _score(h: Tensor, divergence: str, alpha: float) -> Tensor:
    """s(h) = f'(pi / ref), with the constants that make s(0) = 0: ipo and sigmoid_norm need it."""
    if divergence == "reverse_kl":
        return h
    if divergence == "forward_kl":
        return 1 - torch.exp(-h)
    if divergence == "js_divergence":
        return F.logsigmoid(h) + torch.log(torch.full_like(h, 2.0))
    return torch.expm1((alpha - 1) * h) / (alpha - 1)


def check_settings(loss_type: str, divergence: str, alpha: float, smoothing: float) -> None:
    """Refuse what `dpo_loss` has no formula for.

    Raises:
        UserError: Says which setting.
    """
    require("loss_type", loss_type, loss_type in LOSS_TYPES, f"be one of {', '.join(LOSS_TYPES)}")
    known = divergence in DIVERGENCES
    require("f_divergence_type", divergence, known, f"be one of {', '.join(DIVERGENCES)}")
    require("f_alpha_divergence_coef", alpha, alpha != 1, "not be 1; that is reverse_kl")
    require("label_smoothing", smoothing, 0 <= smoothing < 0.5, "lie in [0, 0.5)")
    if divergence != "reverse_kl" and loss_type in _REVERSE_KL_ONLY:
        raise UserError(
            f"loss_type {loss_type} is defined for reverse_kl only, got f_divergence_type "
            f"{divergence}; use one of {', '.join(_OF_DIFFERENCE)}"
        )
    if loss_type == "exo_pair" and smoothing == 0:
        raise UserError("loss_type exo_pair needs label_smoothing above 0; 1e-3 is usual")
