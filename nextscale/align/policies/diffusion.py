"""A diffusers pipeline as a policy: a step is a denoising transition, and a unit is a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.align.objectives.kl import gaussian_kl
from nextscale.align.policies.call_plan import Block, CallPlan
from nextscale.align.policies.checks import check_branch, evaluating, reference_network
from nextscale.align.policies.gaussian import (
    MIN_STD,
    DDIMTransitions,
    FlowTransitions,
    Noised,
    Transitions,
    gaussian_log_prob,
)
from nextscale.align.policies.pipeline_calls import PipelineCalls
from nextscale.align.references import Reference
from nextscale.align.trajectory import Kind, StepEval, Trajectory
from nextscale.errors import UserError, require
from nextscale.training import bare

LogpReduction = Literal["mean", "sum"]


class DiffusionPolicy:
    """A diffusers pipeline's denoiser as a policy (DDPO, arXiv 2305.13301; Flow-GRPO, 2505.05470).

    The policy draws x' ~ N(mu(o), std^2) at each step, where o is the network's output *with*
    guidance, o = u + g (c - u): guidance is a part of the policy, is kept in every trajectory, and
    log-probabilities are only evaluated under the same one. `pair_score` alone uses c.

    - DDIM: Gaussian steps of arXiv 2010.02502 with `eta`.
    - Flow matching: the SDE of Flow-GRPO with `noise_level`. Its last step adds noise too, which
      stays in the picture; `stochastic_steps=range(num_inference_steps - 1)` leaves it out.

    A step's log-probability is the *mean* over latent dimensions by default, as in the papers
    above. A ratio of such means hardly moves: clip ranges must be tiny (1e-4, where token methods
    use 0.2). With "sum" it is the joint density, whose ratios overflow soon. Steps without noise
    (std < 1e-8: the last one of a scheduler with set_alpha_to_one) take part in sampling, are
    flagged, have log-probability 0 and count nowhere; published code moves their timestep instead.

    The pipeline encodes, starts and decodes by itself (see `pipeline_calls`); how it calls its
    network is found out once, with random numbers in the network's place, and checked. Latents
    between steps and the steps themselves are float32 whatever the network's precision. Conditions
    are the network's arguments, so that text encoders run once per prompt.

    Args:
        pipe: Text-to-image or class-conditional pipeline with a `DDIMScheduler` or a
            `FlowMatchEulerDiscreteScheduler`.
        num_inference_steps: S.
        guidance_scale: As the pipeline's own argument; None: its default.
        eta: Noise of DDIM steps, (0, 1]; 1 is as noisy as DDPM.
        noise_level: Noise a of flow steps.
        stochastic_steps: Steps with noise, such as a window of MixGRPO (arXiv 2507.21802); the
            others are deterministic. None: all.
        logp_reduction: mean or sum over latent dimensions.
        call: Other arguments of the pipeline's call, such as height, width or negative_prompt.
        reference: What KL terms compare with; None: no reference.
        autocast: Precision of sampling; None: that of the weights. Evaluation runs in the
            precision of the network that it is given.
        batch_size: Samples drawn or decoded at once.
        guidance_threshold: Adaptive guidance (arXiv 2312.12487): a sample goes on without it once
            1 - cosine of its two predictions is no more than this, 0.009 in the paper; a branch
            begins with guidance. For drawing alone. None: off.

    Raises:
        UserError: If the scheduler's steps have no log-probability, or if the pipeline does
            something with latents or guidance that cannot be evaluated again.
    """

    kind: Kind = "gaussian"

    def __init__(
        self,
        pipe: Any,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        eta: float = 1.0,
        noise_level: float = 0.7,
        stochastic_steps: range | None = None,
        logp_reduction: LogpReduction = "mean",
        call: Mapping[str, Any] | None = None,
        reference: Reference | None = None,
        autocast: torch.dtype | None = None,
        batch_size: int = 16,
        guidance_threshold: float | None = None,
    ) -> None:
        require("num_inference_steps", num_inference_steps, num_inference_steps > 0, "be above 0")
        require("eta", eta, 0 < eta <= 1, "lie in (0, 1]")
        require("noise_level", noise_level, noise_level > 0, "be above 0")
        known = logp_reduction in ("mean", "sum")
        require("logp_reduction", logp_reduction, known, "be mean or sum")
        fits = guidance_threshold is None or 0 <= guidance_threshold <= 1
        require("guidance_threshold", guidance_threshold, fits, "lie in [0, 1]")
        flow = _is_flow(pipe)
        settings = {"num_inference_steps": num_inference_steps, **(call or {})}
        if guidance_scale is not None:
            settings["guidance_scale"] = guidance_scale
        self.pipe, self.calls = pipe, PipelineCalls(pipe, settings)
        self.autocast, self.batch_size = autocast, batch_size
        self.averaged, self.baseline = logp_reduction == "mean", reference
        self.guidance_threshold = guidance_threshold
        with evaluating(self.network), self.precision():
            self.plan: CallPlan = self.calls.plan()
        self.transitions: Transitions = (
            FlowTransitions.of(pipe.scheduler, noise_level)
            if flow
            else DDIMTransitions.of(pipe.scheduler, eta)
        )
        self.stochastic = tuple(
            self.transitions.std(step) >= MIN_STD
            and (stochastic_steps is None or step in stochastic_steps)
            for step in range(self.num_steps)
        )
        self.settings = {
            "sampler": "flow" if flow else "ddim",
            "noise": noise_level if flow else eta,
            "timesteps": self.transitions.timesteps,
            "guidance_weights": self.plan.weights,
            "logp_reduction": logp_reduction,
        }

    @property
    def num_steps(self) -> int:
        """S, the number of denoising steps."""
        return len(self.transitions.timesteps)

    @property
    def trained(self) -> list[int]:
        """The random ones."""
        return [step for step, is_random in enumerate(self.stochastic) if is_random]

    @property
    def units(self) -> tuple[int, ...]:
        """One unit per step."""
        return (1,) * self.num_steps

    @property
    def network(self) -> nn.Module:
        """The unet or transformer."""
        return self.calls.network

    @property
    def guidance(self) -> tuple[float, ...]:
        """G of each step, measured; 1: none."""
        return tuple(w[self.plan.conditional] / sum(w) for w in self.plan.weights)

    def encode(self, conditions: Sequence[Any]) -> tuple[Block, ...]:
        """Prompts or class labels as the network's arguments, conditional and unconditional."""
        return self.calls.encode(self.plan, conditions)

    # ---- drawing -----------------------------------------------------------------------------

    def sample(
        self,
        conditions: tuple[Block, ...],
        *,
        generators: Sequence[torch.Generator],
        deterministic: bool = False,
        start: Float[Tensor, "b ..."] | None = None,
    ) -> Trajectory:
        """Denoise from noise; see `Policy.sample`. Deterministic: eta 0, or the ODE.

        A sample's generator gives its start first, then the noise of its steps, as in diffusers.

        Args:
            conditions: From `encode`.
            generators: One per row, on the CPU.
            deterministic: No step is stochastic.
            start: Latents before step 0, instead of the pipeline's own.
        """
        flags = (False,) * self.num_steps if deterministic else self.stochastic
        return self._draw(conditions, generators, start, 0, flags)

    def branch(
        self,
        trajectory: Trajectory,
        at_step: int,
        count: int,
        *,
        generators: Sequence[torch.Generator],
    ) -> Trajectory:
        """Keep the latents before `at_step`, draw the others; see `Policy.branch`.

        The noise before step 0 is no step: siblings of step 0 share it (B2-DiffuRL's last stage).
        """
        check_branch(at_step, self.num_steps, count)
        self._check_same(trajectory)
        parents = trajectory.repeat_interleave(count)
        if at_step == self.num_steps:
            return replace(parents, parent_step=at_step)
        latents = parents.actions[at_step - 1] if at_step else parents.start
        flags = (*parents.stochastic[:at_step], *self.stochastic[at_step:])
        drawn = self._draw(parents.conditions, generators, latents, at_step, flags)
        return replace(
            drawn,
            actions=[*parents.actions[:at_step], *drawn.actions],
            logps=[*parents.logps[:at_step], *drawn.logps],
            start=parents.start,
            branch_id=parents.branch_id,
            parent_step=at_step,
        )

    @torch.no_grad()
    def _draw(
        self,
        conditions: tuple[Block, ...],
        generators: Sequence[torch.Generator],
        latents: Tensor | None,
        first: int,
        flags: tuple[bool, ...],
    ) -> Trajectory:
        rows = _rows(conditions)
        if len(generators) != rows:
            raise UserError(f"{len(generators)} generators for {rows} samples")
        parts = []
        with evaluating(self.network), self.precision():
            for begin in range(0, rows, self.batch_size):
                part = slice(begin, begin + self.batch_size)
                few = tuple({name: value[part] for name, value in b.items()} for b in conditions)
                mine = generators[part]
                start = self.calls.start(self.plan, mine) if latents is None else latents[part]
                actions, logps = [], []
                guided = torch.ones(len(start), dtype=torch.bool, device=start.device)
                for step in range(first, self.num_steps):
                    before = actions[-1] if actions else start
                    mean, guided = self._adaptive_mean(before, step, few, flags[step], guided)
                    drawn, logp = self._step(mean, step, mine, flags[step])
                    actions.append(drawn)
                    logps.append(logp)
                parts.append(self._trajectory(few, actions, logps, flags, start))
        return Trajectory.cat(parts)

    def _adaptive_mean(
        self,
        latents: Tensor,
        step: int,
        conditions: tuple[Block, ...],
        stochastic: bool,
        guided: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean of a step, and the samples that are guided at the next one."""
        if self.guidance_threshold is None:
            return self._mean(self.network, latents, step, conditions, stochastic), guided
        given = (self.network, self.calls.network.dtype, latents, step, conditions)
        output, guided = self.plan.adaptive(*given, guided, self.guidance_threshold)
        return self.transitions.mean(step, latents, output, stochastic), guided

    def _step(
        self,
        mean: Tensor,
        step: int,
        generators: Sequence[torch.Generator],
        stochastic: bool,
    ) -> tuple[Tensor, Tensor]:
        """Latents after a step of this mean, and their log-probability."""
        if not stochastic:
            return mean, mean.new_zeros(len(mean))
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        drawn = mean + self.transitions.std(step) * noise.to(mean)
        return drawn, self._logp(drawn, mean, step)

    def _trajectory(
        self,
        conditions: tuple[Block, ...],
        actions: list[Tensor],
        logps: list[Tensor],
        flags: tuple[bool, ...],
        start: Tensor | None,
    ) -> Trajectory:
        return Trajectory(
            kind="gaussian",
            conditions=conditions,
            actions=actions,
            logps=logps,
            stochastic=flags,
            guidance=self.guidance,
            settings=self.settings,
            start=start,
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
        """One network call per wanted stochastic step; see `Policy.evaluate`.

        U is the number of wanted steps; `unit` and `step` say which they are. All calls stay in
        memory until the gradient is taken: ask for few steps at a time. There is no entropy. KL is
        per dimension with logp_reduction "mean", and joint with "sum".
        """
        self._check_judged()
        self._check_same(trajectory)
        wanted = range(self.num_steps) if steps is None else sorted(set(steps))
        inside = all(0 <= step < self.num_steps for step in wanted) and len(wanted) > 0
        require("steps", list(wanted), inside, f"be numbers from 0 to {self.num_steps - 1}")
        judge = self.network if network is None else network
        columns: dict[str, list[Tensor]] = {"logp": [], "ref_logp": [], "kl": []}
        with evaluating(bare(judge)):
            for step in wanted:
                for name, column in self._judge(judge, trajectory, step, need).items():
                    columns[name].append(column)
        found = {name: torch.stack(c, 1) for name, c in columns.items() if c}
        device = trajectory.actions[0].device
        index = torch.tensor(list(wanted), device=device)
        mask = torch.tensor([trajectory.stochastic[step] for step in wanted], device=device)
        return StepEval(unit=index, step=index, mask=mask.expand(len(trajectory), -1), **found)

    def _judge(
        self, network: nn.Module, trajectory: Trajectory, step: int, need: Sequence[str]
    ) -> dict[str, Tensor]:
        """Log-probability, and what else is needed, of one step [B]."""
        after = trajectory.actions[step]
        wanted = {"logp", *(name for name in ("ref_logp", "kl") if name in need)}
        if not trajectory.stochastic[step]:
            return dict.fromkeys(wanted, after.new_zeros(len(after)))
        before = trajectory.actions[step - 1] if step else trajectory.start
        mean = self._mean(network, before, step, trajectory.conditions, True)
        found = {"logp": self._logp(after, mean, step)}
        if len(wanted) == 1:
            return found
        with torch.no_grad(), self.reference() as other, evaluating(other):
            other_mean = self._mean(other, before, step, trajectory.conditions, True)
        if "ref_logp" in need:
            found["ref_logp"] = self._logp(after, other_mean, step)
        if "kl" in need:
            kl = gaussian_kl(mean, other_mean, mean.new_tensor(self.transitions.std(step)))
            joint = self.settings["logp_reduction"] == "sum"
            found["kl"] = kl * mean[0].numel() if joint else kl
        return found

    def pair_score(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
        reference: bool = False,
    ) -> tuple[Float[Tensor, "b u"], Tensor]:
        """-0.5 mean_d (net(x_t, t, c) - target)^2 at one random t, [B, 1], without guidance.

        The surrogate of Diffusion-DPO (arXiv 2311.12908) for a log-likelihood that is not known,
        with its 0.5 (diffusers' research script has none). t is uniform over the training time, and
        of a flow not shifted by resolution.

        Generators are read but not advanced: the same ones give both samples of a pair, and the
        policy and its reference, the same (t, noise).
        """
        asked = self.network if network is None else network
        context = self.reference() if reference else contextlib.nullcontext(asked)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference), context as judge:
            output, noised = self._renoised(trajectory, generators, judge)
        errors = (output - noised.target).square().flatten(1).mean(1)
        score = -0.5 * errors[:, None]
        return score, torch.ones_like(score, dtype=torch.bool)

    def errors(
        self,
        trajectory: Trajectory,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b ..."]:
        """At the times and with the noise of `pair_score`; see `Denoiser.errors`."""
        asked = self.network if network is None else network
        output, noised = self._renoised(trajectory, generators, asked)
        return noised.weight * (output - noised.target)

    @property
    def most_redrawn(self) -> int:
        """All steps; their activations stay in memory."""
        return self.num_steps

    def redraw(
        self,
        trajectory: Trajectory,
        last: int,
        *,
        generators: Sequence[torch.Generator],
        network: nn.Module | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """With guidance, as rollouts are drawn; see `Redrawing.redraw`."""
        self._check_judged()
        self._check_same(trajectory)
        judge = self.network if network is None else network
        first = self.num_steps - last
        latents = trajectory.actions[first - 1] if first else trajectory.start
        copies = [generator.clone_state() for generator in generators]
        with evaluating(bare(judge)):
            for step in range(first, self.num_steps):
                flag = trajectory.stochastic[step]
                mean = latents = self._mean(judge, latents, step, trajectory.conditions, flag)
                if flag:
                    noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in copies])
                    latents = mean + self.transitions.std(step) * noise.to(mean)
        assert latents is not None
        return self.calls.pixels(latents)

    def _renoised(
        self, trajectory: Trajectory, generators: Sequence[torch.Generator], judge: nn.Module
    ) -> tuple[Tensor, Noised]:
        """What a network says, without guidance, about final latents noised to a random time."""
        clean = trajectory.actions[-1].float()
        if len(generators) != len(clean):
            raise UserError(f"{len(generators)} generators for {len(clean)} samples")
        copies = [generator.clone_state() for generator in generators]
        place = torch.cat([torch.rand(1, generator=g) for g in copies]).to(clean.device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in copies])
        noised = self.transitions.noised(clean, noise.to(clean), place)
        chosen = self.plan.conditional
        sign = sum(self.plan.weights[0])
        with evaluating(bare(judge)):
            times = self.plan.network_times(noised.timesteps, self.transitions.timesteps)
            dtype, conditions = self.calls.network.dtype, trajectory.conditions
            (output,) = self.plan.outputs(judge, dtype, noised.latents, times, conditions, [chosen])
        return sign * output, noised

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The frozen network to compare with; see `Policy.reference`."""
        return reference_network(self.baseline, self.network)

    def _mean(
        self,
        network: nn.Module,
        latents: Tensor | None,
        step: int,
        conditions: tuple[Block, ...],
        stochastic: bool,
    ) -> Tensor:
        """Mean of a step, with guidance."""
        assert latents is not None, "only trajectories without steps have no start"
        dtype = self.calls.network.dtype
        output = self.plan.guided(network, dtype, latents, step, conditions)
        return self.transitions.mean(step, latents, output, stochastic)

    def _logp(self, value: Tensor, mean: Tensor, step: int) -> Tensor:
        std = self.transitions.std(step)
        return gaussian_log_prob(value, mean, std, self.settings["logp_reduction"])

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as rollouts are drawn; see `Denoiser.precision`."""
        if self.autocast is None:
            return contextlib.nullcontext()
        device = next(self.network.parameters()).device
        return torch.autocast(device.type, self.autocast)

    def _check_judged(self) -> None:
        if self.guidance_threshold is not None:
            raise UserError(
                "guidance_threshold makes guidance depend on what was drawn, which "
                "log-probabilities would not see: leave it out"
            )

    def _check_same(self, trajectory: Trajectory) -> None:
        """Log-probabilities under other settings than those of the draw would be no ratio."""
        if len(trajectory.actions) != self.num_steps:
            raise UserError(
                f"the trajectory has {len(trajectory.actions)} steps and the policy "
                f"{self.num_steps}; given pictures have no steps, only a pair_score"
            )
        changed = [k for k, now in self.settings.items() if trajectory.settings.get(k) != now]
        if changed:
            raise UserError(
                f"the trajectory was drawn with another {', '.join(changed)} than this policy's; "
                "evaluate it with the policy that drew it"
            )

    # ---- pictures ----------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, trajectory: Trajectory) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1], by the pipeline itself; a safety checker of it stays on."""
        latents = trajectory.actions[-1].split(self.batch_size)
        return torch.cat([self.calls.decode(self.plan, part) for part in latents])

    @torch.no_grad()
    def trajectory_of(
        self, images: Float[Tensor, "b 3 H W"], conditions: tuple[Block, ...]
    ) -> Trajectory:
        """Given pictures as clean latents, the mode of the VAE's posterior; for `pair_score`.

        How they were denoised is not known: there is one action, and its log-probability is NaN.
        """
        device = next(self.network.parameters()).device
        parts = [self.calls.latents(part.to(device)) for part in images.split(self.batch_size)]
        clean = torch.cat(parts)
        if tuple(clean.shape[1:]) != self.plan.latent_shape:
            raise UserError(
                f"pictures of {list(images.shape[2:])} pixels give latents {list(clean.shape[1:])},"
                f" but {type(self.pipe).__name__} denoises {list(self.plan.latent_shape)}; resize "
                "them to the size of its samples"
            )
        unknown = torch.full((len(clean),), torch.nan, device=device)
        given = self._trajectory(conditions, [clean], [unknown], (False,), None)
        return replace(given, guidance=(1.0,))


def _is_flow(pipe: Any) -> bool:
    """Whether the scheduler is of the flow kind; others have no log-probability."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = pipe.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | DDIMScheduler):
        return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    config = scheduler.config
    flow = "Flow" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    wanted = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    raise UserError(
        f"the steps of {type(scheduler).__name__} have no log-probability; set pipe.scheduler = "
        f"{wanted}.from_config(pipe.scheduler.config); for the command line, write that with "
        "pipe.save_pretrained(FOLDER) and give --model FOLDER"
    )


def _rows(conditions: tuple[Block, ...]) -> int:
    return len(next(iter(conditions[0].values())))
