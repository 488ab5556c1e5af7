"""R0 and DRaFT: the gradient of differentiable rewards, through the last steps of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.method import Loss, Method
from nextscale.align.prompts import Prompt
from nextscale.align.rewards import combine
from nextscale.align.rewards.reward import AnyReward, CheckedReward
from nextscale.align.trajectory import Policy, Redrawing
from nextscale.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class R0Config:
    """Settings of R0."""

    last_steps: int = 1
    """Steps with a gradient (DRaFT-K's K): denoising steps; next-scale models have 1, the last
    scale."""
    weight_decay_to_start: float = 0.0
    """Pull of all trained weights towards where they began: this times half the squared distance;
    0: none (DRaFT)."""

    def __post_init__(self) -> None:
        require("r0.last_steps", self.last_steps, self.last_steps > 0, "be above 0")
        pull = self.weight_decay_to_start
        require("r0.weight_decay_to_start", pull, pull >= 0, "be 0 or more")


class R0(Method):
    """Rewards by their own gradient (R0, arXiv 2503.13070; DRaFT-K, arXiv 2309.17400).

    The first steps of a rollout stay, and the last ones are drawn again with a gradient.

    Experimental. Differences from R0: no step is trained beside those at the end, the generator is
    not made a few-step one, and of its regularisation only the pull to the first weights is here.
    Next-scale models draw tokens, so the gradient of the last scale's is that of the
    straight-through Gumbel-softmax (arXiv 1611.01144), which is biased.

    Args:
        settings: See there.
        policy: What is trained.

    Raises:
        UserError: If the policy cannot draw with a gradient, or not so many steps.
    """

    def __init__(self, settings: R0Config, policy: Policy) -> None:
        if not isinstance(policy, Redrawing):
            raise UserError("method r0 trains generators, not starts")
        most = policy.most_redrawn
        fits = settings.last_steps <= most
        require("r0.last_steps", settings.last_steps, fits, f"be at most {most} for this model")
        self.settings, self.policy = settings, policy
        trained = [p for p in policy.network.parameters() if p.requires_grad]
        self.began = [p.detach().clone() for p in trained] if settings.weight_decay_to_start else []

    def check(
        self, prompts: Sequence[Prompt], rewards: Sequence[tuple[AnyReward, float]], mode: str
    ) -> None:
        """Refuse rewards without a gradient; see `Method.check`."""
        for reward, weight in rewards:
            if weight and not (isinstance(reward, CheckedReward) and reward.differentiable):
                raise UserError(
                    f'method r0 needs rewards with a gradient, and "{reward.name}" has none; '
                    "brightness, color and classifier do, and as_reward(..., differentiable=True)"
                )
        if mode == "majority":
            raise UserError("reward_mode majority has no gradient: method r0 takes sum or min")

    def learn(self, rollout: Rollout) -> Experience:
        """All samples."""
        items = torch.arange(len(rollout.total), device=rollout.total.device)[:, None]
        return Experience(rollout, items, torch.ones_like(rollout.total))

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """Minus the rewards of some samples, whose last steps have other noise each time."""
        rollout, policy = experience.rollout, self.policy
        assert isinstance(policy, Redrawing)
        rows = experience.items[examples, 0]
        chosen = [rollout.prompts[row] for row in rows.tolist()]
        pictures = policy.redraw(
            rollout.trajectory.index(rows),
            self.settings.last_steps,
            generators=sample_streams((*rollout.key, step), examples.tolist()),
            network=network,
        )
        texts, metadata = [p.condition for p in chosen], [p.metadata for p in chosen]
        counted = [(w, r) for w, r in zip(rollout.weights, rollout.scored_by, strict=True) if w]
        columns = [
            r(pictures, texts, metadata).values for _, r in counted if isinstance(r, CheckedReward)
        ]
        total = combine(torch.stack(columns, dim=1), [w for w, _ in counted], rollout.mode)
        known = ~total.isnan()
        loss = -total.where(known, 0.0).sum() / len(rows)
        if self.began:
            now = (p for p in policy.network.parameters() if p.requires_grad)
            pairs = zip(now, self.began, strict=True)
            distance = torch.stack([(p - start).square().sum() for p, start in pairs]).sum()
            loss = loss + 0.5 * self.settings.weight_decay_to_start * distance
        yield loss, {"redrawn/reward": total.detach().nanmean()}
