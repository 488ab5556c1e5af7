"""DUMP (arXiv 2504.09710): more prompts from the sources that teach most."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.prompts import Prompt
from nextscale.errors import UserError, require
from nextscale.streams import batch_indices, stream

_WINDOW = 300  # groups of a source that count


def upper_bounds(
    gains: Sequence[float], counts: Sequence[int], *, known: Sequence[bool] | None = None
) -> Float[Tensor, " n"]:
    """UCB_j = gain_j + sqrt(2 ln(n + 1) / (n_j + 1)), n the sum of all n_j.

    Args:
        gains: Mean absolute advantage of each source.
        counts: n_j, groups that were drawn from each.
        known: False for sources that were never drawn, whose bound is infinite; None: all.
    """
    n = torch.tensor(counts, dtype=torch.float64)
    bonus = (2 * math.log(sum(counts) + 1) / (n + 1)).sqrt()
    found = torch.tensor(gains, dtype=torch.float64) + bonus
    if known is not None:
        found[~torch.tensor(known)] = math.inf
    return found


class Curriculum:
    """Draws prompts from sources by the softmax of their upper confidence bounds.

    Differences from the paper: the gain of a group is the mean of |r - its mean|, not divided by
    its deviation, which would make all groups alike; a source that was never drawn comes first; one
    that nothing could score has gain 0.

    Args:
        prompts: Of all sources.
        temperature: Of the softmax.

    Raises:
        UserError: For a single source.
    """

    def __init__(self, prompts: Sequence[Prompt], *, temperature: float = 0.5) -> None:
        require("curriculum_temperature", temperature, temperature > 0, "be above 0")
        self.temperature = temperature
        self.sources: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self.sources.setdefault(prompt.source, []).append(prompt)
        if len(self.sources) < 2:
            raise UserError(
                f"a curriculum chooses among sources of prompts, and there is only "
                f"{next(iter(self.sources))}; name several, easy and hard ones"
            )
        self._counts = dict.fromkeys(self.sources, 0)
        self._gains: dict[str, deque[float]] = {n: deque(maxlen=_WINDOW) for n in self.sources}

    def probabilities(self) -> Float[Tensor, " n"]:
        """Of the sources, in the order of `sources`."""
        gains = [sum(g) / max(len(g), 1) for g in self._gains.values()]
        known = [count > 0 for count in self._counts.values()]
        bounds = upper_bounds(gains, list(self._counts.values()), known=known)
        if bool(bounds.isinf().any()):
            return bounds.isinf().double() / bounds.isinf().sum()
        return (bounds / self.temperature).softmax(0)

    def draw(self, count: int, seed: int, number: int) -> list[Prompt]:
        """The prompts of a rollout: each source goes through its own endless shuffle.

        Args:
            count: How many.
            seed: Of the run.
            number: Of the rollout.
        """
        generator = stream(seed, number, 17)
        chosen = torch.multinomial(self.probabilities(), count, True, generator=generator)
        names, found = list(self.sources), []
        for index in chosen.tolist():
            own = self.sources[names[index]]
            row = batch_indices(seed, self._counts[names[index]], 1, len(own))[0]
            self._counts[names[index]] += 1
            found.append(own[row])
        return found

    def update(self, prompts: Sequence[Prompt], gains: Sequence[float]) -> None:
        """What groups taught: their prompts, and the mean of |r - mean|; a NaN is left out."""
        for prompt, gain in zip(prompts, gains, strict=True):
            if not math.isnan(gain):
                self._gains[prompt.source].append(float(gain))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        return {"counts": self._counts, "gains": {k: list(v) for k, v in self._gains.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._counts = {name: int(state["counts"][name]) for name in self.sources}
        self._gains = {n: deque(state["gains"][n], maxlen=_WINDOW) for n in self.sources}
