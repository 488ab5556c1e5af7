"""Sibling-GRPO (V-STAR): every step is judged against the siblings that differ in it, on a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import group_advantages, informative, soft_mean
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig, check_nested
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.trajectory import Policy
from nextscale.align.units import unit_steps
from nextscale.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class SiblingConfig:
    """Settings of Sibling-GRPO."""

    steps: tuple[int, ...] = (2,)
    """Scales (or denoising steps) at which every sample splits, rising."""
    siblings: int = 2
    """Into how many; num_generations counts the trees of a prompt."""
    value_temperature: float | None = None
    """A node's value is tau log mean exp(reward / tau) of its leaves; None: their mean."""
    loss: GRPOConfig = field(default_factory=GRPOConfig)
    """The clipped loss and how advantages are scaled."""

    def __post_init__(self) -> None:
        rising = self.steps == tuple(sorted(set(self.steps))) and min(self.steps, default=0) > 0
        require("steps", self.steps, rising, "rise from 1 or more")
        require("siblings", self.siblings, self.siblings > 1, "be above 1")
        tau = self.value_temperature
        require("value_temperature", tau, tau is None or tau > 0, "be above 0")
        check_nested("sibling.loss", self.loss)


class Sibling(Method):
    """GRPO's loss with the advantage of each node among the children of its parent.

    Next-scale: a level of the tree is one scale or several. Left out of the paper: the expansion of
    promising nodes; all trees have one shape.

    Args:
        settings: See there.
        policy: What is trained.

    Raises:
        UserError: For a step that the policy does not have.
    """

    def __init__(self, settings: SiblingConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.objective = GRPO(settings.loss, policy)
        self.needs_reference = self.objective.needs_reference
        last = policy.num_steps - 1
        if settings.steps and settings.steps[-1] > last:
            raise UserError(
                f"sibling.steps ends at {settings.steps[-1]}; the last step that a sample can "
                f"split at is {last}"
            )

    def items_per_group(self, num_generations: int) -> int:
        """Every leaf is an example."""
        return num_generations * self.settings.siblings ** len(self.settings.steps)

    def branch(self) -> Sequence[tuple[int, int]]:
        """A level per step."""
        return [(step, self.settings.siblings) for step in self.settings.steps]

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages of all units; leaves of trees without differences have weight 0."""
        advantages = self.advantages(rollout.total, rollout.groups)
        items = torch.arange(len(advantages), device=advantages.device)[:, None]
        useful = informative(advantages.abs().amax(1), rollout.groups).to(advantages)
        columns = {"advantages": advantages, "old_logps": old_logps(rollout)}
        return Experience(rollout, items, useful, columns)

    def advantages(
        self, total: Float[Tensor, " b"], groups: Int[Tensor, " b"]
    ) -> Float[Tensor, "b u"]:
        """A_j = (V_j - mean V) / (std V + eps) among siblings j, for the steps that they differ in.

        Args:
            total: Rewards of the leaves, siblings in a row.
            groups: Prompt of each leaf.
        """
        settings, count = self.settings, self.settings.siblings
        options = {k: getattr(settings.loss, k) for k in ("scale_rewards", "std_eps", "std_ddof")}
        step = unit_steps(self.policy).to(total.device)
        bounds = [0, *settings.steps, self.policy.num_steps]
        found = total.new_zeros(len(total), len(step))
        for level, (start, stop) in enumerate(pairwise(bounds)):
            leaves = count ** (len(settings.steps) - level)
            below = total.view(-1, leaves)
            tau = settings.value_temperature
            values = below.nanmean(1) if tau is None else soft_mean(below, tau)
            nodes = torch.arange(len(values), device=total.device)
            families = nodes // count if level else groups[::leaves]
            own = group_advantages(values, families, **options).repeat_interleave(leaves)
            found[:, (step >= start) & (step < stop)] = own[:, None]
        limit = settings.loss.advantage_clip
        return found if limit is None else found.clamp(-limit, limit)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The clipped loss of some leaves."""
        yield from self.objective.losses(experience, examples, step, network)
