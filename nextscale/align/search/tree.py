"""Diffusion Tree Sampling and its greedy search, over scales or denoising steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nextscale.align.rewards.reward import AnyReward
from nextscale.align.search.search import Drawer, Search
from nextscale.align.trajectory import Policy
from nextscale.errors import UserError, require
from nextscale.streams import stream

_SELECT = 29
_UNSCORABLE = -1e9  # finite: means of values stay numbers


@dataclass
class Node:
    """What some first steps are, and what came of them.

    Attributes:
        depth: How many levels of steps are decided; the deepest are finished samples.
        sample: One that begins like this; None: the root.
        visits: Samples below.
        value: Soft value of those, see `TreeSearch`.
        children: Different next levels.
    """

    depth: int
    sample: int | None = None
    visits: int = 0
    value: float = -math.inf
    children: list[Node] = field(default_factory=list)


class TreeSearch(Search):
    """Diffusion Tree Sampling (DTS) and Search (DTS*, arXiv 2506.20701).

    A node is the first steps of a sample. From the root, children are chosen by their values until
    a node has room for another child (progressive widening: at most width visits^growth); the base
    model continues it to the end, and the reward of what comes out moves all values above it,
    v = (1 / sharpness) log mean exp(sharpness v_child).

    Differences from the paper: a finished sample takes no further visits; on next-scale models a
    level is one scale or several, and the keys and values of a prefix are computed once more for
    each continuation, which the cost counts.

    Args:
        reward: Of single pictures.
        num_samples: Finished samples per picture.
        steps: Where samples may part, rising; None: before each of the first four scales but the
            first, which the root is for; of denoising steps after each quarter.
        sharpness: lambda: how much better a child must be to be preferred.
        greedy: DTS*: choose the child of highest value plus exploration; otherwise DTS: draw it by
            exp(sharpness value).
        exploration: DTS*: weight of sqrt(log visits / visits of the child).
        width: Children of a node that was visited once.
        growth: Exponent of visits.
    """

    def __init__(
        self,
        reward: AnyReward,
        num_samples: int = 8,
        *,
        steps: Sequence[int] | None = None,
        sharpness: float = 5.0,
        greedy: bool = True,
        exploration: float = 0.2,
        width: float = 2.0,
        growth: float = 0.5,
    ) -> None:
        super().__init__(reward)
        for name, value in (("num_samples", num_samples), ("sharpness", sharpness)):
            require(name, value, value > 0, "be above 0")
        for name, value in (("exploration", exploration), ("growth", growth)):
            require(name, value, value >= 0, "be 0 or more")
        require("width", width, width >= 1, "be 1 or more")
        rising = steps is None or (list(steps) == sorted(set(steps)) and min(steps, default=1) > 0)
        require("steps", steps, rising, "rise from 1 or more")
        self.num_samples, self.steps, self.sharpness = num_samples, steps, sharpness
        self.greedy, self.exploration, self.width, self.growth = greedy, exploration, width, growth

    def check(self, policy: Policy) -> None:
        """See `Search`."""
        self._steps(policy)

    def choose(self, drawer: Drawer) -> Sequence[int]:
        """See `Search`."""
        bounds = [0, *self._steps(drawer.policy)]
        roots = [Node(0) for _ in drawer.seeds]
        for turn in range(self.num_samples):
            paths = [
                self._select(root, len(bounds), stream(seed, _SELECT, turn))
                for root, seed in zip(roots, drawer.seeds, strict=True)
            ]
            for depth, step in enumerate(bounds):
                rows = [i for i, path in enumerate(paths) if path[-1].depth == depth]
                if not rows:
                    continue
                parents = [paths[i][-1].sample for i in rows]
                if depth == 0:
                    found = drawer.sample(rows)
                else:
                    found = drawer.branch([p for p in parents if p is not None], step)
                for i, sample in zip(rows, found, strict=True):
                    self._grow(paths[i], sample, len(bounds), drawer.values[sample])
        return drawer.best()

    def _steps(self, policy: Policy) -> list[int]:
        """Where samples part."""
        last = policy.num_steps - 1
        steps = list(range(1, min(4, last + 1)) if self.steps is None else self.steps)
        if self.steps is None and policy.kind == "gaussian":
            count = policy.num_steps
            steps = sorted({count * k // 4 for k in (1, 2, 3)} - {0})
        if steps and steps[-1] > last:
            raise UserError(f"steps ends at {steps[-1]}; samples part at {last} at the latest")
        return steps

    def _select(self, root: Node, deepest: int, generator: torch.Generator) -> list[Node]:
        """From the root to the node that gets another child."""
        path = [root]
        while True:
            node = path[-1]
            room = len(node.children) < math.ceil(self.width * max(node.visits, 1) ** self.growth)
            if not node.children or room or node.depth == deepest - 1:
                return path
            path.append(self._child(node, generator))

    def _child(self, node: Node, generator: torch.Generator) -> Node:
        values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
        if not self.greedy:
            shares = (self.sharpness * values).softmax(0)
            return node.children[int(torch.multinomial(shares, 1, generator=generator))]
        visits = torch.tensor([float(child.visits) for child in node.children])
        bonus = (math.log(max(node.visits, 1)) / visits).sqrt()
        return node.children[int((values + self.exploration * bonus).argmax())]

    def _grow(self, path: list[Node], sample: int, deepest: int, reward: float) -> None:
        """Hang a finished sample below the last node, and move the values above it."""
        path = list(path)
        while path[-1].depth < deepest:
            child = Node(path[-1].depth + 1, sample)
            path[-1].children.append(child)
            path.append(child)
        for node in path:
            node.visits += 1
        path[-1].value = _UNSCORABLE if math.isnan(reward) else reward
        for node in reversed(path[:-1]):
            values = torch.tensor([c.value for c in node.children], dtype=torch.float64)
            mean = (self.sharpness * values).logsumexp(0) - math.log(len(values))
            node.value = float(mean) / self.sharpness
