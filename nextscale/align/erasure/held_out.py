"""What a report is measured on: prompts with a concept, near it and without it, none trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.erasure.concepts import SceneConcept, scene_concept
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.pairs import ConceptPair, read_pairs, scene_pairs
from nextscale.align.erasure.recognisers import Recognise
from nextscale.align.prompts import open_prompts
from nextscale.data.benchmark import BENCHMARKS, load_benchmark
from nextscale.data.captions import parse
from nextscale.data.checker import Report, check_batch
from nextscale.data.images import to_uint8
from nextscale.errors import UserError

_HELD_OUT_SEED = 10_000

Asked = str | int
Judge = Callable[[Float[Tensor, "n 3 H W"], Sequence[Asked]], Float[Tensor, " n"]]
"""Pictures in [0, 1] and what was asked for -> 1 where all of it is there."""


@dataclass(frozen=True)
class HeldOut:
    """Prompts, or class labels, of a report.

    Attributes:
        targets: With a concept, by concept.
        others: Without relation to any.
        near: Near a concept, by concept, and with none.
        right: Says whether a picture shows what was asked for; None: nothing can.
    """

    targets: dict[str, list[ConceptPair]]
    others: list[Asked]
    near: dict[str, list[Asked]] = field(default_factory=dict)
    right: Judge | None = None


def scene_prompts(
    config: EraseConfig, trained: Sequence[ConceptPair], retained: Sequence[Asked] = ()
) -> HeldOut:
    """Of a model of scenes: from the benchmarks, judged by the checker.

    Args:
        config: The run.
        trained: Its pairs.
        retained: Prompts that it holds in place.

    Raises:
        UserError: If nothing is left to ask for beside the concepts.
    """
    names = list(dict.fromkeys(pair.concept for pair in trained))
    concepts = {name: scene_concept(name) for name in names}
    count = config.num_eval_prompts
    targets = {
        n: held_out_pairs(
            concepts[n], count, trained, seed=config.seed,
            others=[concepts[other] for other in names if other != n],
        )
        for n in names
    }  # fmt: skip
    parsed = {text: parse(text) for text in dict.fromkeys(load_benchmark("standard"))}
    known = {*(pair.modified for pair in trained), *retained}  # held in place by training
    clean = [
        text
        for text, caption in parsed.items()
        if text not in known and not any(k.in_caption(caption) for k in concepts.values())
    ]
    near = {n: [t for t in clean if concepts[n].is_sibling(parsed[t])][:count] for n in names}
    siblings = {text for texts in near.values() for text in texts}
    others = [t for t in clean if t not in siblings][:count]
    if not others:
        raise UserError(
            f"no prompt of the benchmark is without relation to {', '.join(names)} and to what the "
            "run trains on: nothing shows what is kept. Erase fewer concepts at once, retain fewer "
            "prompts, or set num_eval_prompts 0"
        )
    return HeldOut(
        targets, list(others), {n: list(texts) for n, texts in near.items() if texts}, _checked
    )


def checked(images: Float[Tensor, "n 3 H W"], asked: Sequence[Asked]) -> list[Report]:
    """What the scenes checker says of every statement."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return check_batch(pixels, [str(caption) for caption in asked])


def _checked(images: Tensor, asked: Sequence[Asked]) -> Tensor:
    return torch.tensor([float(report.holds) for report in checked(images, asked)])


def held_out_pairs(
    concept: SceneConcept,
    count: int,
    taken: Iterable[ConceptPair],
    *,
    seed: int = 0,
    others: Sequence[SceneConcept] = (),
) -> list[ConceptPair]:
    """Pairs with the concept whose originals no training pair has: benchmarks', then others.

    Args:
        concept: What is erased.
        count: At most so many.
        taken: The training pairs.
        seed: Of the replacements.
        others: Further erased concepts.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
    known = {pair.original for pair in taken}
    every = [
        text for name in BENCHMARKS if name != "compositional" for text in load_benchmark(name)
    ]
    found: dict[str, ConceptPair] = {}
    for text in dict.fromkeys(every):
        caption = parse(text)
        if text in known or not concept.in_caption(caption):
            continue
        changed = concept.replaced(caption, rng, others)
        if changed is not None:
            found[text] = ConceptPair(text, str(changed[0]), concept.name, changed[1])
    if len(found) < count:
        more = scene_pairs(concept, count + len(known), seed=_HELD_OUT_SEED, others=others)
        found |= {str(p.original): p for p in more if p.original not in known}
    return list(found.values())[:count]


def class_labels(
    config: EraseConfig, trained: Sequence[ConceptPair], recognise: Recognise, num_classes: int
) -> HeldOut:
    """Of a class-conditional model: its classes, whose pictures have other seeds.

    Args:
        config: The run.
        trained: Its pairs.
        recognise: Judges the other classes, too.
        num_classes: Of the model.
    """
    count, names = config.num_eval_prompts, list(dict.fromkeys(p.concept for p in trained))
    targets = {}
    for name in names:
        own = [pair for pair in trained if pair.concept == name]
        targets[name] = [own[i % len(own)] for i in range(count)]
    erased = {int(pair.original) for pair in trained}
    left = [label for label in range(num_classes) if label not in erased]
    others: list[Asked] = [left[i % len(left)] for i in range(max(count, len(left)))]

    def right(images: Tensor, asked: Sequence[Asked]) -> Tensor:
        pairs = [ConceptPair(label, label, str(label)) for label in asked]
        return torch.from_numpy(recognise(images, pairs)).float()

    return HeldOut(targets, others, {}, right)


def text_prompts(
    config: EraseConfig, trained: Sequence[ConceptPair], retained: Sequence[Asked] = ()
) -> HeldOut | None:
    """Of a model of free text: the file `eval_pairs`, and the sources `eval_prompts`.

    Args:
        config: The run.
        trained: Its pairs.
        retained: Prompts that it holds in place.

    Returns:
        None without `eval_pairs`: nothing is known that was not trained on.

    Raises:
        UserError: For pairs or prompts that are trained on, pairs that lack a concept, or without
            `eval_prompts`.
    """
    if config.eval_pairs is None:
        return None
    known, names = {p.original for p in trained}, dict.fromkeys(p.concept for p in trained)
    pairs = read_pairs(config.eval_pairs)
    if seen := [pair.original for pair in pairs if pair.original in known]:
        raise UserError(
            f"eval_pairs {config.eval_pairs}: {len(seen)} of {len(pairs)} were trained on, such as "
            f'"{seen[0]}"; take them out'
        )
    count = config.num_eval_prompts
    targets = {name: [pair for pair in pairs if pair.concept == name][:count] for name in names}
    if missing := [name for name, own in targets.items() if not own]:
        raise UserError(f"eval_pairs {config.eval_pairs} has no pair of {', '.join(missing)}")
    others = [p.condition for p in open_prompts(config.eval_prompts, what="eval_prompts")][:count]
    held = {*(pair.modified for pair in trained), *retained}
    if seen := [prompt for prompt in others if prompt in held]:
        raise UserError(
            f"{len(seen)} of {len(others)} eval_prompts are held in place by training, such as "
            f'"{seen[0]}"; take them out of eval_prompts or of retain_prompts'
        )
    return HeldOut(targets, others)
