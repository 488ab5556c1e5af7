"""Who sees a concept in a picture: the scenes checker, a classifier, or CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.align.erasure.concepts import SceneConcept, scene_concept
from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.rewards.classifier import Classifier, timm_classifier
from nextscale.data.checker import check_batch
from nextscale.data.imagenet import imagenet_class
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.eval.clip import BUNDLED, Clip, open_clip_model

Recognise = Callable[[Float[Tensor, "b 3 H W"], Sequence[ConceptPair]], Bool[np.ndarray, " b"]]
"""Pictures in [0, 1] and the pairs that they were drawn for -> whether each shows its pair's
concept."""

_ANYTHING = "a picture"


def open_recogniser(
    name: str, pairs: Sequence[ConceptPair], *, scenes: bool, download: bool = False
) -> Recognise:
    """Open a recogniser by its name.

    | name | a picture shows the concept if |
    |---|---|
    | checker | the scenes checker finds a shape, or a relation, that is it |
    | classifier:MODEL[@FILE] | it is the most likely class of a model of timm |
    | clip[:MODEL] | CLIP finds the original prompt nearer than the modified one |

    Args:
        name: One of these.
        pairs: Of the run.
        scenes: Whether the model draws scenes.
        download: Fetch weights that are nowhere.

    Raises:
        UserError: For a name that is none, or one that cannot see these concepts.
    """
    kind, _, argument = name.partition(":")
    if kind == "checker":
        if not scenes:
            raise UserError("the recogniser checker reads scenes, which this model does not draw")
        return scenes_recogniser({p.concept: scene_concept(p.concept) for p in pairs})
    if kind == "classifier" and argument:
        model, _, path = argument.partition("@")
        concepts = {p.concept for p in pairs if not isinstance(p.original, int)}
        for concept in concepts:
            imagenet_class(concept)  # says what is wrong before anything is drawn
        return classifier_recogniser(timm_classifier(model, path or None, download=download))
    if kind == "clip":
        if any(isinstance(pair.original, int) for pair in pairs):
            raise UserError("the recogniser clip reads prompts; this model takes class labels")
        return clip_recogniser(open_clip_model(argument or BUNDLED, download=download))
    raise UserError(
        f'"{name}" is no recogniser: use checker, classifier:MODEL[@FILE], clip or clip:MODEL'
    )


def scenes_recogniser(concepts: Mapping[str, SceneConcept]) -> Recognise:
    """The checker, by the concept of each pair."""

    def recognise(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        reports = check_batch(pixels, [str(pair.original) for pair in pairs])
        return np.array(
            [concepts[p.concept].in_picture(r) for p, r in zip(pairs, reports, strict=True)], bool
        )

    return recognise


def classifier_recogniser(classifier: Classifier, *, top: int = 1) -> Recognise:
    """Whether the concept is among the most likely classes (EAR's measure for objects).

    Args:
        classifier: Pictures -> logits.
        top: How many classes count.
    """

    @torch.no_grad()
    def recognise(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        parts = [classifier(part).topk(top).indices.cpu() for part in images.split(64)]
        wanted = torch.tensor([_class_of(pair) for pair in pairs])
        return (torch.cat(parts) == wanted[:, None]).any(dim=1).numpy()

    return recognise


def _class_of(pair: ConceptPair) -> int:
    return imagenet_class(pair.concept) if isinstance(pair.original, str) else int(pair.concept)


def clip_recogniser(clip: Clip) -> Recognise:
    """Whether a picture's cosine to the original prompt is above that to the modified one.

    Pairs without a modified prompt: the concept against "a picture".

    Args:
        clip: The model.
    """

    def recognise(images: Tensor, pairs: Sequence[ConceptPair]) -> np.ndarray:
        pictures = clip.images(list(to_uint8(images).permute(0, 2, 3, 1).numpy()))
        shown = clip.texts([str(p.original) if p.modified else p.concept for p in pairs])
        gone = clip.texts([str(p.modified) or _ANYTHING for p in pairs])
        return (((shown - gone) * pictures).sum(dim=1) > 0).numpy()

    return recognise
