"""What the base draws before training: pictures of both prompts of a pair, filtered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.recognisers import Recognise
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline

logger = logging.getLogger(__name__)
DRAWABLE = (
    0.2  # share of pictures that show the concept below which the base is said not to know it
)


@dataclass(frozen=True)
class Drawn:
    """Pictures of pairs as tokens.

    Attributes:
        pairs: One per picture.
        neutral: Tokens of the modified prompt's picture.
        concept: Tokens of the original prompt's picture.
        counts: Pictures drawn, whose original shows the concept, and kept.
    """

    pairs: list[ConceptPair]
    neutral: Int[Tensor, "n t"]
    concept: Int[Tensor, "n t"]
    counts: dict[str, int]


def draw_pairs(
    pipe: NextScalePipeline,
    pairs: Sequence[ConceptPair],
    num_pictures: int,
    recognise: Recognise | None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    half: bool = False,
    progress: bool = False,
) -> Drawn:
    """Draw both prompts of every pair by the base; keep what shows what its prompt says.

    The filter is ECGVF's (EAR, arXiv 2506.20151): the original picture shows the concept, the
    modified one does not.

    Args:
        pipe: The base.
        pairs: Prompts.
        num_pictures: Of each pair.
        recognise: Whether a picture shows its pair's concept; None: nothing is filtered.
        seed: Picture i of either prompt is drawn with seed + i.
        batch_size: Pictures at once.
        half: Multiply in bfloat16.
        progress: Show bars.

    Raises:
        UserError: If the base cannot draw a concept, or nothing is left.
    """
    every = [pair for pair in pairs for _ in range(num_pictures)]
    given: dict[str, Any] = {"batch_size": batch_size, "half": half, "progress": progress}
    prompts = ([p.original for p in every], [p.modified for p in every])
    sides = [draw(pipe, side, seed=seed, **given) for side in prompts]
    keep = np.ones(len(every), bool)
    shown = keep
    if recognise is not None:
        shown, still = (recognise(images, every) for images, _ in sides)
        keep = shown & ~still
        for concept in dict.fromkeys(pair.concept for pair in every):
            rows = np.array([pair.concept == concept for pair in every])
            _check_concept(concept, int(shown[rows].sum()), int(keep[rows].sum()), int(rows.sum()))
    rows = torch.from_numpy(np.flatnonzero(keep))
    counts = {"drawn": len(every), "shown": int(shown.sum()), "kept": int(keep.sum())}
    return Drawn([every[i] for i in rows.tolist()], sides[1][1][rows], sides[0][1][rows], counts)


def _check_concept(concept: str, shown: int, kept: int, count: int) -> None:
    if shown < DRAWABLE * count:
        raise UserError(
            f'the base shows "{concept}" in {shown} of {count} pictures that were to show it: '
            "there is nothing to erase, or the pairs do not ask for it"
        )
    if not kept:
        raise UserError(
            f'of {count} pictures of "{concept}", {shown} show it, and no picture of a modified '
            "prompt is without it: no pair is left. Choose other replacements"
        )
    if kept < count / 4:
        logger.warning('"%s": the filter keeps %d of %d pictures', concept, kept, count)


def draw(
    pipe: NextScalePipeline,
    prompts: Sequence[str | int],
    *,
    seed: int,
    batch_size: int = 64,
    half: bool = False,
    progress: bool = False,
) -> tuple[Float[Tensor, "n 3 H W"], Int[Tensor, "n t"]]:
    """Pictures in [0, 1] and tokens of prompts or labels, without candidates."""
    by_prompt = pipe.transformer.conditioner.prompts
    given: dict[str, Any] = {"prompt" if by_prompt else "class_labels": list(prompts)}
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=half):
        out = pipe(
            **given, num_candidates=1, seed=seed, batch_size=batch_size, output_type="pt",
            progress=progress,
        )  # fmt: skip
    return out.images, out.tokens  # pyright: ignore[reportReturnType]
