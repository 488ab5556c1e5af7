"""The benchmark captions: three fixed lists of 500, and the functions that made them.

standard       thirds of 1, 2 and 3 shapes, as in training; half of the multi-shape ones related
compositional  the same, but each has a (colour, shape) pair that training never shows
hard           3 shapes with a count and a relation, such as "two X above a Y"
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from importlib import resources

import numpy as np

from nextscale.data.captions import COLORS, FILLS, RELATIONS, SHAPES, SIZES, Caption, Group
from nextscale.data.scenes import HELD_OUT
from nextscale.errors import UserError

BENCHMARKS = ("standard", "compositional", "hard")
NUM_CAPTIONS = 500
_SEED = 20_260_000  # of the captions' own stream, apart from any stream of scenes
_TRAINING_SEED = 20_260_100
_LAYOUTS = {1: ((1,),), 2: ((1, 1), (1, 1), (1, 1), (2,)), 3: ((1, 1, 1), (2, 1), (1, 2), (3,))}
_TRIES = 50
_PAIRS = tuple(itertools.product(COLORS, SHAPES))


def load_benchmark(name: str) -> list[str]:
    """The 500 captions of a benchmark.

    Args:
        name: "standard", "compositional" or "hard".
    """
    _require(name)
    path = resources.files("nextscale.data") / "benchmarks" / f"{name}.txt"
    return path.read_text(encoding="utf-8").splitlines()


def make_benchmark(name: str) -> list[str]:
    """Draw a benchmark's captions again; the committed file holds the same.

    The forms (number of shapes, counts, relation, which of size and fill are named) follow the
    training distribution; within a form the words are drawn so that captions repeat as little as
    possible. One plain shape has only 18 captions, so these do repeat.

    Args:
        name: "standard", "compositional" or "hard".
    """
    _require(name)
    rng = np.random.Generator(np.random.Philox(key=_SEED + BENCHMARKS.index(name)))
    used: Counter[str] = Counter()
    captions = []
    for i in range(NUM_CAPTIONS):
        form = _form(rng, name, i)
        caption = min((str(_draw(rng, form)) for _ in range(_TRIES)), key=lambda text: used[text])
        used[caption] += 1
        captions.append(caption)
    return captions


def training_captions(name: str, count: int, *, seed: int = 0) -> list[str]:
    """Captions of a benchmark's forms that no benchmark holds, to train or tune on.

    Args:
        name: "standard" or "hard": "compositional" is made of what training never shows.
        count: How many; they may repeat.
        seed: Of their own stream.

    Raises:
        UserError: For another name.
    """
    if name not in ("standard", "hard"):
        raise UserError(f'training captions are of the form "standard" or "hard", not "{name}"')
    taken = {caption for benchmark in BENCHMARKS for caption in load_benchmark(benchmark)}
    rng = np.random.Generator(np.random.Philox(key=[_TRAINING_SEED, seed]))
    captions: list[str] = []
    while len(captions) < count:
        caption = str(_draw(rng, _form(rng, name, int(rng.integers(NUM_CAPTIONS)))))
        if caption not in taken:
            captions.append(caption)
    return captions


@dataclass(frozen=True)
class _Form:
    """What a caption says apart from its words: counts per group and which attributes it names."""

    counts: tuple[int, ...]
    named: tuple[int, ...]  # bit 0: the size, bit 1: the fill
    related: bool
    held_out: bool


def _form(rng: np.random.Generator, name: str, i: int) -> _Form:
    counts, related = _layout(rng, name, i)
    named = [0] * len(counts)
    if rng.random() < 1 / 3:
        named = [int(rng.integers(1, 4)) for _ in counts]
    return _Form(counts, tuple(named), related, name == "compositional")


def _layout(rng: np.random.Generator, name: str, i: int) -> tuple[tuple[int, ...], bool]:
    """Counts per group, and whether the first two groups are related."""
    if name == "hard":
        return ((2, 1), (1, 2))[i % 2], True
    shapes = 1 + i % 3
    related = shapes > 1 and i // 3 % 2 == 0
    layouts = [counts for counts in _LAYOUTS[shapes] if len(counts) > 1 or not related]
    return layouts[rng.integers(len(layouts))], related


def _draw(rng: np.random.Generator, form: _Form) -> Caption:
    while True:
        chosen = [_PAIRS[k] for k in rng.choice(len(_PAIRS), len(form.counts), replace=False)]
        if form.held_out == any(pair in HELD_OUT for pair in chosen):
            break
    groups = []
    for count, (color, shape), names in zip(form.counts, chosen, form.named, strict=True):
        size = SIZES[rng.integers(2)] if names & 1 else None
        fill = FILLS[rng.integers(2)] if names & 2 else None
        groups.append(Group(count, color, shape, size, fill))
    return Caption(tuple(groups), RELATIONS[rng.integers(4)] if form.related else None)


def _require(name: str) -> None:
    if name not in BENCHMARKS:
        raise UserError(f'unknown benchmark "{name}"; use one of {", ".join(BENCHMARKS)}')
