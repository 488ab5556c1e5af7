"""What a method decides: how to branch, what to keep of a rollout, and the loss of an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout
from nextscale.align.prompts import Prompt
from nextscale.align.rewards.reward import AnyReward
from nextscale.errors import UserError

Loss = tuple[Tensor, Mapping[str, float | Tensor]]


class Method(ABC):
    """A way to learn from scored samples. If it has a `state_dict`, that is in the checkpoints.

    Attributes:
        needs_reference: Whether the policy must have a reference.
        needs_rewards: Whether rewards teach; otherwise they are only measured.
    """

    needs_reference: bool = False
    needs_rewards: bool = True

    def check(
        self, prompts: Sequence[Prompt], rewards: Sequence[tuple[AnyReward, float]], mode: str
    ) -> None:
        """Refuse what it cannot learn from, before anything is drawn.

        Args:
            prompts: All that may be drawn.
            rewards: With their weights.
            mode: How they are combined.

        Raises:
            UserError: Says which.
        """
        return

    def items_per_group(self, num_generations: int) -> int:
        """Examples that a group of a rollout gives, by which data are counted: its samples."""
        return num_generations

    def branch(self) -> Sequence[tuple[int, int]]:
        """Where samples of a rollout branch, and into how many: nowhere; see `collect`."""
        return ()

    @abstractmethod
    def learn(self, rollout: Rollout) -> Experience:
        """Choose examples, and compute what depends on the whole rollout."""

    @abstractmethod
    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some examples, in one or more parts whose gradients add up.

        Args:
            experience: From `learn`.
            examples: Rows of `experience.items`.
            step: Optimizer step, for the streams of noise.
            network: The wrapped module of the training loop.
        """


def old_logps(rollout: Rollout) -> Float[Tensor, "b u"]:
    """Log-probabilities of all units under the policy when it drew the rollout."""
    parts = rollout.trajectory.logps
    return torch.cat([logp if logp.ndim == 2 else logp[:, None] for logp in parts], dim=1)


def grouped(values: Float[Tensor, " b"], groups: Int[Tensor, " b"]) -> Float[Tensor, "p g"]:
    """One row per group, for groups of equal size that lie in a row.

    Raises:
        UserError: If they do not.
    """
    count = int(groups.max()) + 1
    rows = groups.view(count, -1)
    if not bool((rows == rows[:, :1]).all()):
        raise UserError("the groups of a rollout must be of one size, one after the other")
    return values.view(count, -1)
