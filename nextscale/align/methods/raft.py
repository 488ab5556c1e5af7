"""RAFT: fine-tune on the best of each group (best-of-N fine-tuning), the baseline of all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.method import Loss, Method, grouped
from nextscale.align.trajectory import Policy
from nextscale.align.units import trained_weights
from nextscale.errors import require


@dataclass(frozen=True, kw_only=True)
class RAFTConfig:
    """Settings of RAFT (arXiv 2304.06767)."""

    top_k: int = 1
    """Samples kept per group."""
    threshold: float | None = None
    """Keep only samples whose reward is at least this; None: any."""
    score: Literal["pair", "policy"] | None = None
    """What the likelihood is. policy: what the samples were drawn from, guidance included, per
    step. pair: without guidance, exact or the noised surrogate of diffusion; there guided samples
    teach the guidance itself, which then is applied once more. None: policy for next-scale models,
    pair for diffusion."""
    scale_weight: str = "token"
    """Weight of tokens: token, scale or power; see GRPO."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""

    def __post_init__(self) -> None:
        require("raft.top_k", self.top_k, self.top_k > 0, "be above 0")
        known = self.score in (None, "pair", "policy")
        require("raft.score", self.score, known, "be pair or policy")


class RAFT(Method):
    """-log pi of the best samples: exact, or the noised surrogate of diffusion.

    Differs from the paper: groups whose rewards are all equal are left out, and the likelihood of
    next-scale models is that of the guided policy.

    Args:
        settings: See there.
        policy: What is trained.
    """

    def __init__(self, settings: RAFTConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        scale_weight, alpha = settings.scale_weight, settings.scale_weight_alpha
        self.weights = trained_weights(policy, scale_weight, alpha)

    def items_per_group(self, num_generations: int) -> int:
        """`top_k` samples."""
        limit = f"be at most num_generations {num_generations}"
        require("raft.top_k", self.settings.top_k, self.settings.top_k <= num_generations, limit)
        return self.settings.top_k

    def learn(self, rollout: Rollout) -> Experience:
        """The best samples of each group; groups without differences teach nothing."""
        settings = self.settings
        total = grouped(rollout.total, rollout.groups)
        order = total.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)
        best = order[:, : settings.top_k]
        kept = total.gather(1, best)
        floor = -torch.inf if settings.threshold is None else settings.threshold
        differ = total.nan_to_num(-torch.inf).amax(1) > total.nan_to_num(torch.inf).amin(1)
        used = ((kept >= floor) & differ[:, None]).to(total).flatten()  # False for NaN
        first = torch.arange(len(total), device=total.device)[:, None] * total.shape[1]
        items = (first + best).flatten()[:, None]
        return Experience(rollout, items, used, metrics={"samples/used": float(used.mean())})

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """Mean over samples of the weighted mean over units of -log pi."""
        rows = experience.items[examples, 0]
        trajectory = experience.rollout.trajectory.index(rows)
        key = (*experience.rollout.key, step)
        generators = sample_streams(key, examples.tolist())
        score = self.settings.score or ("pair" if self.policy.kind == "gaussian" else "policy")
        if score == "policy":
            found = self.policy.evaluate(trajectory, self.policy.trained, network=network)
            logp, mask = found.logp, found.mask * self.weights.to(found.logp)[found.unit]
        else:
            logp, mask = self.policy.pair_score(trajectory, generators=generators, network=network)
            if logp.shape[1] == len(self.weights):
                mask = mask * self.weights.to(mask)
        nll = -(logp * mask).sum(1) / mask.sum(1)
        yield (nll * experience.weights[examples]).mean(), {"nll": float(nll.detach().mean())}
