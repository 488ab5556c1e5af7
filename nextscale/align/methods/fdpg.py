"""f-DPG (arXiv 2302.08215): approach the policy that a reward and a reference define."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import group_moments, informative
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig, check_nested
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.trajectory import Policy
from nextscale.errors import require

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence")


@dataclass(frozen=True, kw_only=True)
class FDPGConfig:
    """Settings of f-DPG."""

    divergence: str = "js_divergence"
    """f of the divergence from the target: reverse_kl, forward_kl or js_divergence."""
    reward_temperature: float = 0.3
    """beta of the target, reference x exp(reward / beta): the smaller, the farther away."""
    loss: GRPOConfig = field(default_factory=GRPOConfig)
    """Clipped loss and weights of scales."""

    def __post_init__(self) -> None:
        known = self.divergence in DIVERGENCES
        require("divergence", self.divergence, known, f"be one of {', '.join(DIVERGENCES)}")
        name, value = "reward_temperature", self.reward_temperature
        require(name, value, value > 0, "be above 0")
        check_nested("fdpg.loss", self.loss)
        for key in ("scale_rewards", "std_eps", "std_ddof"):
            value = getattr(self.loss, key)
            usual = value == getattr(GRPOConfig(), key)
            require(f"fdpg.loss.{key}", value, usual, "stay: f-DPG divides by no deviation")


def fdpg_rewards(
    log_ratio: Float[Tensor, " n"], rewards: Float[Tensor, " n"], beta: float, divergence: str
) -> Float[Tensor, " n"]:
    """-f'(pi / p) of samples of one prompt, p = reference exp(r / beta) / Z.

    With t = pi / p: reverse KL -log t - 1, forward KL 1 / t, Jensen-Shannon -log(2 t / (1 + t)).
    Z is the mean of (reference / pi) exp(r / beta) over the samples, which are pi's.

    Args:
        log_ratio: log pi - log reference of each sample.
        rewards: NaN is unscorable and stays so.
        beta: Temperature of the target.
        divergence: One of `DIVERGENCES`.
    """
    gain = rewards / beta - log_ratio  # log p - log pi, but for Z
    known = gain[~gain.isnan()]
    log_z = known.logsumexp(0) - math.log(max(len(known), 1))
    log_t = log_z - gain
    if divergence == "reverse_kl":
        return -log_t - 1
    if divergence == "forward_kl":
        return (-log_t).exp()
    return F.softplus(log_t) - log_t - math.log(2)


class FDPG(Method):
    """GRPO's clipped loss with `fdpg_rewards`, centred in each group, as advantages.

    Differences from the paper: Z is estimated from the few samples of each prompt, not by a moving
    average; the group's mean is the baseline; the clip holds repeated passes.

    Args:
        settings: See there.
        policy: What is trained.
    """

    needs_reference = True

    def __init__(self, settings: FDPGConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.objective = GRPO(settings.loss, policy)

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages from rewards and from where the policy already is."""
        log_ratio = self.objective.log_ratios(rollout, weighted=False)
        found = torch.empty_like(rollout.total)
        for group in range(int(rollout.groups.max()) + 1):
            rows = rollout.groups == group
            own = (log_ratio[rows].to(found), rollout.total[rows])
            beta, divergence = self.settings.reward_temperature, self.settings.divergence
            found[rows] = fdpg_rewards(*own, beta, divergence)
        mean = group_moments(found, rollout.groups, ddof=1)[0]
        advantages = (found - mean[rollout.groups]).nan_to_num(0.0)
        limit = self.settings.loss.advantage_clip
        if limit is not None:
            advantages = advantages.clamp(-limit, limit)
        items = torch.arange(len(found), device=found.device)[:, None]
        columns = {"advantages": advantages, "old_logps": old_logps(rollout)}
        useful = informative(advantages, rollout.groups).to(advantages)
        metrics = {"fdpg/log_ratio": float(log_ratio.mean())}
        return Experience(rollout, items, useful, columns, metrics)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The clipped loss of some samples."""
        yield from self.objective.losses(experience, examples, step, network)
