"""Erasing without training: UCE on cross-attention, and the swap of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.erasure.pairs import ConceptPair
from nextscale.errors import UserError
from nextscale.var import ClassConditioner, NextScaleTransformer
from nextscale.var.conditioning import Condition


def uce_weight(
    weight: Float[Tensor, "o c"],
    concepts: Float[Tensor, "n c"],
    replacements: Float[Tensor, "n c"],
    preserved: Float[Tensor, "m c"],
    *,
    preserve: float = 1.0,
    ridge: float = 1e-3,
) -> Float[Tensor, "o c"]:
    """W' with W' c_i near W r_i and W' p_j near W p_j (UCE, arXiv 2308.14761, equation 7).

    W' = W (sum_i r_i c_i^T + a sum_j p_j p_j^T + l) (sum_i c_i c_i^T + a sum_j p_j p_j^T + l)^-1

    Args:
        weight: W, a projection of context tokens.
        concepts: c_i, context tokens of the concept.
        replacements: r_i, those in whose place they are to act.
        preserved: p_j, tokens that are to act as before.
        preserve: a.
        ridge: l, in units of the mean of the diagonal of the sums.
    """
    w, c, r, p = (x.double() for x in (weight, concepts, replacements, preserved))
    right = c.T @ c + preserve * p.T @ p
    eye = ridge * right.diagonal().mean() * torch.eye(len(right), dtype=w.dtype, device=w.device)
    left = w @ (r.T @ c + preserve * p.T @ p + eye)
    return torch.linalg.solve(right + eye, left, left=False).to(weight)


def check_classes(model: NextScaleTransformer) -> ClassConditioner:
    """The class embedding; raises a UserError for a model of prompts."""
    if not isinstance(model.conditioner, ClassConditioner):
        raise UserError("class_swap is for class-conditional models; use uce or ear")
    return model.conditioner


def check_cross_attention(model: NextScaleTransformer) -> None:
    """Raises a UserError for a model without it."""
    if model.config.context_dim is None:
        raise UserError("uce edits cross-attention, and this model has none; use class_swap or ear")


@torch.no_grad()
def edit_cross_attention(
    model: NextScaleTransformer,
    pairs: Sequence[ConceptPair],
    preserved: Sequence[str],
    *,
    preserve: float = 1.0,
) -> None:
    """UCE on the keys and values of every block, in place.

    Context tokens of a pair stand in each other's place where both prompts have as many; others are
    left out.

    Raises:
        UserError: For a model without cross-attention, or pairs of unequal lengths alone.
    """
    check_cross_attention(model)
    concepts, replacements = [], []
    for pair in pairs:
        first, second = (_tokens(model, [p]) for p in (pair.original, pair.modified))
        if len(first) == len(second):
            concepts.append(first)
            replacements.append(second)
    if not concepts:
        raise UserError("uce needs pairs whose prompts have as many words as each other")
    kept = _tokens(model, preserved) if preserved else torch.cat(replacements)
    for block in model.blocks:
        linear: Any = block.cross.kv  # pyright: ignore
        linear.weight.copy_(
            uce_weight(
                linear.weight, torch.cat(concepts), torch.cat(replacements), kept, preserve=preserve
            )
        )


def _tokens(model: NextScaleTransformer, prompts: Sequence[str | int]) -> Float[Tensor, "n c"]:
    """Real context tokens of prompts, one after the other."""
    condition: Condition = model.condition(list(prompts))
    assert condition.context is not None
    if condition.mask is None:
        return condition.context.flatten(0, 1)
    return condition.context[condition.mask]


@torch.no_grad()
def swap_classes(model: NextScaleTransformer, pairs: Sequence[ConceptPair]) -> None:
    """Give each erased class the embedding of its replacement, in place.

    Raises:
        UserError: For a model of prompts, or a class with several replacements.
    """
    conditioner = check_classes(model)
    places: dict[int, int] = {}
    for pair in pairs:
        first, second = int(pair.original), int(pair.modified)
        if places.setdefault(first, second) != second:
            raise UserError(
                f"class_swap: class {first} has the replacements {places[first]} and {second}"
            )
    weight = conditioner.embedding.weight
    before = weight.clone()
    for first, second in places.items():
        weight[first] = before[second]
