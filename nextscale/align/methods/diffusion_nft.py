"""DiffusionNFT (arXiv 2509.16117): the forward process learns from good and bad samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.advantages import group_advantages, informative
from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.method import Loss, Method
from nextscale.align.objectives.nft import diffusion_nft_loss
from nextscale.align.references import FrozenCopy
from nextscale.align.trajectory import Denoiser, Policy
from nextscale.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class DiffusionNFTConfig:
    """Settings of DiffusionNFT."""

    beta: float = 1.0
    """How far the implicit good and bad policies lie from the one that drew, (0, 1]; the paper has
    0.1 for several rewards."""
    advantage_clip: float = 5.0
    """Advantages of this size are wholly good or bad."""
    reference_weight: float = 1e-4
    """Of the squared distance to the reference's prediction; 0: no reference."""

    def __post_init__(self) -> None:
        require("diffusion_nft.beta", self.beta, 0 < self.beta <= 1, "lie in (0, 1]")
        for name, least in (("advantage_clip", 1e-6), ("reference_weight", 0.0)):
            value = getattr(self, name)
            require(f"diffusion_nft.{name}", value, value >= least, f"be {least} or more")


class DiffusionNFT(Method):
    """`diffusion_nft_loss` on noised final samples: no log-probabilities, so any sampler may draw.

    Each sample counts by r = (1 + clip(A / A_max, -1, 1)) / 2, A its advantage in the group, and
    the loss by A_max. Differences from the paper: rollouts are drawn by the weights as they are,
    which also are the old policy, where the paper draws with a moving average of them; rollouts
    keep the guidance that they are asked for, while the loss has none; the pull to the reference is
    measured in clean samples, not in velocities; networks that predict noise: see
    `Denoiser.errors`.

    Args:
        settings: See there.
        policy: What is trained.

    Raises:
        UserError: For next-scale models.
    """

    def __init__(self, settings: DiffusionNFTConfig, policy: Policy) -> None:
        if not isinstance(policy, Denoiser):
            raise UserError("method diffusion_nft is for diffusion; for next-scale models: nft")
        self.settings, self.policy = settings, policy
        self.needs_reference = settings.reference_weight > 0
        self.old = FrozenCopy(policy.network).module

    def learn(self, rollout: Rollout) -> Experience:
        """How good each sample is in its group; weight 0 without differences or a reward."""
        self.old.load_state_dict(self.policy.network.state_dict())
        advantages = group_advantages(rollout.total, rollout.groups)
        share = (1 + (advantages / self.settings.advantage_clip).clamp(-1, 1)) / 2
        items = torch.arange(len(share), device=share.device)[:, None]
        used = informative(advantages, rollout.groups) & ~rollout.total.isnan()
        return Experience(rollout, items, used.to(share), {"share": share})

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some samples, noised to one random time each."""
        settings, policy = self.settings, self.policy
        assert isinstance(policy, Denoiser)
        rows = experience.items[examples, 0]
        trajectory = experience.rollout.trajectory.index(rows)
        generators = sample_streams((*experience.rollout.key, step), examples.tolist())
        errors = policy.errors(trajectory, generators=generators, network=network)
        old = errors.detach()
        if step != experience.rollout.trajectory.model_version:
            with torch.no_grad(), policy.precision():
                old = policy.errors(trajectory, generators=generators, network=self.old)
        share = experience.columns["share"][rows]
        loss = diffusion_nft_loss(errors, old, share, beta=settings.beta)
        loss = settings.advantage_clip * loss
        metrics = {"share/mean": float(share.mean())}
        if self.needs_reference:
            with torch.no_grad(), policy.reference() as other:
                fixed = policy.errors(trajectory, generators=generators, network=other)
            distance = (errors - fixed).square().flatten(1).mean(1)
            loss = loss + settings.reference_weight * distance
            metrics["reference/distance"] = float(distance.detach().mean())
        yield (loss * experience.weights[examples]).mean(), metrics
