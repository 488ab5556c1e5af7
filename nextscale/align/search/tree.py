"""Diffusion Tree Sampling and its greedy search, over scales or denoising steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        reward: Of a finished sample.
        visits: Samples below.
        value: Soft value of those, see `TreeSearch`.
        children: Different next levels.
    """

    depth: int
    sample: int | None = None
    reward: float = math.nan
    visits: int = 0
    value: float = -math.inf
    children: list[Node] = field(default_factory=list)

    def leaves(self) -> Iterator[Node]:
        """Finished samples below."""
        if self.sample is not None and not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()


class TreeSearch(Search):
    """Diffusion Tree Sampling (DTS) and Search (DTS*, arXiv 2506.20701).

    A node is the first steps of a sample. From the root, children are chosen by their values until
    a node has room for other children (progressive widening: at most width visits^growth), which
    are drawn at once; the base model continues each to the end, and the rewards of what comes out
    move all values above, v = (1 / sharpness) log mean exp(sharpness v_child).

    Differences from the paper: a finished sample takes no further visits; rewards are counted in
    spreads of the picture's samples so far, so that sharpness and exploration mean the same for any
    reward; all children that a node but the root has room for are opened together, with one pass
    over the scales that they share (keys and values are not kept between turns, which the cost
    counts); on next-scale models a level is one scale or several.

    Args:
        reward: Of single pictures.
        num_samples: Finished samples per picture.
        steps: Where samples may part, rising; None: before the second and the third scale; of
            denoising steps after each quarter.
        sharpness: lambda: how much better a child must be to be preferred.
        greedy: DTS*: choose the child of highest value plus exploration, and the best sample;
            otherwise DTS: draw both by exp(sharpness value).
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
        turn = 0
        while pictures := [i for i in self._open(drawer) if drawer.drawn[i] < self.num_samples]:
            # picture -> the path to the node that gets other children, and how many
            paths = {
                i: self._select(roots[i], len(bounds), stream(drawer.seeds[i], _SELECT, turn))
                for i in pictures
            }
            rooms = {
                i: min(self._opened(path[-1]), self.num_samples - drawer.drawn[i])
                for i, path in paths.items()
            }
            for depth, room in sorted({(paths[i][-1].depth, rooms[i]) for i in pictures}):
                own = [i for i in pictures if (paths[i][-1].depth, rooms[i]) == (depth, room)]
                parents = [paths[i][-1].sample for i in own]
                if depth == 0:
                    found = drawer.sample([i for i in own for _ in range(room)])
                else:
                    known = [parent for parent in parents if parent is not None]
                    found = drawer.branch(known, bounds[depth], room)
                for row, sample in enumerate(found):
                    picture = own[row // room]
                    self._grow(paths[picture], sample, len(bounds), drawer.values[sample])
            for i in pictures:
                self._revalue(roots[i])
            turn += 1
        if self.greedy:
            return drawer.best()
        return [
            self._draw_leaf(root, stream(seed, _SELECT, turn), best)
            for root, seed, best in zip(roots, drawer.seeds, drawer.best(), strict=True)
        ]

    def _open(self, drawer: Drawer) -> Sequence[int]:
        """Pictures that may take samples; DTS stops at none, which would tilt what it draws."""
        return drawer.unfinished() if self.greedy else range(len(drawer.seeds))

    def _steps(self, policy: Policy) -> list[int]:
        """Where samples part."""
        last = policy.num_steps - 1
        steps = list(range(1, min(3, last + 1)) if self.steps is None else self.steps)
        if self.steps is None and policy.kind == "gaussian":
            count = policy.num_steps
            steps = sorted({count * k // 4 for k in (1, 2, 3)} - {0})
        if steps and steps[-1] > last:
            raise UserError(f"steps ends at {steps[-1]}; samples part at {last} at the latest")
        return steps

    def _room(self, node: Node) -> int:
        """How many more children a node may have, 0 or less if it is full."""
        most = math.ceil(self.width * max(node.visits, 1) ** self.growth)
        return most - len(node.children)

    def _opened(self, node: Node) -> int:
        """How many children it gets at once: those of the root share nothing, so one by one."""
        return max(self._room(node), 1) if node.depth else 1

    def _select(self, root: Node, deepest: int, generator: torch.Generator) -> list[Node]:
        """From the root to the node that gets other children, of the last level if all are full."""
        path = [root]
        while self._room(path[-1]) <= 0 and path[-1].depth < deepest - 1:
            path.append(self._child(path[-1], generator))
        return path

    def _child(self, node: Node, generator: torch.Generator) -> Node:
        values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
        if not self.greedy:
            shares = (self.sharpness * values).softmax(0)
            return node.children[int(torch.multinomial(shares, 1, generator=generator))]
        visits = torch.tensor([float(child.visits) for child in node.children])
        bonus = (math.log(max(node.visits, 1)) / visits).sqrt()
        return node.children[int((values + self.exploration * bonus).argmax())]

    def _draw_leaf(self, root: Node, generator: torch.Generator, best: int) -> int:
        """DTS: a finished sample, drawn from the root down; never one that nothing could score."""
        node = root
        while node.children:
            node = self._child(node, generator)
        return best if node.sample is None or math.isnan(node.reward) else node.sample

    def _grow(self, path: list[Node], sample: int, deepest: int, reward: float) -> None:
        """Hang a finished sample below the last node."""
        path = list(path)
        while path[-1].depth < deepest:
            child = Node(path[-1].depth + 1, sample)
            path[-1].children.append(child)
            path.append(child)
        path[-1].reward = reward
        for node in path:
            node.visits += 1

    def _revalue(self, root: Node) -> None:
        """Values from the rewards of all samples, in their spread."""
        known = [leaf.reward for leaf in root.leaves() if not math.isnan(leaf.reward)]
        low, high = min(known, default=0.0), max(known, default=0.0)
        self._back_up(root, low, high - low or 1.0)

    def _back_up(self, node: Node, low: float, spread: float) -> None:
        if not node.children:
            node.value = _UNSCORABLE if math.isnan(node.reward) else (node.reward - low) / spread
            return
        for child in node.children:
            self._back_up(child, low, spread)
        values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
        mean = (self.sharpness * values).logsumexp(0) - math.log(len(values))
        node.value = float(mean) / self.sharpness
