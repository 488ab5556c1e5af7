"""DPO on samples of the policy itself: the best of a group against the worst, or on given pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.method import Loss, Method, grouped
from nextscale.align.objectives.dpo import check_settings, dpo_loss, dpo_metrics
from nextscale.align.trajectory import Policy, Trajectory
from nextscale.align.units import trained_weights
from nextscale.errors import require


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Settings of DPO; names and defaults as in trl 1.16."""

    loss_type: str = "sigmoid"
    """sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard,
    apo_zero, apo_down or sft."""
    beta: float | None = None
    """Pull towards the reference; None: 0.1 (trl), or 5000 with the noised surrogate of diffusion,
    whose scores are -0.5 times a mean squared error (without the 0.5, as in diffusers' script, this
    is 2500)."""
    f_divergence_type: str = "reverse_kl"
    """reverse_kl, forward_kl, js_divergence or alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence."""
    label_smoothing: float = 0.0
    """Share of pairs that are the wrong way round."""
    rpo_alpha: float = 0.0
    """RPO: weight of -log pi(chosen) beside the preference loss."""
    margin: float = 0.0
    """Smallest difference of rewards in a pair of an online rollout."""
    pairs_per_group: int = 1
    """Of an online rollout: the best against the worst, the second best against the second worst,
    and so on."""
    score: Literal["pair", "policy"] = "pair"
    """What the likelihoods are: pair: without guidance, exact for next-scale models and a noised
    surrogate for diffusion; policy: what the policy draws from, guidance included, per step."""
    scale_weight: str = "scale"
    """Weight of tokens (pair scores of next-scale models): token, scale or power; see GRPO. Sums
    over hundreds of tokens would saturate the loss."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""

    def __post_init__(self) -> None:
        choices = {
            "score": ("pair", "policy"),
            "scale_weight": ("token", "scale", "power"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(f"dpo.{name}", value, value in allowed, f"be one of {', '.join(allowed)}")
        divergence, alpha = self.f_divergence_type, self.f_alpha_divergence_coef
        check_settings(self.loss_type, divergence, alpha, self.label_smoothing)
        require("dpo.beta", self.beta, self.beta is None or self.beta > 0, "be above 0")
        require("dpo.rpo_alpha", self.rpo_alpha, self.rpo_alpha >= 0, "be 0 or more")
        require("dpo.margin", self.margin, self.margin >= 0, "be 0 or more")
        require("dpo.pairs_per_group", self.pairs_per_group, self.pairs_per_group > 0, "be above 0")


class DPO(Method):
    """`dpo_loss` on pairs of samples.

    Args:
        settings: See there.
        policy: What is trained.
    """

    needs_reference = True

    def __init__(self, settings: DPOConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        noised = policy.kind == "gaussian" and settings.score == "pair"
        self.beta = settings.beta or (5000.0 if noised else 0.1)
        scale_weight, alpha = settings.scale_weight, settings.scale_weight_alpha
        self.weights = trained_weights(policy, scale_weight, alpha)

    def items_per_group(self, num_generations: int) -> int:
        """`pairs_per_group` pairs of two samples each."""
        pairs = self.settings.pairs_per_group
        limit = f"be at most half of num_generations {num_generations}"
        require("dpo.pairs_per_group", pairs, 2 * pairs <= num_generations, limit)
        return pairs

    def learn(self, rollout: Rollout) -> Experience:
        """The best samples of each group and its worst; a pair within the margin has weight 0."""
        total = grouped(rollout.total, rollout.groups)
        pairs = self.settings.pairs_per_group
        best = total.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :pairs]
        worst = total.nan_to_num(torch.inf).argsort(dim=1, stable=True)[:, :pairs]
        used = (total.gather(1, best) - total.gather(1, worst)) > self.settings.margin  # not NaN
        first = torch.arange(len(total), device=total.device)[:, None] * total.shape[1]
        items = torch.stack([first + best, first + worst], dim=2).flatten(0, 1)
        weights = used.to(total).flatten()
        return Experience(rollout, items, weights, metrics={"pairs/used": float(weights.mean())})

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """`dpo_loss` of some pairs."""
        pairs = experience.items[examples]
        trajectory = experience.rollout.trajectory.index(pairs.T.flatten())
        streams = [*experience.rollout.key, step]
        generators = sample_streams(tuple(streams), examples.tolist() * 2)
        yield self.pair_loss(trajectory, generators, network, experience.weights[examples])

    def pair_loss(
        self,
        trajectory: Trajectory,
        generators: Sequence[torch.Generator],
        network: nn.Module,
        weight: Float[Tensor, " n"] | None = None,
    ) -> Loss:
        """The loss of a trajectory whose first half is chosen and whose second half rejected.

        Args:
            trajectory: 2 n samples.
            generators: 2 n; pair i has equal ones at i and n + i.
            network: The wrapped module of the training loop.
            weight: Of each pair.
        """
        logp, ref_logp, mask = self.scores(trajectory, generators, network)
        chosen, rejected = logp.chunk(2)
        ref_chosen, ref_rejected = ref_logp.chunk(2)
        sides = (chosen, rejected, ref_chosen, ref_rejected, *mask.chunk(2))
        settings = self.settings
        loss = dpo_loss(
            *sides,
            loss_type=settings.loss_type,
            beta=self.beta,
            f_divergence_type=settings.f_divergence_type,
            f_alpha_divergence_coef=settings.f_alpha_divergence_coef,
            label_smoothing=settings.label_smoothing,
            rpo_alpha=settings.rpo_alpha,
            weight=weight,
        )
        return loss, dpo_metrics(*sides, beta=self.beta, weight=weight)

    def scores(
        self, trajectory: Trajectory, generators: Sequence[torch.Generator], network: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihoods under policy and reference, and the units' weights, [2 n, U] each."""
        if self.settings.score == "policy":
            need, trained = ("logp", "ref_logp"), self.policy.trained
            ev = self.policy.evaluate(trajectory, trained, need=need, network=network)
            assert ev.ref_logp is not None
            mask = ev.mask.to(ev.logp) * self.weights.to(ev.logp)[ev.unit]
            return ev.logp, ev.ref_logp, mask
        # The streams are not advanced, so policy and reference see the same noise.
        logp, mask = self.policy.pair_score(trajectory, generators=generators, network=network)
        ref_logp, _ = self.policy.pair_score(trajectory, generators=generators, reference=True)
        if logp.shape[1] == len(self.weights):
            mask = mask * self.weights.to(mask)
        return logp, ref_logp, mask
