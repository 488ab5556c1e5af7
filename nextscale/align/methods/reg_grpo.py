"""Reg-GRPO (DeepVideo-R1, arXiv 2506.07464): advantages as the target of a regression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.advantages import group_advantages, informative
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.objectives.regression import reg_grpo_loss
from nextscale.align.trajectory import Policy
from nextscale.align.units import trained_weights
from nextscale.errors import require

_FLAT = 1e-4  # deviation of log-ratios below which a group is on policy


@dataclass(frozen=True, kw_only=True)
class RegGRPOConfig:
    """Settings of Reg-GRPO."""

    beta: float = 0.1
    """What log-ratios are divided by while a group's are all alike, on policy; later by their
    deviation."""
    scale_weight: str = "token"
    """Weight of tokens: token, scale or power; see GRPO."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""

    def __post_init__(self) -> None:
        require("beta", self.beta, self.beta > 0, "be above 0")


class RegGRPO(Method):
    """`reg_grpo_loss` of whole groups, which are the examples: a batch counts groups.

    Left out of the paper: prompts made easier or harder by the rewards that they got.

    Args:
        settings: See there.
        policy: What is trained.
    """

    def __init__(self, settings: RegGRPOConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.weights = trained_weights(policy, settings.scale_weight, settings.scale_weight_alpha)

    def items_per_group(self, num_generations: int) -> int:
        """The group is one example."""
        return 1

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages; groups without differences, or with unscorable samples, have weight 0."""
        advantages = group_advantages(rollout.total, rollout.groups)
        count = int(rollout.groups.max()) + 1
        items = torch.arange(len(advantages), device=advantages.device).view(count, -1)
        scored = ~rollout.total.isnan().view(count, -1).any(dim=1)
        useful = informative(advantages, rollout.groups).view(count, -1)[:, 0] & scored
        columns = {"advantages": advantages, "old_logps": old_logps(rollout)}
        return Experience(rollout, items, useful.to(advantages), columns)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The regression of some groups."""
        items = experience.items[examples]
        rows = items.flatten()
        trajectory = experience.rollout.trajectory.index(rows)
        found = self.policy.evaluate(trajectory, self.policy.trained, network=network)
        old = experience.columns.get("old_logps")
        old = found.logp.detach() if old is None else old[rows][:, found.unit]
        mask = found.mask * self.weights.to(found.logp)[found.unit]
        ratios = ((found.logp - old) * mask).sum(1) / mask.sum(1).clamp_min(1e-12)
        ratios, targets = ratios.view(items.shape), experience.columns["advantages"][items]
        used = experience.weights[examples] > 0
        flat = ratios.detach().std(1, correction=0) < _FLAT
        loss = ratios.sum() * 0
        for beta, some in ((self.settings.beta, used & flat), (None, used & ~flat)):
            if some.any():
                share = some.sum() / len(examples)
                loss = loss + share * reg_grpo_loss(ratios[some], targets[some], beta=beta)
        yield loss, {"groups/on_policy": float(flat.float().mean())}
