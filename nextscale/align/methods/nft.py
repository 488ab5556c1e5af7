"""NFT (arXiv 2505.18116): likelihood of right samples, and of what wrong ones leave over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.objectives.nft import nft_loss
from nextscale.align.trajectory import Policy
from nextscale.align.units import trained_weights
from nextscale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class NFTConfig:
    """Settings of NFT."""

    threshold: float = 0.5
    """A sample is right if its reward is at least this."""
    weighted: bool = False
    """Prompts of few right samples count more, by (1 - q) / q."""
    scale_weight: str = "token"
    """Weight of tokens: token, scale or power; see GRPO."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""


class NFT(Method):
    """`nft_loss` on the samples of a group, of which some must be right and some wrong.

    Differences from the paper's code: see `nft_loss`. For diffusion see `DiffusionNFT`.

    Args:
        settings: See there.
        policy: What is trained.

    Raises:
        UserError: For diffusion.
    """

    def __init__(self, settings: NFTConfig, policy: Policy) -> None:
        if policy.kind == "gaussian":
            raise UserError("method nft needs likelihoods of tokens; for diffusion: diffusion_nft")
        self.settings, self.policy = settings, policy
        self.weights = trained_weights(policy, settings.scale_weight, settings.scale_weight_alpha)

    def learn(self, rollout: Rollout) -> Experience:
        """Verdicts and their share in each group; groups of one verdict have weight 0."""
        known = ~rollout.total.isnan()
        right = ((rollout.total >= self.settings.threshold) & known).to(rollout.total)
        zeros = right.new_zeros(int(rollout.groups.max()) + 1)
        counts = zeros.index_add(0, rollout.groups, known.to(right)).clamp_min(1)
        share = (zeros.index_add(0, rollout.groups, right) / counts)[rollout.groups]
        used = (known & (share > 0) & (share < 1)).to(right)
        items = torch.arange(len(right), device=right.device)[:, None]
        columns = {"right": right, "share": share, "old_logps": old_logps(rollout)}
        metrics = {"samples/right": float(right[known].mean()) if known.any() else 0.0}
        return Experience(rollout, items, used, columns, metrics)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some samples."""
        chosen = examples[experience.weights[examples] > 0]
        rows = experience.items[chosen if len(chosen) else examples[:1], 0]
        trajectory = experience.rollout.trajectory.index(rows)
        found = self.policy.evaluate(trajectory, self.policy.trained, network=network)
        own = {name: column[rows] for name, column in experience.columns.items()}
        old = own["old_logps"][:, found.unit] if "old_logps" in own else found.logp.detach()
        mask = found.mask * self.weights.to(found.logp)[found.unit]
        share = own["share"].clamp(1e-6, 1 - 1e-6)
        loss = nft_loss(found.logp, old, own["right"], share, mask, weighted=self.settings.weighted)
        yield loss * len(chosen) / len(examples), {}
