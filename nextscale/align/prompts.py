"""What a generator is asked for while it is tuned: prompts or class labels, with metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nextscale import storage
from nextscale.data.benchmark import BENCHMARKS, load_benchmark, training_captions
from nextscale.errors import UserError
from nextscale.streams import batch_indices

_NUM_CAPTIONS = 8_000  # of each scenes list, most of them different
_MAPS_KEPT = 256
_NUM_PICTURES = 2_000  # of each dataset whose pictures are control


@dataclass(frozen=True)
class DatasetPicture:
    """A picture of a dataset that comes with a prompt.

    Attributes:
        dataset: As `--dataset` takes it.
        split: Its part.
        index: Number of the picture.
    """

    dataset: str
    split: str
    index: int

    def load(self, resolution: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        batch = _source(self.dataset, self.split, resolution).load(np.array([self.index]))
        return batch.images[0].permute(1, 2, 0).numpy()


def map_cache(
    extractor: Callable[[np.ndarray], np.ndarray],
) -> Callable[[DatasetPicture, int], np.ndarray]:
    """A function (picture, resolution) -> its control map float [3, H, W], the last ones kept."""

    @lru_cache(_MAPS_KEPT)
    def map_of(picture: DatasetPicture, resolution: int) -> np.ndarray:
        return extractor(picture.load(resolution)[None])[0]

    return map_of


class Controlled(NamedTuple):
    """What a model under control is asked for."""

    condition: str | int
    picture: DatasetPicture


Condition = str | int | Controlled


@dataclass(frozen=True)
class Prompt:
    """One thing to draw.

    Attributes:
        condition: A text, or a class number.
        metadata: What a reward may want to know besides, from a .jsonl file; a `DatasetPicture`
            under "control_picture" (its control map is to be followed) or "picture" (an example).
        source: The source that it comes from, as `--prompts` names it.
    """

    condition: str | int
    metadata: Mapping[str, Any]
    source: str = ""

    @property
    def asked(self) -> Condition:
        """What the model is asked for: the condition, with its control picture if it has one."""
        picture = self.metadata.get("control_picture")
        return Controlled(self.condition, picture) if picture else self.condition


def open_prompts(
    names: Sequence[str], *, num_classes: int | None = None, what: str = "prompts"
) -> list[Prompt]:
    """The prompts of several sources, in turns, so that a small source is not drowned.

    Args:
        names: Each one of: scenes:standard and scenes:hard (training captions of these forms, which
            are in no benchmark); benchmark:NAME (a benchmark itself, to measure); classes (all
            classes of the model); captions:DATASET or captions:DATASET@SPLIT (captions or labels of
            a dataset, as often as it has them); images:DATASET (the same with its pictures, for
            control); examples:DATASET (the same with its pictures, for methods that learn from
            them); a .txt file, one prompt per line; a .jsonl file of objects with "prompt" or
            "class_label", the other keys are metadata.
        num_classes: Classes of the model; None: it takes prompts.
        what: The setting, for messages.

    Raises:
        UserError: For a source that is none, is empty, or does not fit the model.
    """
    if not names:
        raise UserError(f"{what} is empty; name a source, for example scenes:hard or FILE.txt")
    lists = [
        [replace(prompt, source=name) for prompt in _open(name, num_classes, what)]
        for name in names
    ]
    longest = max(map(len, lists))
    prompts = [part[i % len(part)] for i in range(longest) for part in lists]
    labels = isinstance(prompts[0].condition, int)
    if labels != (num_classes is not None) or any(
        isinstance(p.condition, int) != labels for p in prompts
    ):
        takes = "prompts" if num_classes is None else "class labels"
        raise UserError(f"this model takes {takes}, which {what} {', '.join(names)} are not")
    for prompt in prompts:
        check_label(prompt.condition, num_classes, f"{what} {', '.join(names)}")
    return prompts


def check_label(condition: str | int, num_classes: int | None, where: str) -> None:
    """Refuse class labels that the model does not have.

    Raises:
        UserError: Says where it stands.
    """
    if num_classes is not None and not 0 <= int(condition) < num_classes:
        raise UserError(
            f"{where}: class label {condition} is none of the model's, 0 to {num_classes - 1}"
        )


def draw_prompts(prompts: Sequence[Prompt], count: int, seed: int, draw: int) -> list[Prompt]:
    """The prompts of one rollout: the next of an endless sequence of shuffled passes.

    Args:
        prompts: All of them.
        count: How many.
        seed: Of the run.
        draw: Number of the rollout, from 0.
    """
    return [prompts[i] for i in batch_indices(seed, draw, count, len(prompts))]


def _open(name: str, num_classes: int | None, what: str) -> list[Prompt]:
    kind, _, argument = name.partition(":")
    if kind == "scenes":
        captions = training_captions(argument or "standard", _NUM_CAPTIONS)
        return [Prompt(caption, {}) for caption in captions]
    if kind == "benchmark":
        if argument not in BENCHMARKS:
            raise UserError(f"{what} {name}: the benchmarks are {', '.join(BENCHMARKS)}")
        return [Prompt(caption, {}) for caption in load_benchmark(argument)]
    if name == "classes":
        if num_classes is None:
            raise UserError(f"{what} classes needs a class-conditional model; this takes prompts")
        return [Prompt(label, {}) for label in range(num_classes)]
    if kind in ("captions", "images", "examples"):
        return _dataset(kind, argument, by_class=num_classes is not None)
    path = Path(name)
    if path.suffix in (".txt", ".jsonl") and not path.is_file():
        raise UserError(f"{what} {name} does not exist")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f'{what} "{name}" is no source: use scenes:standard, scenes:hard, benchmark:NAME, '
            "classes, captions:DATASET, images:DATASET, examples:DATASET, or a .txt or .jsonl file"
        )
    numbered = enumerate(storage.read_lines(path), 1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"{what} {name} holds no line")
    if path.suffix == ".txt":
        return [Prompt(line.strip(), {}) for _, line in lines]
    return [_parse(line, f"{name}, line {number}") for number, line in lines]


@cache
def _source(dataset: str, split: str, resolution: int) -> Any:
    from nextscale.data.sources import open_source

    return open_source(dataset, resolution=resolution, split=split)  # pyright: ignore[reportArgumentType]


def _dataset(kind: str, argument: str, *, by_class: bool) -> list[Prompt]:
    """Captions, or labels, of a dataset; of images: and examples: with its pictures."""
    dataset, _, split = argument.partition("@")
    split = split or "train"
    if split not in ("train", "validation", "all"):
        raise UserError(f"{kind}:{argument}: the split is train, validation or all")
    source = _source(dataset, split, 64)
    rows = np.arange(min(len(source), _NUM_PICTURES))
    found: list[Any] = source.captions(rows)
    if by_class:
        parts = [source.load(part).labels for part in np.array_split(rows, max(len(rows) // 64, 1))]
        found = [] if parts[0] is None else [int(label) for part in parts for label in part]
    if not found:
        missing = "labels" if by_class else "captions"
        raise UserError(f"{kind}:{argument}: the dataset has no {missing}")
    if kind == "captions":
        return [Prompt(condition, {}) for condition in found]
    pictures = (DatasetPicture(dataset, split, int(row)) for row in rows)
    key = "control_picture" if kind == "images" else "picture"
    return [Prompt(c, {key: p}) for c, p in zip(found, pictures, strict=True)]


def _parse(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
        keys = [key for key in ("prompt", "class_label") if key in entry]
        condition = entry.pop(keys[0]) if len(keys) == 1 else None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(condition, str | int) or isinstance(condition, bool):
        raise UserError(f'{where}: needs either "prompt" (a text) or "class_label" (a number)')
    return Prompt(condition, entry)
