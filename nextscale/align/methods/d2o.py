"""D2O (arXiv 2403.03419): away from bad samples, towards what the model draws otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.method import Loss, Method, grouped
from nextscale.align.objectives.d2o import d2o_loss
from nextscale.align.trajectory import Policy
from nextscale.align.units import trained_weights
from nextscale.errors import require


@dataclass(frozen=True, kw_only=True)
class D2OConfig:
    """Settings of D2O."""

    beta: float = 0.1
    """Pull towards the model's other samples."""
    alpha: float = 0.1
    """Push away from the negative."""
    threshold: float | None = None
    """Only samples of a lower reward are negatives; None: the worst of each group."""
    scale_weight: str = "scale"
    """Weight of tokens: token, scale or power; see GRPO. Sums over hundreds of tokens would
    saturate the loss."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""

    def __post_init__(self) -> None:
        for name in ("beta", "alpha"):
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")


class D2O(Method):
    """`d2o_loss` of whole groups: the worst sample against all others; a batch counts groups.

    Differences from the paper, whose negatives are given: they are the model's own, and both
    references are the model before training.

    Args:
        settings: See there.
        policy: What is trained.
    """

    needs_reference = True

    def __init__(self, settings: D2OConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.weights = trained_weights(policy, settings.scale_weight, settings.scale_weight_alpha)

    def items_per_group(self, num_generations: int) -> int:
        """The group is one example."""
        return 1

    def learn(self, rollout: Rollout) -> Experience:
        """Groups with the worst sample first; without one below the others they have weight 0."""
        total = grouped(rollout.total, rollout.groups)
        order = total.nan_to_num(torch.inf).argsort(dim=1, stable=True)
        known = total.gather(1, order)
        limit = self.settings.threshold
        used = known[:, 0] < (
            known[:, 1:].nan_to_num(-torch.inf).amax(1) if limit is None else limit
        )
        first = torch.arange(len(total), device=total.device)[:, None] * total.shape[1]
        weights = used.to(total)
        return Experience(
            rollout, first + order, weights, metrics={"groups/negative": float(weights.mean())}
        )

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some groups."""
        used = experience.weights[examples] > 0
        chosen = examples[used] if used.any() else examples[:1]
        items = experience.items[chosen]
        trajectory = experience.rollout.trajectory.index(items.flatten())
        need, trained = ("logp", "ref_logp"), self.policy.trained
        found = self.policy.evaluate(trajectory, trained, need=need, network=network)
        assert found.ref_logp is not None
        mask = found.mask * self.weights.to(found.logp)[found.unit]
        sides = [(x * mask).sum(1).view(items.shape) for x in (found.logp, found.ref_logp)]
        (bad, own), (bad_ref, own_ref) = ((x[:, 0], x[:, 1:]) for x in sides)
        settings = self.settings
        loss = d2o_loss(own, own_ref, bad, bad_ref, beta=settings.beta, alpha=settings.alpha)
        metrics = {
            "logps/own": float((own - own_ref).detach().mean()),
            "logps/negative": float((bad - bad_ref).detach().mean()),
        }
        yield loss * used.sum() / len(examples), metrics
