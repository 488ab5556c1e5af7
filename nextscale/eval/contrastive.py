"""Pictures against right and false captions: CLIP's loss, and how often the right one wins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.data.captions import COLORS, SHAPES, parse
from nextscale.data.checker import falsifiable, judge
from nextscale.data.scenes import Scene
from nextscale.eval.clip import Clip

# What has a centre.
PLACED = (*(("color", color) for color in COLORS), *(("shape", shape) for shape in SHAPES))
RANKED = 32  # captions among which the right one is ranked


def twins(captions: Sequence[str]) -> Bool[Tensor, "b b"]:
    """Pairs (i, j), i != j, of equal captions."""
    place = {caption: row for row, caption in enumerate(captions)}
    rows = torch.tensor([place[caption] for caption in captions])
    return (rows[:, None] == rows) & ~torch.eye(len(captions), dtype=torch.bool)


def contrastive_loss(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    negatives: Float[Tensor, "b m d"] | None,
    twins: Bool[Tensor, "b b"],
    scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CLIP's loss with further false captions per picture.

    Args:
        images: Unit vectors.
        texts: Of the captions.
        negatives: Of each picture's own false captions.
        twins: Pairs of equal captions, which are left out.
        scale: Inverse temperature.

    Returns:
        Mean of both cross-entropies in nats, and the share of pictures whose caption wins.
    """
    logits = (scale * images @ texts.T).float().masked_fill(twins, -torch.inf)
    target = torch.arange(len(images), device=images.device)
    per_image = logits
    if negatives is not None:
        own = scale * torch.einsum("bd,bmd->bm", images, negatives)
        per_image = torch.cat([logits, own.float()], dim=1)
    loss = (F.cross_entropy(per_image, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (per_image.argmax(dim=1) == target).float().mean()


def one_change(
    scene: Scene, count: int, rng: np.random.Generator, *, relations: bool = False
) -> list[str]:
    """False captions of a scene, each with one statement of the true one changed.

    Kinds of statements come in turn, in random order; captions repeat only if there are fewer.

    Args:
        scene: With its true caption.
        count: How many.
        rng: Of the order.
        relations: All false relations come first, where the caption states one.
    """
    found = falsifiable(scene.caption, scene)
    first = found.pop("relation") if relations and scene.caption.relation else []
    kinds = list(found.values())
    turns = [kinds[i] for i in rng.permutation(len(kinds))]
    piles = [rng.permutation([str(caption) for caption in kind]) for kind in turns]
    order = [str(caption) for caption in first]
    rng.shuffle(order)
    order += [str(pile[i]) for i in range(max(map(len, piles))) for pile in piles if i < len(pile)]
    return [order[i % len(order)] for i in range(count)]


def centres(scenes: Sequence[Scene]) -> Float[Tensor, "b p 2"]:
    """Mean centre (x, y) of the shapes of each colour, and of each form, of a scene.

    In units of the side, from the picture's middle; NaN where the scene has none.
    """
    found = np.full((len(scenes), len(PLACED), 2), np.nan, np.float32)
    for scene, rows in zip(scenes, found, strict=True):
        for row, (attribute, value) in zip(rows, PLACED, strict=True):
            here = [(s.x, s.y) for s in scene.shapes if getattr(s, attribute) == value]
            if here:
                row[:] = np.mean(here, axis=0) - 0.5
    return torch.from_numpy(found)


def centre_loss(told: Float[Tensor, "b p 2"], true: Float[Tensor, "b p 2"]) -> Float[Tensor, ""]:
    """Mean squared error of the centres that there are, by the variance of a uniform one."""
    there = ~true.isnan()
    return (told.float() - true)[there].square().mean() * 12


def _holds(caption: str, scene: Scene) -> bool:
    return all(statement.holds for statement in judge(scene.shapes, parse(caption)))


def rank_first(
    clip: Clip,
    images: Float[Tensor, "n d"],
    captions: Sequence[str],
    false: Sequence[Sequence[str]],
    among: int = RANKED,
    scenes: Sequence[Scene] | None = None,
) -> float:
    """How often the right caption scores highest among `among` different ones.

    Args:
        clip: The model.
        images: Vectors of the pictures.
        captions: The right ones.
        false: Further captions per picture; the rest are those of the pictures that follow.
        among: Captions per picture, the right one included.
        scenes: Of the pictures: captions of others that are true of them too are left out ("a red
            circle" and "a small red circle" may both be).
    """
    rivals: list[list[str]] = []
    for i, own in enumerate(captions):
        others = dict.fromkeys(false[i])
        for step in range(1, len(captions)):
            if len(others) >= among - 1:
                break
            other = captions[(i + step) % len(captions)]
            if other != own and (scenes is None or not _holds(other, scenes[i])):
                others.setdefault(other)
        rivals.append(list(others))
    texts = list(dict.fromkeys([*captions, *itertools.chain(*rivals)]))
    place = {text: row for row, text in enumerate(texts)}
    vectors, wins = clip.texts(texts), 0
    for image, own, others in zip(images, captions, rivals, strict=True):
        scores = vectors[[place[other] for other in others]] @ image
        wins += bool((vectors[place[own]] @ image > scores).all())
    return wins / len(captions)
