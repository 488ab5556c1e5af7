"""SePPO (arXiv 2410.05255): pictures of a data set against what the model draws by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.method import Loss, Method, grouped
from nextscale.align.objectives import seppo_loss
from nextscale.align.prompts import DatasetPicture, Prompt
from nextscale.align.rewards.reward import AnyReward
from nextscale.align.trajectory import Policy, Trajectory, map_rows
from nextscale.align.units import trained_weights
from nextscale.errors import UserError, require

_AT_ONCE = 16  # samples that are judged together


@dataclass(frozen=True, kw_only=True)
class SePPOConfig:
    """Settings of SePPO."""

    beta: float | None = None
    """Pull towards the policy that drew the rollout; None: 0.1, or 5000 for diffusion, see DPO."""
    flip: bool = True
    """Samples that the policy has come to find likelier count as good; off: SPIN."""
    scale_weight: str = "scale"
    """Weight of tokens: token, scale or power; see GRPO. Sums over hundreds of tokens would
    saturate the loss."""
    scale_weight_alpha: float = 0.5
    """Exponent of power."""

    def __post_init__(self) -> None:
        require("seppo.beta", self.beta, self.beta is None or self.beta > 0, "be above 0")


class SePPO(Method):
    """`seppo_loss` of each sample against the picture that came with its prompt.

    Prompts are of examples:DATASET. Rewards are only measured. Left out of the paper: the bank of
    checkpoints, of which it draws one by chance; here the earlier policy is the one that drew the
    rollout (the paper's latest checkpoint), and its scores are computed then, so that it need not
    be kept. So on the first step after a rollout no sample is liked better than before: signs
    turn in later steps alone (`num_iterations`, or several steps to a rollout). For diffusion a
    pair has one time and noise for all passes over its rollout. The paper's code is not public in
    full: the sign rule is our reading.

    Args:
        settings: See there.
        policy: What is trained.
    """

    needs_rewards = False

    def __init__(self, settings: SePPOConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.beta = settings.beta or (5000.0 if policy.kind == "gaussian" else 0.1)
        self.weights = trained_weights(policy, settings.scale_weight, settings.scale_weight_alpha)

    def check(
        self, prompts: Sequence[Prompt], rewards: Sequence[tuple[AnyReward, float]], mode: str
    ) -> None:
        """Refuse prompts without a picture; see `Method.check`."""
        check_pictures(prompts)

    def learn(self, rollout: Rollout) -> Experience:
        """Scores of samples and given pictures by the policy that drew; all samples count."""
        items = torch.arange(len(rollout.groups), device=rollout.groups.device)[:, None]
        self.given = self._given(rollout)
        parts = items[:, 0].split(_AT_ONCE)
        with torch.enable_grad():  # the same kernels as in training
            scores = [self._scores(rollout, rows, self.policy.network).detach() for rows in parts]
        old = torch.cat(scores)
        return Experience(rollout, items, torch.ones_like(rollout.total), {"old": old})

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some pairs."""
        rows = experience.items[examples, 0]
        scores = self._scores(experience.rollout, rows, network)
        old = experience.columns["old"][rows]
        if step == experience.rollout.trajectory.model_version:
            old = scores.detach()  # the same policy: a rounding error must not decide the sign
        given, drawn = (scores - old).unbind(1)
        loss, sign = seppo_loss(given, drawn, beta=self.beta, flip=self.settings.flip)
        metrics = {
            "ratios/given": float(given.detach().mean()),
            "ratios/drawn": float(drawn.detach().mean()),
            "samples/good": float((sign < 0).float().mean()),
        }
        yield loss.mean(), metrics

    def _given(self, rollout: Rollout) -> Trajectory:
        """The pictures that came with the prompts, one for each group."""
        images = rollout.trajectory.images
        assert images is not None
        each = grouped(rollout.total, rollout.groups).shape[1]
        pictures = check_pictures(rollout.prompts[::each])
        pixels = [picture.load(images.shape[2]) for picture in pictures]
        conditions = map_rows(rollout.trajectory.conditions, lambda rows: rows[::each])
        found = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return self.policy.trajectory_of(found.to(images.device).float() / 255, conditions)

    def _scores(
        self, rollout: Rollout, rows: Int[Tensor, " n"], network: nn.Module
    ) -> Float[Tensor, "n 2"]:
        """Weighted sums of given pictures' and samples' scores; a pair shares its noise."""
        generators = sample_streams(rollout.key, rows.tolist())
        sides = self.given.index(rollout.groups[rows]), rollout.trajectory.index(rows)
        sums = []
        for side in sides:
            logp, mask = self.policy.pair_score(side, generators=generators, network=network)
            if logp.shape[1] == len(self.weights):
                mask = mask * self.weights.to(logp)
            sums.append((logp * mask).sum(1))
        return torch.stack(sums, dim=1)


def check_pictures(prompts: Sequence[Prompt]) -> list[DatasetPicture]:
    """The pictures that came with prompts.

    Raises:
        UserError: If one has none.
    """
    found = []
    for prompt in prompts:
        picture = prompt.metadata.get("picture")
        if not isinstance(picture, DatasetPicture):
            raise UserError(
                f'seppo compares samples with given pictures, and "{prompt.condition}" has none: '
                "use prompts such as examples:scenes"
            )
        found.append(picture)
    return found
