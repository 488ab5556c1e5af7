"""What a policy draws and what it says about it later: the types that every method shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.references import Reference

Kind = Literal["categorical", "gaussian"]


@dataclass(frozen=True)
class Trajectory:
    """B samples of a policy as S stochastic steps each, replayable.

    A step is a scale of a next-scale transformer or a denoising transition. Scales are numbered
    0..K-1 and denoising steps 0..S-1 in the order of sampling.

    Attributes:
        kind: categorical (actions are tokens) or gaussian (actions are latents).
        conditions: What `Policy.encode` returned, one row per sample.
        actions: S entries: token maps [B, n_k], or the latents after each step [B, ...].
        logps: S entries, under the policy when it drew them: [B, n_k] per token, or [B] per step.
        stochastic: Per step; log-probabilities of the others mean nothing and count nowhere.
        guidance: Guidance of each step, as used.
        settings: What else the policy's distribution depended on (temperature, filters, which
            logits), as used.
        start: Latents before step 0 [B, ...]; None if the start is not drawn.
        branch_id: [B], the number of the sample's origin: siblings of a branch share it.
        parent_step: Steps before it are identical in siblings; 0: independent samples.
        model_version: Optimizer steps of the weights that drew it.
        images: [B, 3, H, W] in [0, 1], once decoded.
    """

    kind: Kind
    conditions: Any
    actions: list[Tensor]
    logps: list[Tensor]
    stochastic: tuple[bool, ...]
    guidance: tuple[float, ...]
    settings: Mapping[str, Any]
    start: Tensor | None = None
    branch_id: Int[Tensor, " b"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    parent_step: int = 0
    model_version: int = 0
    images: Float[Tensor, "b 3 H W"] | None = None

    def __post_init__(self) -> None:
        if not len(self.branch_id):
            object.__setattr__(self, "branch_id", torch.arange(len(self)))

    def __len__(self) -> int:
        return len(self.actions[0])

    def _map(self, change: Callable[[Any], Any]) -> Trajectory:
        """The trajectory with a function applied to everything that has one row per sample."""
        rows = ("conditions", "actions", "logps", "start", "branch_id", "images")
        return replace(self, **{name: map_rows(getattr(self, name), change) for name in rows})

    def index(self, rows: Tensor | slice) -> Trajectory:
        """Some of the samples."""
        return self._map(lambda tensor: tensor[rows])

    def repeat_interleave(self, count: int) -> Trajectory:
        """Each sample `count` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: torch.device | str) -> Trajectory:
        """On another device."""
        return self._map(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """One after the other; branch ids are renumbered so that parts share none."""
        first = parts[0]
        if len(parts) == 1:
            return first
        rows = ("conditions", "actions", "logps", "start", "images")
        joined = {name: cat_rows([getattr(part, name) for part in parts]) for name in rows}
        ids, offset = [], 0
        for part in parts:
            ids.append(part.branch_id + offset)
            offset += int(part.branch_id.max()) + 1
        return replace(first, **joined, branch_id=torch.cat(ids))


def map_rows(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested lists, tuples and dicts; None stays."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else change(value)
    if isinstance(value, Mapping):
        return {key: map_rows(entry, change) for key, entry in value.items()}
    return type(value)(map_rows(entry, change) for entry in value)


def num_rows(value: Any) -> int:
    """Rows of the tensors in nested lists, tuples and dicts."""
    while not isinstance(value, Tensor):
        entries = value.values() if isinstance(value, Mapping) else value
        value = next(entry for entry in entries if entry is not None)
    return len(value)


def cat_rows(values: Sequence[Any]) -> Any:
    """Concatenate tensors of equally nested lists, tuples and dicts along their rows."""
    first = values[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else torch.cat(list(values))
    if isinstance(first, Mapping):
        return {key: cat_rows([value[key] for value in values]) for key in first}
    return type(first)(cat_rows(entries) for entries in zip(*values, strict=True))


@dataclass
class StepEval:
    """What a policy's current weights say about given samples.

    A unit is a token (next-scale) or a step (diffusion); the U of them that were looked at contain
    those that were asked for.

    Attributes:
        logp: [B, U], natural logarithm, with gradient.
        unit: [U], number of each among all units of a trajectory.
        step: [U], the step of each unit.
        mask: [B, U], True where the unit was drawn at random and was asked for.
        ref_logp: [B, U], under the reference, if asked for.
        kl: [B, U], exact KL(policy || reference) in nats, with gradient, if asked for.
        entropy: [B, U] in nats, if asked for.
    """

    logp: Float[Tensor, "b u"]
    unit: Int[Tensor, " u"]
    step: Int[Tensor, " u"]
    mask: Tensor
    ref_logp: Float[Tensor, "b u"] | None = None
    kl: Float[Tensor, "b u"] | None = None
    entropy: Float[Tensor, "b u"] | None = None


@runtime_checkable
class Policy(Protocol):
    """A generator whose samples have log-probabilities.

    All methods leave the modules' train and eval flags and the global random state as they are.

    Attributes:
        kind: categorical or gaussian.
        averaged: Log-probabilities are means over latent dimensions, not those of joint densities.
        baseline: What `reference` gives; None: nothing to compare with.
        trained: Steps that methods train, in order; the others are drawn as they are.
    """

    kind: Kind
    baseline: Reference | None

    @property
    def averaged(self) -> bool:
        """See above."""
        ...

    @property
    def trained(self) -> Sequence[int]:
        """See above."""
        ...

    @property
    def num_steps(self) -> int:
        """S."""
        ...

    @property
    def units(self) -> tuple[int, ...]:
        """Units of each step: tokens of a scale, or 1."""
        ...

    @property
    def network(self) -> nn.Module:
        """The module that is trained."""
        ...

    def encode(self, conditions: Sequence[Any]) -> Any:
        """Prompts or class labels as rows of tensors."""
        ...

    def sample(
        self,
        conditions: Any,
        *,
        generators: Sequence[torch.Generator],
        deterministic: bool = False,
    ) -> Trajectory:
        """Draw one sample per row, each from its own generator; no gradient.

        Args:
            conditions: From `encode`.
            generators: One per row, on the CPU.
            deterministic: Without noise where the sampler has such a form (diffusion: eta 0).
        """
        ...

    def evaluate(
        self,
        trajectory: Trajectory,
        steps: Iterable[int] | None = None,
        *,
        need: Sequence[str] = ("logp",),
        network: nn.Module | None = None,
    ) -> StepEval:
        """Log-probabilities of given samples, with gradient.

        Args:
            trajectory: From `sample`, `branch` or `trajectory_of`.
            steps: Those that are wanted; None: all. The others are masked.
            need: Of logp, ref_logp, kl, entropy.
            network: The wrapped module of a training loop; None: the policy's own.
        """
        ...

    def branch(
        self,
        trajectory: Trajectory,
        at_step: int,
        count: int,
        *,
        generators: Sequence[torch.Generator],
    ) -> Trajectory:
        """Keep the steps before `at_step` and draw the rest `count` times anew, B count samples.

        Args:
            trajectory: The parents, left as they are; siblings follow each other in the result.
            at_step: First step drawn anew, 0..S; S copies the parents.
            count: Siblings per parent.
            generators: One per sample of the result.
        """
        ...

    def decode(self, trajectory: Trajectory) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1], float32."""
        ...

    def trajectory_of(self, images: Float[Tensor, "b 3 H W"], conditions: Any) -> Trajectory:
        """Given pictures in [0, 1] as samples of the policy, for offline methods."""
        ...

    def pair_score(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
        reference: bool = False,
    ) -> tuple[Float[Tensor, "b u"], Tensor]:
        """Log-likelihoods for preference losses, and their mask: exact, or a surrogate [B, 1].

        Args:
            trajectory: The samples.
            generators: One per sample, read but not advanced; equal ones give equal noise, as a
                pair needs it.
            network: The wrapped module of a training loop; None: the policy's own.
            reference: Under the reference instead, without gradient.
        """
        ...

    def reference(self) -> AbstractContextManager[nn.Module]:
        """The frozen network that KL terms and preference losses compare with."""
        ...


@runtime_checkable
class Redrawing(Policy, Protocol):
    """A policy whose last steps can be drawn with a gradient.

    Attributes:
        most_redrawn: How many.
    """

    @property
    def most_redrawn(self) -> int:
        """See above."""
        ...

    def redraw(
        self,
        trajectory: Trajectory,
        last: int,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1] whose last steps are drawn anew; gradients reach the network.

        Args:
            trajectory: Where the steps before come from, without gradient.
            last: How many steps.
            generators: One per sample, read but not advanced.
            network: The wrapped module of a training loop; None: the policy's own.
        """
        ...


@runtime_checkable
class Denoiser(Policy, Protocol):
    """A policy that also says what a noised sample was: diffusion."""

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast for networks that no training loop has wrapped, such as earlier weights."""
        ...

    def errors(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b ..."]:
        """Predicted minus true final latents, seen noised, without guidance.

        Networks that predict noise would see infinite errors in pure noise: theirs are multiplied
        by the picture's share in the latents.

        Args:
            trajectory: The samples.
            generators: One per sample, of its time and noise; read but not advanced.
            network: The wrapped module of a training loop; None: the policy's own.
        """
        ...
