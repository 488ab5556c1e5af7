"""Search at inference time: more samples than pictures, and a choice; nothing is trained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.rewards import score
from nextscale.align.rewards.reward import AnyReward, CheckedReward, PairwiseReward, SetReward
from nextscale.align.trajectory import Policy, Trajectory, map_rows
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline, Request
from nextscale.streams import image_stream, stream

_SEARCH = 23  # keeps these streams apart from those of pictures and candidates


@dataclass
class Cost:
    """What searches have drawn.

    Attributes:
        samples: Leaves, each a finished picture that was judged.
        passes: Transformer evaluations in units of one sample drawn by itself with its guidance:
            shares of the tokens (or denoising steps) that were computed. A kept prefix counts each
            time that samples go on from it, once for all that do so together; latents are kept for
            nothing.
        pictures: Chosen.
        rewards: Of those, in the order of drawing.
    """

    samples: int = 0
    passes: float = 0.0
    pictures: int = 0
    rewards: list[float] = field(default_factory=list)


class Drawer:
    """Draws, continues and judges samples for the pictures of a batch.

    Sample j of a picture has streams of (seed, j); sample 0 of a next-scale model is the picture
    without search and candidates.

    Args:
        policy: Draws.
        reward: Judges.
        conditions: Prompts or labels, one per picture.
        seeds: One per picture.
        cost: Counts.
    """

    def __init__(
        self,
        policy: Policy,
        reward: AnyReward,
        conditions: Sequence[str | int],
        seeds: Sequence[int],
        cost: Cost,
    ) -> None:
        self.policy, self.reward, self.cost = policy, reward, cost
        self.conditions, self.seeds = list(conditions), list(seeds)
        self.encoded = policy.encode(self.conditions)
        self.drawn = [0] * len(self.seeds)
        self.owner: list[int] = []
        self.values: list[float] = []
        self.trajectory: Trajectory | None = None
        units = torch.tensor(policy.units, dtype=torch.float64)
        self.shares = torch.cat([units.new_zeros(1), units.cumsum(0)]) / units.sum()

    def sample(self, pictures: Sequence[int]) -> list[int]:
        """New samples, one for each picture named; returns their numbers."""
        rows = torch.tensor(list(pictures), device=next(self.policy.network.parameters()).device)
        own = map_rows(self.encoded, lambda tensor: tensor[rows.to(tensor.device)])
        drawn = self.policy.sample(own, generators=self._streams(pictures))
        self.cost.passes += len(rows)
        return self._keep(drawn, pictures)

    def branch(self, parents: Sequence[int], at_step: int, count: int = 1) -> list[int]:
        """`count` samples in a row for each of these, with its steps before `at_step`.

        The keys and values of the kept scales are computed once per parent.
        """
        assert self.trajectory is not None
        pictures = [self.owner[parent] for parent in parents for _ in range(count)]
        rows = torch.tensor(list(parents), device=self.trajectory.actions[0].device)
        drawn = self.policy.branch(
            self.trajectory.index(rows), at_step, count, generators=self._streams(pictures)
        )
        kept = float(self.shares[at_step])
        prefix = kept if self.policy.kind == "categorical" else 0.0
        self.cost.passes += len(parents) * (prefix + count * (1 - kept))
        return self._keep(drawn, pictures)

    def unfinished(self) -> list[int]:
        """Pictures without a sample of the highest value that the reward can give."""
        highest = self.reward.range[1] if isinstance(self.reward, CheckedReward) else math.inf
        done = {o for o, value in zip(self.owner, self.values, strict=True) if value >= highest}
        return [picture for picture in range(len(self.seeds)) if picture not in done]

    def best(self) -> list[int]:
        """The best sample of each picture."""
        found = []
        for picture in range(len(self.seeds)):
            own = [row for row, owner in enumerate(self.owner) if owner == picture]
            scorable = [row for row in own if not math.isnan(self.values[row])] or own[:1]
            found.append(max(scorable, key=lambda row: (self.values[row], -row)))
        return found

    def _streams(self, pictures: Sequence[int]) -> list[torch.Generator]:
        found = []
        for picture in pictures:
            number = self.drawn[picture]
            seed = self.seeds[picture]
            found.append(stream(seed, _SEARCH, number) if number else image_stream(seed))
            self.drawn[picture] += 1
        return found

    def _keep(self, drawn: Trajectory, pictures: Sequence[int]) -> list[int]:
        images = self.policy.decode(drawn)
        prompts = [self.conditions[picture] for picture in pictures]
        values = score([self.reward], images, prompts)[0][:, 0]
        first = len(self.owner)
        self.owner += list(pictures)
        self.values += values.tolist()
        whole = drawn if self.trajectory is None else Trajectory.cat([self.trajectory, drawn])
        self.trajectory = whole
        self.cost.samples += len(images)
        return list(range(first, len(self.owner)))


class Search(ABC):
    """What `pipe(..., search=)` takes; `on` does the same with any policy, diffusion included.

    A picture whose reward is the highest there can be, such as 1 of the checker, takes no more
    samples: none could be better (DTS, which does not ask for the best, goes on).

    Args:
        reward: Of single pictures; see `open_reward`.

    Raises:
        UserError: For rewards of sets, or comparisons; with exit code 1 for one that can score no
            sample of a call.
    """

    def __init__(self, reward: AnyReward) -> None:
        if isinstance(reward, SetReward | PairwiseReward):
            raise UserError(
                f'the reward "{reward.name}" does not judge pictures one by one; a search needs '
                "one that does, such as checker or clip"
            )
        self.reward, self.cost = reward, Cost()

    def check(self, policy: Policy) -> None:
        """Refuse settings that do not fit a policy.

        Raises:
            UserError: Says which.
        """
        return

    @abstractmethod
    def choose(self, drawer: Drawer) -> Sequence[int]:
        """Draw, and name one sample for each picture."""

    def on(
        self, policy: Policy, conditions: Sequence[str | int], seeds: Sequence[int]
    ) -> Trajectory:
        """The chosen samples.

        Args:
            policy: Draws.
            conditions: Prompts or labels, one per picture.
            seeds: One per picture.
        """
        drawer = Drawer(policy, self.reward, conditions, seeds, self.cost)
        chosen = list(self.choose(drawer))
        assert drawer.trajectory is not None
        if all(math.isnan(value) for value in drawer.values):
            raise UserError(
                f'the reward "{self.reward.name}" could score none of {len(drawer.values)} '
                "samples: a search cannot choose. Check that the prompts are what it reads",
                exit_code=1,
            )
        self.cost.rewards += [drawer.values[row] for row in chosen]
        self.cost.pictures += len(chosen)
        rows = torch.tensor(chosen, device=drawer.trajectory.actions[0].device)
        return drawer.trajectory.index(rows)

    def __call__(
        self, pipe: NextScalePipeline, request: Request
    ) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b 3 H W"]]:
        """Tokens and pictures in [0, 1] of a pipeline's batch.

        Raises:
            UserError: With controls, a negative prompt or `more_smooth`.
        """
        if request.controls or request.negative_ids is not None or request.settings.more_smooth:
            raise UserError(
                "search draws from prompts alone: leave out controls, negative_prompt, more_smooth"
            )
        off = {"control_guidance_scale": None, "control_in_negative": False}
        policy = NextScalePolicy(pipe, replace(request.settings, **off), only_draws=True)
        found = self.on(policy, request.conditions, request.seeds)
        return torch.cat(found.actions, dim=1), policy.decode(found)
