"""A next-scale transformer as a policy: a step is a scale, a unit is a token."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.objectives.kl import categorical_kl
from nextscale.align.policies.checks import check_branch, evaluating, reference_network
from nextscale.align.references import Reference
from nextscale.align.trajectory import Kind, StepEval, Trajectory, map_rows, num_rows
from nextscale.errors import UserError, require
from nextscale.pipeline import NextScalePipeline
from nextscale.training import bare
from nextscale.var import SamplingConfig, sample
from nextscale.var.filtering import ImageDraws, filter_logits

logger = logging.getLogger(__name__)
LogpSpace = Literal["guided", "conditional", "behaviour"]
SPACES = ("guided", "conditional", "behaviour")


@dataclass(frozen=True)
class _Distribution:
    """Which distribution over tokens the policy is; stored in every trajectory."""

    logp_space: LogpSpace
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: int
    top_p: float


class NextScalePolicy:
    """A pipeline's transformer as a policy (methods of RL on VAR: the scale is the step).

    Guided logits of scale k are L = u + g_k (c - u), and tokens are drawn from
    softmax(filter(L / tau_k)). What counts as the policy's distribution is explicit:

    - guided: softmax(L / tau), what was drawn from if no filter is on;
    - conditional: softmax(c): trains a policy without guidance on samples drawn with it (T2I-R1);
    - behaviour: softmax(filter(L / tau)).

    Args:
        pipeline: Tokenizer and transformer; the tokenizer stays as it is.
        settings: How rollouts are drawn; None: as the pipeline's defaults, without candidates.
        logp_space: See above.
        reference: What KL terms compare with; None: no reference.
        autocast: Precision of sampling; None: that of the weights. Evaluation runs in the
            precision of the network that it is given.
        batch_size: Samples drawn or decoded at once.
        train_scales: Only the first so many are trained; None: all.
        only_draws: Nothing is trained on what is drawn, so that no setting is in the way of its
            log-probabilities.

    Raises:
        UserError: For more scales than there are, or filters with which the importance ratio would
            be undefined.
    """

    kind: Kind = "categorical"
    averaged = False

    def __init__(
        self,
        pipeline: NextScalePipeline,
        settings: SamplingConfig | None = None,
        *,
        logp_space: LogpSpace = "guided",
        reference: Reference | None = None,
        autocast: torch.dtype | None = None,
        batch_size: int = 64,
        train_scales: int | None = None,
        only_draws: bool = False,
    ) -> None:
        require("logp_space", logp_space, logp_space in SPACES, f"be one of {', '.join(SPACES)}")
        settings = replace(settings or pipeline.generation, num_candidates=1, more_smooth=False)
        if settings.guidance_threshold is not None and not only_draws:
            raise UserError(
                "guidance_threshold makes guidance depend on what was drawn, which "
                "log-probabilities would not see: leave it out"
            )
        filtered = (settings.top_k > 0 or settings.top_p < 1) and not only_draws
        if filtered and logp_space != "guided":
            raise UserError(
                f"top_k {settings.top_k}, top_p {settings.top_p} with logp_space {logp_space}: a "
                "token that a later filter leaves out would have no importance ratio. Use top_k 0 "
                "and top_p 1.0 in rollouts"
            )
        if filtered:
            logger.warning(
                "top_k %d, top_p %g: rollouts are drawn from filtered logits but judged by the "
                "unfiltered ones; top_k 0 and top_p 1.0 make both the same",
                *(settings.top_k, settings.top_p),
            )
        self.pipeline, self.model, self.tokenizer = (
            pipeline,
            pipeline.transformer,
            pipeline.tokenizer,
        )
        self.settings, self.autocast, self.batch_size = settings, autocast, batch_size
        self.baseline = reference
        scales = self.model.schedule.num_scales
        count = scales if train_scales is None else train_scales
        require("train_scales", count, 0 < count <= scales, f"lie in [1, {scales}]")
        self.trained = range(count)
        self.distribution = _Distribution(
            logp_space,
            tuple(settings.guidance(scales)),
            tuple(settings.temperatures(scales)),
            settings.top_k,
            settings.top_p,
        )

    @property
    def num_steps(self) -> int:
        """K, the number of scales."""
        return self.model.schedule.num_scales

    @property
    def units(self) -> tuple[int, ...]:
        """n_k, tokens of each scale."""
        return tuple(self.model.schedule.lengths)

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.model

    def encode(self, conditions: Sequence[Any]) -> Any:
        """Ids of prompts or class labels, one row each."""
        return self.model.conditioner.tokenize(list(conditions)).to(self.model.device)

    def conditioned(self, conditions: Any) -> dict[str, Any]:
        """What the sampler is given for some rows of `encode`."""
        return {"condition": self.model.condition(conditions)}

    def forward(
        self, network: nn.Module, inputs: Tensor, conditions: Any, num_scales: int, *, null: bool
    ) -> Float[Tensor, "r u v"]:
        """Teacher-forced logits of rows of `encode`, then, if asked for, without condition."""
        ids = conditions
        if null:
            ids = torch.cat([ids, self.model.conditioner.null(len(ids)).to(ids)])
            inputs = inputs.repeat(2, 1, 1)
        return network(inputs, ids=ids, num_scales=num_scales)

    # ---- drawing -----------------------------------------------------------------------------

    def sample(
        self,
        conditions: Any,
        *,
        generators: Sequence[torch.Generator],
        deterministic: bool = False,
        start: Tensor | None = None,
    ) -> Trajectory:
        """Draw tokens scale by scale; see `Policy.sample`. Deterministic: the likeliest codes.

        Args:
            conditions: From `encode`.
            generators: One per row, on the CPU.
            deterministic: The likeliest codes.
            start: An offset of the start token, or tokens of the first scales, as in the call of
                the pipeline; log-probabilities of given tokens are NaN.
        """
        if start is None or start.is_floating_point():
            return self._draw(conditions, generators, None, 1, deterministic, start)
        drawn = self._draw(conditions, generators, start, 1, deterministic)
        count = self.num_steps - len(drawn.actions)
        given = list(start.split(self.units[:count], dim=1))
        unknown = [torch.full_like(tokens, torch.nan, dtype=torch.float32) for tokens in given]
        actions, logps = [*given, *drawn.actions], [*unknown, *drawn.logps]
        return replace(drawn, actions=actions, logps=logps)

    def branch(
        self,
        trajectory: Trajectory,
        at_step: int,
        count: int,
        *,
        generators: Sequence[torch.Generator],
    ) -> Trajectory:
        """Keep the scales before `at_step`, draw the others; see `Policy.branch`.

        The kept scales run once per parent, in one pass, and their keys and values are repeated.
        """
        check_branch(at_step, self.num_steps, count)
        parents = trajectory.repeat_interleave(count)
        if at_step == self.num_steps:
            return replace(parents, parent_step=at_step)
        prefix = torch.cat(trajectory.actions[:at_step], dim=1) if at_step else None
        drawn = self._draw(trajectory.conditions, generators, prefix, count, False)
        return replace(
            drawn,
            actions=[*parents.actions[:at_step], *drawn.actions],
            logps=[*parents.logps[:at_step], *drawn.logps],
            branch_id=parents.branch_id,
            parent_step=at_step,
        )

    @torch.no_grad()
    def _draw(
        self,
        conditions: Any,
        generators: Sequence[torch.Generator],
        prefix: Tensor | None,
        branches: int,
        deterministic: bool,
        offset: Tensor | None = None,
    ) -> Trajectory:
        count = num_rows(conditions)
        if len(generators) != count * branches:
            raise UserError(f"{len(generators)} generators for {count * branches} samples")
        parts = []
        size = max(1, self.batch_size // branches)
        with evaluating(self.model), self._precision():
            for start in range(0, count, size):
                rows = slice(start, start + size)
                part = map_rows(conditions, lambda tensor, rows=rows: tensor[rows])
                draw = ImageDraws(
                    generators[start * branches : (start + size) * branches],
                    self.model.schedule.lengths,
                )
                steps = sample(
                    self.model,
                    self.tokenizer,
                    config=replace(self.settings, top_k=1) if deterministic else self.settings,
                    draw=draw,
                    prefix=None if prefix is None else prefix[rows],
                    offset=None if offset is None else offset[rows],
                    branches=branches,
                    **self.conditioned(part),
                )
                drawn = [(step.tokens, self._step_logp(step)) for step in steps]
                actions, logps = (list(column) for column in zip(*drawn, strict=True))
                parts.append(self._trajectory(part, actions, logps, branches))
        return Trajectory.cat(parts)

    def _step_logp(self, step: Any) -> Tensor:
        """[b, n_k], of the drawn tokens under the policy's distribution."""
        logits = self._policy_logits(step.conditional, step.logits, step.scale)
        return _log_prob(logits, step.tokens)

    def _policy_logits(self, conditional: Tensor, guided: Tensor, scale: int) -> Tensor:
        space = self.distribution
        if space.logp_space == "conditional":
            return conditional
        logits = guided / space.temperature[scale]
        if space.logp_space == "behaviour":
            return filter_logits(logits, space.top_k, space.top_p)
        return logits

    def _trajectory(
        self, conditions: Any, actions: list[Tensor], logps: list[Tensor], repeats: int = 1
    ) -> Trajectory:
        return Trajectory(
            kind="categorical",
            conditions=map_rows(conditions, lambda rows: rows.repeat_interleave(repeats, 0)),
            actions=actions,
            logps=logps,
            stochastic=(True,) * self.num_steps,
            guidance=self.distribution.guidance,
            settings=asdict(self.distribution),
        )

    # ---- judging -----------------------------------------------------------------------------

    def evaluate(
        self,
        trajectory: Trajectory,
        steps: Iterable[int] | None = None,
        *,
        need: Sequence[str] = ("logp",),
        network: nn.Module | None = None,
    ) -> StepEval:
        """One teacher-forced pass over all scales; see `Policy.evaluate`."""
        self._check_same(trajectory)
        wanted = range(self.num_steps) if steps is None else sorted(set(steps))
        space = self.distribution.logp_space
        tokens = torch.cat(trajectory.actions, dim=1)
        logits = self.logits(trajectory.conditions, tokens, max(wanted) + 1, space, network)
        seen = tokens[:, : logits.shape[1]]
        log_p = logits.log_softmax(dim=-1)
        index = self.model.schedule.scale_index().to(tokens.device)[: logits.shape[1]]
        allowed = torch.zeros(self.num_steps, dtype=torch.bool, device=tokens.device)
        allowed[list(wanted)] = True
        result = StepEval(
            logp=log_p.gather(2, seen[..., None])[..., 0],
            unit=torch.arange(len(index), device=index.device),
            step=index,
            mask=allowed[index].expand(len(tokens), -1),
        )
        if "entropy" in need:
            result.entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
        if "kl" in need or "ref_logp" in need:
            with torch.no_grad(), self.reference() as other:
                reference = self.logits(
                    trajectory.conditions, tokens, max(wanted) + 1, space, other
                ).log_softmax(dim=-1)
            result.ref_logp = reference.gather(2, seen[..., None])[..., 0]
            if "kl" in need:
                result.kl = categorical_kl(log_p, reference)
        return result

    def logits(
        self,
        conditions: Any,
        tokens: Int[Tensor, "b t"],
        num_scales: int,
        space: LogpSpace,
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b u v"]:
        """The policy's logits of the first `num_scales` scales, teacher-forced."""
        network = self.network if network is None else network
        schedule = self.model.schedule
        length = schedule.slices[num_scales - 1].stop
        inputs = self.tokenizer.teacher_inputs(tokens)[:, : length - schedule.lengths[0]]
        space_of = self.distribution
        guided = space != "conditional" and any(g != 1 for g in space_of.guidance)
        with evaluating(bare(network)):
            out = self.forward(network, inputs, conditions, num_scales, null=guided)
        conditional, unconditional = out.chunk(2) if guided else (out, out)
        if space == "conditional":
            return conditional
        index = schedule.scale_index()[:length].to(tokens.device)

        def per_token(values: tuple[float, ...]) -> Tensor:
            return conditional.new_tensor(values)[index][:, None]

        logits = conditional
        if guided:
            logits = torch.lerp(unconditional, conditional, per_token(space_of.guidance))
        logits = logits / per_token(space_of.temperature)
        if space == "behaviour":
            return filter_logits(logits, space_of.top_k, space_of.top_p)
        return logits

    def pair_score(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator] = (),
        network: nn.Module | None = None,
        reference: bool = False,
    ) -> tuple[Float[Tensor, "b u"], Tensor]:
        """Exact conditional log-probabilities [B, L], without guidance; see `Policy.pair_score`."""
        tokens = torch.cat(trajectory.actions, dim=1)
        context = self.reference() if reference else contextlib.nullcontext(network)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference), context as judge:
            logits = self.logits(
                trajectory.conditions, tokens, self.num_steps, "conditional", judge
            )
        logp = _log_prob(logits, tokens)
        return logp, torch.ones_like(logp)

    @property
    def most_redrawn(self) -> int:
        """The last scale."""
        return 1

    def redraw(
        self,
        trajectory: Trajectory,
        last: int,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """The last scale's tokens, with the gradient of the Gumbel-softmax; `Redrawing.redraw`."""
        require("last", last, last == 1, "be 1: only the last scale has no tokens after it")
        self._check_same(trajectory)
        schedule, quantizer = self.model.schedule, self.tokenizer.quantizer
        tokens, where = torch.cat(trajectory.actions, dim=1), schedule.slices[-1]
        space = self.distribution.logp_space
        logits = self.logits(trajectory.conditions, tokens, self.num_steps, space, network)
        copies = [generator.clone_state() for generator in generators]
        draws = ImageDraws(copies, schedule.lengths)
        scale = self.num_steps - 1
        noisy = logits[:, where].float() + draws.gumbel(scale, logits[:, where]).to(logits.device)
        soft = noisy.softmax(dim=-1)
        hard = torch.zeros_like(soft).scatter(2, noisy.argmax(-1, keepdim=True), 1.0)
        codes = (hard + soft - soft.detach()) @ quantizer.codebook.weight
        code_map = codes.transpose(1, 2).unflatten(2, schedule.sides[scale])
        f_hat = torch.zeros_like(code_map)
        for done, _ in itertools.islice(quantizer.accumulate(tokens, schedule), scale):
            f_hat = done
        f_hat, _ = quantizer.step(f_hat, code_map, scale, schedule)
        picture = self.tokenizer.decoder(self.tokenizer.post_quant_conv(f_hat))
        return (picture.float().clamp(-1, 1) + 1) / 2

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The frozen network to compare with; see `Policy.reference`."""
        return reference_network(self.baseline, self.network)

    # ---- pictures ----------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, trajectory: Trajectory) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1]."""
        tokens = torch.cat(trajectory.actions, dim=1)
        with self._precision():
            parts = [self.tokenizer.decode(part) for part in tokens.split(self.batch_size)]
        return (torch.cat(parts).float() + 1) / 2

    @torch.no_grad()
    def trajectory_of(self, images: Float[Tensor, "b 3 H W"], conditions: Any) -> Trajectory:
        """The tokens of given pictures; their log-probabilities are not known and stay NaN."""
        tokens = self.tokenizer.encode(images.to(self.model.device) * 2 - 1)
        actions = self.model.schedule.split(tokens)
        unknown = [torch.full_like(a, torch.nan, dtype=torch.float32) for a in actions]
        return self._trajectory(conditions, list(actions), unknown)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, self.autocast)

    def _check_same(self, trajectory: Trajectory) -> None:
        """Log-probabilities under other settings than those of the draw would be no ratio."""
        now = asdict(self.distribution)
        if dict(trajectory.settings) != now:
            changed = [k for k in now if trajectory.settings.get(k) != now[k]]
            raise UserError(
                f"the trajectory was drawn with another {', '.join(changed)} than this policy's; "
                "evaluate it with the policy that drew it"
            )


def _log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
