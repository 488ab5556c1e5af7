"""Prompt pairs: with a concept, and with something else in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nextscale import storage
from nextscale.align.erasure.concepts import SceneConcept
from nextscale.data.benchmark import training_captions
from nextscale.data.captions import parse
from nextscale.errors import UserError

_BATCH = 1000
_MOST = 40_000  # captions that are looked through


@dataclass(frozen=True)
class ConceptPair:
    """Two prompts (or class labels) that differ in a concept, as ECGVF's files have them.

    Attributes:
        original: Contains the concept.
        modified: The same with something else in its place.
        concept: What is erased.
        replacement: What stands in its place; "" if nothing does.
    """

    original: str | int
    modified: str | int
    concept: str
    replacement: str = ""


def scene_pairs(
    concept: SceneConcept, count: int, *, seed: int = 0, others: Sequence[SceneConcept] = ()
) -> list[ConceptPair]:
    """Pairs from the scenes grammar, of captions that are in no benchmark.

    Args:
        concept: What is erased.
        count: How many.
        seed: Of the captions and replacements; other seeds give other pairs.
        others: Further erased concepts, of which no modified prompt names one.

    Raises:
        UserError: If the grammar has too few captions for it.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    found: dict[str, ConceptPair] = {}
    for name, first in (("standard", 0), ("hard", 1)):
        for start in range(0, _MOST, _BATCH):
            stream = seed * _MOST + start + first
            for text in training_captions(name, _BATCH, seed=stream):
                caption = parse(text)
                if text in found or not concept.in_caption(caption):
                    continue
                changed = concept.replaced(caption, rng, others)
                if changed is not None:
                    modified, replacement = changed
                    found[text] = ConceptPair(text, str(modified), concept.name, replacement)
                if len(found) == count:
                    return list(found.values())
    without = "".join(f', "{other.name}"' for other in others)
    raise UserError(
        f'the grammar gave {len(found)} captions with "{concept.name}" in which something else can '
        f'take the place of what is erased ("{concept.name}"{without}); {count} are wanted. Erase '
        "fewer concepts at once, or lower num_pairs"
    )


def read_pairs(path: str | Path, *, num_classes: int | None = None) -> list[ConceptPair]:
    """Read a .jsonl of {"original", "modified", "concept", "replacement"}.

    Args:
        path: The file.
        num_classes: Classes of the model, whose pairs are labels; None: it takes prompts.

    Raises:
        UserError: For a line that is none, with its number, and for an empty file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pairs {path} does not exist; give a .jsonl file")
    kind = str if num_classes is None else int
    pairs = []
    for number, line in enumerate(storage.read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            first, second = entry["original"], entry["modified"]
            if any(not isinstance(v, kind) or isinstance(v, bool) for v in (first, second)):
                raise TypeError(f"original and modified must be {kind.__name__}")
            words = str(entry["concept"]), str(entry["replacement"])
            pairs.append(ConceptPair(first, second, *words))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: needs "original", "modified", "concept" and '
                f'"replacement" ({error!r})'
            ) from error
    if not pairs:
        raise UserError(f"pairs {path} holds no line")
    return pairs


def write_pairs(path: str | Path, pairs: Sequence[ConceptPair]) -> None:
    """Write what `read_pairs` reads."""
    lines = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
    storage.write_bytes(Path(path), lines.encode())
