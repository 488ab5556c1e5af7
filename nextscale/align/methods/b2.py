"""B2-DiffuRL (arXiv 2503.11240): train the last steps first, judged among branches of one prefix.

Siblings share every step before the interval bit for bit, so that what makes one better than the
other lies in the steps that are trained. The interval grows backwards, stage by stage, until it
is the whole trajectory. On next-scale models it is the last scales, and the cache of the prefix
is used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import group_advantages, group_moments, informative
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig, check_nested
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.trajectory import Policy
from nextscale.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class B2Config:
    """Settings of B2-DiffuRL; defaults as released but for `num_stages` and `loss.epsilon`."""

    num_branches: int = 4
    """Completions of each prefix, `split_time` (3 in the released configuration, 5 in its script).
    A group then has num_generations x num_branches samples."""
    first_interval: int | None = None
    """Steps trained in the first stage, the last ones of those that are random (or of
    `train_scales`); None: 0.7 of the denoising steps (14 of 20), 3 scales."""
    last_interval: int | None = None
    """Steps trained in the last stage; None: all."""
    num_stages: int = 20
    """Stages N over which the interval grows: tau_i = first + floor(i (last - first + 1) / N); 100
    in the released code."""
    stage_rollouts: int = 1
    """Rollouts per stage."""
    min_spread: float = 0.0
    """End an interval early once the mean deviation of rewards within a branch is below this: late
    steps may change nothing that the reward sees. 0: off."""
    advantage: Literal["extremes", "branch"] = "extremes"
    """extremes: of each branch the best and the worst sample, if their z-scores among the prompt's
    scores pass `threshold`. branch: every sample against the mean of its branch."""
    threshold: float = 0.5
    """z-score from which on an extreme counts (0.7 in the released configuration)."""
    history: int = 8
    """Earlier stages whose scores of a prompt count in its z-scores."""
    positive_weight: float = 1.0
    """beta_1, of advantages above 0."""
    negative_weight: float = 1.0
    """beta_2, of the others."""
    loss: GRPOConfig = field(default_factory=lambda: GRPOConfig(advantage_clip=5.0))
    """The clipped loss of the interval. The epsilon of 0.1 of the released code never clips: its
    log-probabilities are means over latent dimensions."""

    def __post_init__(self) -> None:
        require("b2.num_branches", self.num_branches, self.num_branches > 1, "be above 1")
        for name in ("first_interval", "last_interval", "num_stages", "stage_rollouts"):
            value = getattr(self, name)
            require(f"b2.{name}", value, value is None or value > 0, "be above 0")
        for name in ("min_spread", "threshold", "history", "positive_weight", "negative_weight"):
            value = getattr(self, name)
            require(f"b2.{name}", value, value >= 0, "be 0 or more")
        known = self.advantage in ("extremes", "branch")
        require("b2.advantage", self.advantage, known, "be extremes or branch")
        check_nested("b2.loss", self.loss)


class B2(Method):
    """GRPO's loss on the last steps of branches; see `B2Config`.

    Differences from the released code: prompts are drawn from any list, so that a prompt may have
    no history yet; a stage without stochastic steps is refused, no timestep is moved.

    Args:
        settings: See there.
        policy: What is trained.

    Raises:
        UserError: For intervals that the policy does not have.
    """

    def __init__(self, settings: B2Config, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.objective = GRPO(settings.loss, policy)
        self.needs_reference = self.objective.needs_reference
        steps = len(policy.trained)
        if not steps:
            raise UserError(
                "no step of this sampler is random, so B2-DiffuRL has none to branch at. Set "
                "diffusion.eta (or diffusion.noise_level) above 0"
            )
        last = settings.last_interval or steps
        usual = max(1, round(0.7 * steps)) if policy.kind == "gaussian" else 3
        first = settings.first_interval or min(usual, last)
        limit = f"be at most the {steps} steps that are trained"
        require("b2.last_interval", last, last <= steps, limit)
        require("b2.first_interval", first, first <= last, f"be at most last_interval {last}")
        self.first, self.last = first, last
        self.stage, self._rollouts, self._entered = 0, 0, 0
        self._history: dict[str, list[tuple[int, list[float]]]] = {}

    def interval(self, stage: int) -> int:
        """tau_i, the number of steps that are trained in a stage."""
        grown = stage * (self.last - self.first + 1) // self.settings.num_stages
        return min(self.first + grown, self.last)

    def items_per_group(self, num_generations: int) -> int:
        """Two of each branch, or all."""
        extremes = self.settings.advantage == "extremes"
        return num_generations * (2 if extremes else self.settings.num_branches)

    def branch(self) -> Sequence[tuple[int, int]]:
        """Where the current interval begins."""
        return ((self.policy.trained[-self.interval(self.stage)], self.settings.num_branches),)

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages within branches; moves on to the next stage when this one is over."""
        settings, count = self.settings, self.settings.num_branches
        branches = torch.arange(len(rollout.total), device=rollout.total.device) // count
        scorable = (~rollout.total.isnan()).view(-1, count).sum(1) > 1
        spread = float(group_moments(rollout.total, branches, ddof=1)[1][scorable].mean())
        metrics = {"b2/stage": float(self.stage), "b2/interval": float(self.interval(self.stage))}
        if scorable.any():
            metrics["b2/spread"] = spread
        if settings.advantage == "extremes":
            scores = self._z_scores(rollout)
            items, used = extremes(scores.view(-1, count), settings.threshold)
        else:
            scores = group_advantages(
                rollout.total,
                branches,
                scale_rewards=settings.loss.scale_rewards,
                std_eps=settings.loss.std_eps,
                std_ddof=settings.loss.std_ddof,
            )
            items = torch.arange(len(scores), device=scores.device)
            used = informative(scores, branches)
        limit = settings.loss.advantage_clip
        advantages = (
            scores.nan_to_num(0.0) if limit is None else scores.nan_to_num(0.0).clamp(-limit, limit)
        )
        weights = (settings.negative_weight, settings.positive_weight)
        advantages = advantages * advantages.new_tensor(weights)[(advantages > 0).long()]
        metrics["samples/used"] = float(used.float().mean())
        self._advance(spread)
        columns = {"advantages": advantages, "old_logps": old_logps(rollout)}
        return Experience(rollout, items[:, None], used.to(advantages), columns, metrics)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The clipped loss of the steps from the branch point on."""
        first = experience.rollout.trajectory.parent_step
        yield from self.objective.losses(experience, examples, step, network, first_step=first)

    # ---- state ---------------------------------------------------------------------------------

    def _z_scores(self, rollout: Rollout) -> Float[Tensor, " b"]:
        """(r - mean) / (std + 1e-8) of each prompt's scores in this and the last stages."""
        scores = torch.empty_like(rollout.total)
        for group in range(int(rollout.groups.max()) + 1):
            rows = rollout.groups == group
            own = rollout.total[rows]
            key = str(rollout.prompts[int(rows.nonzero()[0])].asked)
            oldest = self._entered - self.settings.history
            past = [entry for entry in self._history.get(key, []) if entry[0] >= oldest]
            known = own.new_tensor([value for _, values in past for value in values])
            every = torch.cat([known, own[~own.isnan()]])
            if not len(every):
                scores[rows] = torch.nan
                continue
            mean, std = group_moments(every, torch.zeros_like(every, dtype=torch.long), ddof=1)
            scores[rows] = (own - mean) / (std + 1e-8)
            self._history[key] = [*past, (self._entered, own[~own.isnan()].tolist())]
        return scores

    def _advance(self, spread: float) -> None:
        """On to the next stage, or over all stages of this interval."""
        self._rollouts += 1
        flat = spread < self.settings.min_spread  # False where nothing could be scored, NaN
        if not flat and self._rollouts < self.settings.stage_rollouts:
            return
        now, self._rollouts = self.interval(self.stage), 0
        self.stage += 1
        self._entered += 1
        while flat and self.interval(self.stage) == now < self.last:
            self.stage += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        numbers = {"stage": self.stage, "rollouts": self._rollouts, "entered": self._entered}
        return {**numbers, "history": self._history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.stage, self._rollouts = int(state["stage"]), int(state["rollouts"])
        self._entered = int(state["entered"])
        self._history = {k: [(n, v) for n, v in past] for k, past in state["history"].items()}


def extremes(
    scores: Float[Tensor, "p n"], threshold: float
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """The best and the worst of each branch, and whether they are good and bad enough.

    Args:
        scores: z-scores, one row per branch; NaN is unscorable.
        threshold: The best counts if z >= threshold, the worst if z < -threshold.

    Returns:
        Rows of the flattened scores, best and worst of each branch in turns; 1 where one counts.
    """
    best = scores.nan_to_num(-torch.inf).argmax(1)
    worst = scores.nan_to_num(torch.inf).argmin(1)
    chosen = torch.stack([best, worst], dim=1)
    values = scores.gather(1, chosen)
    used = torch.stack([values[:, 0] >= threshold, values[:, 1] < -threshold], dim=1)
    first = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
    return (first + chosen).flatten(), used.flatten().to(scores)
