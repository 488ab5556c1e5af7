"""The start of a generator as a policy (FIND): the generator is a part of the environment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.objectives.kl import categorical_kl
from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.references import Reference
from nextscale.align.starts import TOKENS, StartDistribution
from nextscale.align.trajectory import Kind, StepEval, Trajectory
from nextscale.errors import UserError
from nextscale.var.filtering import ImageDraws, filter_logits


class StartPolicy:
    """Draws the start from a `StartDistribution`, and the rest by a frozen generator.

    One step with one unit (Gaussian spaces: the log-density as a mean or sum over dimensions), or
    one step per scale of the prefix with a unit per token. A branch keeps the start and draws the
    rest anew. The reference is the distribution before training, so KL terms are exact. The
    generator's own noise comes from the sample's stream behind the start's.

    Args:
        base: Draws the rest; a DiffusionPolicy for the space noise, else a NextScalePolicy.
        starts: What is trained.
        deterministic: Diffusion steps without noise (eta 0), so that the start decides alone.
        logp_reduction: mean or sum over the dimensions of Gaussian spaces.

    Raises:
        UserError: For a space that the generator does not have.
    """

    baseline: Reference | None = None

    def __init__(
        self,
        base: NextScalePolicy | DiffusionPolicy,
        starts: StartDistribution,
        *,
        deterministic: bool = True,
        logp_reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        diffusion = isinstance(base, DiffusionPolicy)
        space = starts.shape.space
        if diffusion != (space == "noise"):
            fits = "noise" if diffusion else "embedding, prefix_table or sharpness"
            raise UserError(f"the start space {space} is none of this generator's; use {fits}")
        self.base, self.starts = base, starts
        self.deterministic, self.logp_reduction = deterministic and diffusion, logp_reduction
        self.kind: Kind = "categorical" if space in TOKENS else "gaussian"
        self._scales = 0
        if isinstance(base, NextScalePolicy) and space in TOKENS:
            ends = [where.stop for where in base.model.schedule.slices]
            self._scales = ends.index(starts.shape.shape[0]) + 1

    @property
    def averaged(self) -> bool:
        """Whether a log-density is a mean over dimensions."""
        return self.kind == "gaussian" and self.logp_reduction == "mean"

    @property
    def num_steps(self) -> int:
        """1, or the scales of the prefix."""
        return self._scales or 1

    @property
    def trained(self) -> range:
        """All steps."""
        return range(self.num_steps)

    @property
    def units(self) -> tuple[int, ...]:
        """1, or the tokens of each scale."""
        return self.base.units[: self._scales] if self._scales else (1,)

    @property
    def network(self) -> nn.Module:
        """The start distribution."""
        return self.starts

    def encode(self, conditions: Sequence[Any]) -> dict[str, Any]:
        """What the generator needs, rows of the table, features of the prompts."""
        encoded = self.base.encode(conditions)
        features = prompt_features(self.base, encoded)
        rows = self.rows(conditions).to(features.device)
        return {"base": encoded, "rows": rows, "features": features}

    def rows(self, conditions: Sequence[Any]) -> Int[Tensor, " b"]:
        """See `StartDistribution.rows`; class labels may be names or digits, too.

        Raises:
            UserError: For prompts or labels that the table does not hold.
        """
        if isinstance(self.base, NextScalePolicy) and not self.base.model.conditioner.prompts:
            conditions = self.base.encode(conditions).tolist()
        return self.starts.rows(conditions)

    # ---- drawing -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        conditions: dict[str, Any],
        *,
        generators: Sequence[torch.Generator],
        deterministic: bool = False,
    ) -> Trajectory:
        """Draw starts and pictures; see `Policy.sample`. Deterministic: the mean, or the mode."""
        actions = self.draw(conditions, generators, deterministic=deterministic)
        logps = self._logps(conditions, actions)
        return self._finish(conditions, actions, logps, generators)

    @torch.no_grad()
    def branch(
        self,
        trajectory: Trajectory,
        at_step: int,
        count: int,
        *,
        generators: Sequence[torch.Generator],
    ) -> Trajectory:
        """The same starts, and pictures drawn anew from them; `at_step` is S."""
        if at_step != self.num_steps:
            raise UserError(f"a start is drawn whole: branch at {self.num_steps}, not {at_step}")
        parents = trajectory.repeat_interleave(count)
        drawn = self._finish(parents.conditions, parents.actions, parents.logps, generators)
        return replace(drawn, branch_id=parents.branch_id, parent_step=at_step)

    @torch.no_grad()
    def draw(
        self,
        conditions: dict[str, Any],
        generators: Sequence[torch.Generator],
        *,
        network: nn.Module | None = None,
        filters: tuple[int, float] = (0, 1.0),
        deterministic: bool = False,
    ) -> list[Tensor]:
        """Starts alone: [latents], [offsets], or tokens scale by scale.

        Args:
            conditions: From `encode`.
            generators: One per row, on the CPU.
            network: Another start distribution than the policy's own.
            filters: top_k and top_p of the prefix's tokens.
            deterministic: The mean, or the likeliest tokens.
        """
        network = self.starts if network is None else network
        first, second, _ = network(conditions["rows"], conditions["features"])
        if self.kind == "gaussian":
            if deterministic:
                return [first]
            noise = [torch.randn(first.shape[1:], generator=g) for g in generators]
            return [first + second * torch.stack(noise).to(first)]
        assert isinstance(self.base, NextScalePolicy)
        draws = ImageDraws(_copies(generators), self.base.model.schedule.lengths)
        tokens: list[Tensor] = []
        length = sum(self.units)
        added, factors = first.expand(-1, length, -1), second.expand(-1, length)
        parts = zip(added.split(self.units, dim=1), factors.split(self.units, dim=1), strict=True)
        for scale, (bias, factor) in enumerate(parts):
            own = self._base_logits(conditions, tokens, scale + 1)[:, -bias.shape[1] :]
            logits = own * factor[..., None] + bias
            top_k, top_p = (1, 1.0) if deterministic else filters
            tokens.append(draws.tokens(scale, filter_logits(logits, top_k, top_p)))
        return tokens

    def _finish(
        self,
        conditions: dict[str, Any],
        actions: list[Tensor],
        logps: list[Tensor],
        generators: Sequence[torch.Generator],
    ) -> Trajectory:
        """The generator's pictures of given starts."""
        start = torch.cat(actions, dim=1) if self._scales else actions[0]
        # A prefix takes the first uniforms of a stream and the rest the others, as without it.
        streams = _copies(generators) if self._scales else generators
        options: dict[str, Any] = {"generators": streams, "start": start}
        if isinstance(self.base, DiffusionPolicy):
            options["deterministic"] = self.deterministic
        drawn = self.base.sample(conditions["base"], **options)
        return Trajectory(
            kind=self.kind,
            conditions=conditions,
            actions=actions,
            logps=logps,
            stochastic=(True,) * self.num_steps,
            guidance=drawn.guidance[: self.num_steps],
            settings={"space": self.starts.shape.space, **drawn.settings},
            images=self.base.decode(drawn),
        )

    def decode(self, trajectory: Trajectory) -> Float[Tensor, "b 3 H W"]:
        """The pictures that were drawn along with the starts."""
        assert trajectory.images is not None
        return trajectory.images

    # ---- judging -----------------------------------------------------------------------------

    def evaluate(
        self,
        trajectory: Trajectory,
        steps: Iterable[int] | None = None,
        *,
        need: Sequence[str] = ("logp",),
        network: nn.Module | None = None,
    ) -> StepEval:
        """Log-probabilities of starts; see `Policy.evaluate`. KL and ref_logp cost nothing."""
        network = self.starts if network is None else network
        wanted = range(self.num_steps) if steps is None else sorted(set(steps))
        conditions = trajectory.conditions
        first, second, _ = network(conditions["rows"], conditions["features"])
        judge = self._of_gaussian if self.kind == "gaussian" else self._of_tokens
        ev = judge(trajectory, first, second)
        allowed = torch.zeros(self.num_steps, dtype=torch.bool, device=ev.logp.device)
        allowed[list(wanted)] = True
        return replace(ev, mask=allowed[ev.step].expand(len(ev.logp), -1))

    def _of_gaussian(self, trajectory: Trajectory, mean: Tensor, std: Tensor) -> StepEval:
        start, spread = trajectory.actions[0], self.starts.shape.initial_std
        normal = torch.distributions.Normal(mean, std)
        initial = torch.distributions.Normal(torch.zeros_like(mean), spread)
        # 0.5 (sd^2 / sd0^2 + mu^2 / sd0^2 - 1) - log(sd / sd0) per dimension
        kl = torch.distributions.kl_divergence(normal, initial)
        zero = torch.zeros(1, dtype=torch.long, device=mean.device)
        return StepEval(
            logp=self._reduce(normal.log_prob(start)),
            unit=zero,
            step=zero,
            mask=torch.ones(len(start), 1, dtype=torch.bool, device=mean.device),
            ref_logp=self._reduce(initial.log_prob(start)),
            kl=self._reduce(kl),
            entropy=self._reduce(normal.entropy()),
        )

    def _of_tokens(self, trajectory: Trajectory, added: Tensor, factor: Tensor) -> StepEval:
        tokens = torch.cat(trajectory.actions, dim=1)
        with torch.no_grad():
            own = self._base_logits(trajectory.conditions, trajectory.actions, self.num_steps)
        log_p = (own * factor[..., None] + added).log_softmax(-1)
        reference = own.log_softmax(-1)
        index = torch.arange(self.num_steps, device=tokens.device).repeat_interleave(
            torch.tensor(self.units, device=tokens.device)
        )
        return StepEval(
            logp=log_p.gather(2, tokens[..., None])[..., 0],
            unit=torch.arange(len(index), device=tokens.device),
            step=index,
            mask=torch.ones_like(tokens, dtype=torch.bool),
            ref_logp=reference.gather(2, tokens[..., None])[..., 0],
            kl=categorical_kl(log_p, reference),
            entropy=-(log_p.exp() * log_p).sum(-1),
        )

    def _base_logits(
        self, conditions: dict[str, Any], tokens: Sequence[Tensor], scales: int
    ) -> Float[Tensor, "b u v"]:
        """The generator's own logits of the first scales, as its policy draws them."""
        assert isinstance(self.base, NextScalePolicy)
        ids, total = conditions["base"], self.base.model.schedule.num_tokens
        known = torch.cat(
            [torch.zeros(len(ids), 0, dtype=torch.long, device=ids.device), *tokens], 1
        )
        padded = torch.nn.functional.pad(known, (0, total - known.shape[1]))
        return self.base.logits(ids, padded, scales, "guided").float()

    def _logps(self, conditions: dict[str, Any], actions: list[Tensor]) -> list[Tensor]:
        bare_trajectory = Trajectory(
            kind=self.kind,
            conditions=conditions,
            actions=actions,
            logps=[],
            stochastic=(True,) * self.num_steps,
            guidance=(1.0,) * self.num_steps,
            settings={},
        )
        logp = self.evaluate(bare_trajectory).logp
        return list(logp.split(self.units, dim=1)) if self._scales else [logp[:, 0]]

    def _reduce(self, values: Tensor) -> Float[Tensor, "b 1"]:
        flat = values.flatten(1)
        return (flat.mean(1) if self.logp_reduction == "mean" else flat.sum(1))[:, None]

    def pair_score(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator] = (),
        network: nn.Module | None = None,
        reference: bool = False,
    ) -> tuple[Float[Tensor, "b u"], Tensor]:
        """Exact; see `Policy.pair_score`."""
        ev = self.evaluate(trajectory, network=network)
        assert ev.ref_logp is not None
        logp = ev.ref_logp.detach() if reference else ev.logp
        return logp, torch.ones_like(logp)

    def trajectory_of(self, images: Float[Tensor, "b 3 H W"], conditions: Any) -> Trajectory:
        """Given pictures have no known start.

        Raises:
            UserError: Always.
        """
        raise UserError("the start of a given picture is not known; find learns from rollouts")

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The distribution before training is known in closed form; there is no network for it.

        Raises:
            UserError: Always.
        """
        raise UserError("the reference of a start distribution is its closed form")


def prompt_features(base: NextScalePolicy | DiffusionPolicy, encoded: Any) -> Float[Tensor, "b f"]:
    """One vector per prompt: the pooled condition, or the mean of the text embeddings.

    Raises:
        UserError: If the generator's conditions hold no floating-point row.
    """
    if isinstance(base, NextScalePolicy):
        with torch.no_grad():
            return base.model.condition(encoded).pooled.float()
    block = encoded[base.plan.conditional]
    rows = [tensor for tensor in block.values() if tensor.is_floating_point()]
    if not rows:  # class labels, and one more for no class
        (labels,) = block.values()
        classes = cast(Any, base.network).config.num_embeds_ada_norm + 1
        return torch.nn.functional.one_hot(labels.reshape(len(labels)), classes).float()
    widest = max(rows, key=lambda tensor: tensor.ndim)
    return widest.float().flatten(1, -2).mean(1) if widest.ndim > 2 else widest.float()


def _copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    return [g.clone_state() for g in generators]
