"""GRPO: groups of samples of one prompt, each judged against its siblings.

What is different on next-scale models: units are tokens whose scales differ in size by two orders
of magnitude (`scale_weight`), a coarse scale can be judged by several completions of it
(`credit=vmr`), and tokens can be weighted by where they lie (`token_mask`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import (
    combined_advantages,
    group_advantages,
    informative,
    soft_mean,
)
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.covariance import covariances, highest, random_between
from nextscale.align.methods.grpo_config import GRPOConfig
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.objectives.grpo import BY_SAMPLE, aggregate, grpo_loss, grpo_metrics
from nextscale.align.objectives.kl import k2
from nextscale.align.prompts import Prompt
from nextscale.align.rewards.reward import AnyReward, CheckedReward, call, numbers
from nextscale.align.trajectory import Policy, StepEval
from nextscale.align.units import trained_weights, unit_steps
from nextscale.errors import UserError, require
from nextscale.streams import stream

WHOLE = ("luspo", "vespo")  # loss types whose ratio is that of a whole sample
_JUDGED = 32  # samples judged at once outside of the loss
TokenMask = Callable[[Float[Tensor, "b 3 H W"], Sequence[str | int]], Float[Tensor, "b u"]]
"""Pictures in [0, 1] and their prompts -> weight of every unit."""


class GRPO(Method):
    """The policy gradient of `grpo_loss` on groups of samples.

    Args:
        settings: See there.
        policy: What is trained.
        token_mask: Further weights of units, from the pictures; None: all count.

    Raises:
        UserError: For settings that do not fit the policy.
    """

    def __init__(
        self,
        settings: GRPOConfig,
        policy: Policy,
        token_mask: TokenMask | None = None,
    ) -> None:
        self.settings, self.policy = settings, policy
        self.epsilon = settings.epsilon or (1e-4 if policy.averaged else 0.2)
        least = 1 + (settings.epsilon_high or self.epsilon)
        capped = settings.delta is None or settings.delta > least
        require("grpo.delta", settings.delta, capped, f"be above 1 + epsilon_high, {least:g}")
        self.token_mask = token_mask
        self.needs_reference = settings.beta > 0
        given = settings.scale_weights or settings.scale_weight
        self.weights = trained_weights(policy, given, settings.scale_weight_alpha)
        gaussian = policy.kind == "gaussian"
        if gaussian and (settings.entropy_coef or settings.top_entropy_quantile < 1):
            raise UserError("entropy settings are for next-scale models; set entropy_coef 0")
        if gaussian and (settings.covariance != "none" or settings.baseline == "score_norm"):
            what = "baseline score_norm" if settings.covariance == "none" else "covariance"
            raise UserError(f"grpo.{what} looks at probabilities of tokens: for next-scale models")
        self.chunk = settings.chunk_steps or (1 if gaussian else policy.num_steps)
        sequence = settings.importance_sampling_level == "sequence"
        if self.chunk < policy.num_steps and (sequence or settings.loss_type in WHOLE):
            what = "importance_sampling_level sequence" if sequence else settings.loss_type
            raise UserError(
                f"{what} needs all steps at once; set grpo.chunk_steps {policy.num_steps}"
            )
        if settings.credit == "vmr":
            last = policy.num_steps - 1
            fits = 0 < settings.vmr_scale <= last
            require("grpo.vmr_scale", settings.vmr_scale, fits, f"lie in [1, {last}]")

    def check(
        self, prompts: Sequence[Prompt], rewards: Sequence[tuple[AnyReward, float]], mode: str
    ) -> None:
        """Refuse rewards that are known to leave what beta_norm takes; see `Method.check`."""
        if self.settings.scale_rewards != "beta_norm" or mode != "sum":
            return
        used = [(reward, weight) for reward, weight in rewards if weight]
        known = [(w, *r.range) for r, w in used if isinstance(r, CheckedReward)]
        low, high = (sum(pick(w * a, w * b) for w, a, b in known) for pick in (min, max))
        unknown = len(known) < len(used) or not (math.isfinite(low) and math.isfinite(high))
        require(
            "the range of the weighted rewards, for scale_rewards beta_norm,",
            f"{low:g} to {high:g}",
            unknown or (low >= 0 and high <= 1),
            "lie in [0, 1]; change reward_weights",
        )

    def items_per_group(self, num_generations: int) -> int:
        """Every sample is an example."""
        vmr = self.settings.credit == "vmr"
        return num_generations * (self.settings.vmr_samples if vmr else 1)

    def branch(self) -> Sequence[tuple[int, int]]:
        """For credit=vmr, `vmr_samples` completions from `vmr_scale` on."""
        if self.settings.credit != "vmr":
            return ()
        return ((self.settings.vmr_scale, self.settings.vmr_samples),)

    # ---- from rewards to advantages ----------------------------------------------------------

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages of all samples; those of groups without differences are given weight 0."""
        settings, total = self.settings, rollout.total
        if settings.beta and settings.kl_estimator == "k1":
            total = total - settings.beta * self.log_ratios(rollout, mean=True)
        plain = self._advantages(rollout, total)
        columns = {"advantages": plain, "old_logps": old_logps(rollout)}
        if settings.credit == "vmr":
            columns["advantages"] = self._vmr(rollout, total, plain)
        if settings.advantage_clip is not None:
            limit = settings.advantage_clip
            columns["advantages"] = columns["advantages"].clamp(-limit, limit)
        if settings.top_entropy_quantile < 1:
            per_unit = columns["advantages"].view(len(plain), -1)
            columns["advantages"] = per_unit * self._uncertain(rollout)
        if self.token_mask is not None:
            columns["mask"] = self._token_weights(self.token_mask, rollout).to(plain)
        if settings.covariance != "none":
            columns |= self._by_covariance(rollout, columns)
        strength = columns["advantages"].abs()
        strength = strength if strength.ndim == 1 else strength.amax(dim=1)
        items = torch.arange(len(plain), device=plain.device)[:, None]
        useful = informative(strength, rollout.groups).to(plain)
        return Experience(rollout, items, useful, columns)

    def _advantages(self, rollout: Rollout, total: Tensor) -> Float[Tensor, " b"]:
        """One per sample; normalize_then_sum looks at the rewards one by one."""
        options = self._scaling()
        if self.settings.baseline != "mean":
            norms = (1 - old_logps(rollout).exp()) * self.weights.to(total)
            options |= {"baseline": self.settings.baseline, "score_norms": norms.sum(1)}
        if self.settings.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(total, rollout.groups, **options)
        return combined_advantages(
            rollout.rewards,
            rollout.weights,
            rollout.groups,
            multi_objective_aggregation="normalize_then_sum",
            **options,
        )

    def _scaling(self) -> dict[str, Any]:
        names = ("scale_rewards", "std_eps", "std_ddof")
        return {name: getattr(self.settings, name) for name in names}

    def _by_covariance(
        self, rollout: Rollout, columns: dict[str, Tensor]
    ) -> dict[str, Float[Tensor, "b u"]]:
        """Clip-Cov: tokens without gradient; KL-Cov: "held", those that are held."""
        settings, old = self.settings, columns["old_logps"]
        advantages = columns["advantages"].view(len(old), -1).expand_as(old)
        counted = (self.weights > 0).to(old.device).expand_as(old)
        found, share = covariances(advantages, old, counted), settings.covariance_share
        if settings.covariance == "kl":
            return {"held": highest(found, share, counted).to(old)}
        low, high = settings.covariance_bounds
        clipped = random_between(found, low, high, share, counted, stream(*rollout.key, 13))
        return {"advantages": torch.where(clipped, 0.0, advantages)}

    def _vmr(self, rollout: Rollout, total: Tensor, plain: Tensor) -> Float[Tensor, "b u"]:
        """[B, U]: units before `vmr_scale` get their prefix's advantage, the others their own."""
        settings, samples = self.settings, self.settings.vmr_samples
        values = soft_mean(total.view(-1, samples), settings.vmr_temperature)
        prefixes = group_advantages(values, rollout.groups[::samples], **self._scaling())
        prefixes = prefixes.repeat_interleave(samples)
        step = unit_steps(self.policy).to(plain.device)
        early = (step < settings.vmr_scale)[None]
        advantages = torch.where(early, prefixes[:, None], plain[:, None])
        if settings.vmr_alternate:
            of_prefix = rollout.key[1] % 2 == 0
            advantages = torch.where(early == of_prefix, advantages, 0.0)
        return advantages

    @torch.no_grad()
    def log_ratios(
        self, rollout: Rollout, *, mean: bool = False, weighted: bool = True
    ) -> Float[Tensor, " b"]:
        """k1 = log pi - log ref of each sample, sum or mean over its units, by their weight or all.

        Unweighted, the sum is that of whole samples.
        """
        found = []
        for ev in self._judged(rollout, "ref_logp"):
            assert ev.ref_logp is not None
            mask = self._mask(ev) if weighted else ev.mask.to(ev.logp)
            total = ((ev.logp - ev.ref_logp) * mask).sum(1)
            found.append(total / mask.sum(1) if mean else total)
        return torch.cat(found)

    @torch.no_grad()
    def _uncertain(self, rollout: Rollout) -> Bool[Tensor, "b u"]:
        """The units that count, of highest entropy among all of the rollout."""
        found = []
        for ev in self._judged(rollout, "entropy"):
            assert ev.entropy is not None
            counted = ev.mask & (self.weights.to(ev.logp) > 0)
            found.append(torch.where(counted, ev.entropy, torch.nan))
        entropy = torch.cat(found)
        order = entropy[~entropy.isnan()].sort(descending=True).values
        count = max(1, round(self.settings.top_entropy_quantile * len(order)))
        return entropy >= order[count - 1]

    def _judged(self, rollout: Rollout, need: str) -> Iterator[StepEval]:
        """The samples under the current weights, some at a time."""
        for start in range(0, len(rollout.trajectory), _JUDGED):
            part = rollout.trajectory.index(slice(start, start + _JUDGED))
            yield self.policy.evaluate(part, need=("logp", need))

    def _token_weights(self, token_mask: TokenMask, rollout: Rollout) -> Float[Tensor, "b u"]:
        """What the user's mask says of the rollout's pictures."""
        conditions = [prompt.condition for prompt in rollout.prompts]
        found = call("token_mask", token_mask, rollout.trajectory.images, conditions)
        size = (len(conditions), sum(self.policy.units))
        what = f"weights of 0 or more, {list(size)}, one per token of all scales"
        found = numbers("token_mask", found, size, what)
        if not bool((found >= 0).all()):
            raise UserError(
                f"token_mask must return {what}; the least is {float(found.min()):g}", exit_code=1
            )
        return found

    # ---- loss --------------------------------------------------------------------------------

    def losses(
        self,
        experience: Experience,
        examples: Int[Tensor, " n"],
        step: int,
        network: nn.Module,
        *,
        first_step: int = 0,
    ) -> Iterator[Loss]:
        """`grpo_loss` of some samples from a first step on, one part per chunk of steps."""
        rows = experience.items[examples, 0]
        trajectory = experience.rollout.trajectory.index(rows)
        weight = experience.weights[examples]
        own = {name: column[rows] for name, column in experience.columns.items()}
        steps = self._steps(trajectory.stochastic, experience.rollout.key, step, first_step)
        chunks = [steps[i : i + self.chunk] for i in range(0, len(steps), self.chunk)]
        # Sums of the weights over all steps, which neither chunks nor micro-batches change: of each
        # sample, or of all samples of the rollout.
        each = self._step_weights(experience, steps).sum(1).expand(len(experience.rollout.groups))
        averaged = self.settings.loss_type in BY_SAMPLE
        normalizer = each[rows] if averaged else each.mean() * len(rows)
        fresh = step == trajectory.model_version
        for chunk in chunks:
            ev = self.policy.evaluate(trajectory, chunk, need=self._need(), network=network)
            mask = self._mask(ev, own.get("mask"))
            yield self._loss(ev, own, mask, weight, normalizer, fresh=fresh)

    def _loss(
        self,
        ev: StepEval,
        own: dict[str, Tensor],
        mask: Tensor,
        weight: Tensor,
        normalizer: Tensor,
        *,
        fresh: bool,
    ) -> Loss:
        settings = self.settings
        # Without them the weights are still those that drew the samples.
        old = own["old_logps"][:, ev.unit] if "old_logps" in own else ev.logp.detach()
        advantages = own["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages[:, ev.unit]
        advantages = (advantages * weight[:, None]).expand_as(ev.logp)
        k3 = settings.beta if settings.kl_estimator == "k3" else 0.0
        held = own["held"][:, ev.unit] if "held" in own else None  # KL-Cov, which clips nowhere
        shared = {
            "epsilon": self.epsilon if held is None else math.inf,
            "epsilon_high": settings.epsilon_high if held is None else None,
            "importance_sampling_level": settings.importance_sampling_level,
            "use_bias_correction_kl": settings.use_bias_correction_kl,
        }
        loss = grpo_loss(
            ev.logp,
            old,
            advantages,
            mask,
            ref_logps=ev.ref_logp,
            loss_type=settings.loss_type,
            delta=settings.delta if held is None else None,
            beta=k3,
            max_completion_length=sum(self.policy.units),
            normalizer=normalizer,
            mirror_step=settings.mirror_step,
            **shared,
        )
        extra = self._extra_terms(ev)
        if held is not None:
            distance = torch.zeros_like(ev.logp) if fresh else (ev.logp - old).abs()
            term = settings.covariance_coef * distance * held
            extra = term if extra is None else extra + term
        if extra is not None:
            length = sum(self.policy.units)
            loss = loss + aggregate(
                extra, mask, settings.loss_type, max_completion_length=length, normalizer=normalizer
            )
        metrics = grpo_metrics(ev.logp, old, advantages, mask, ref_logps=ev.ref_logp, **shared)
        if ev.entropy is not None:
            entropy = (ev.entropy.detach() * mask).sum() / mask.sum().clamp_min(1e-12)
            metrics["entropy"] = float(entropy)
        if ev.kl is not None:
            metrics["kl"] = float((ev.kl.detach() * mask).sum() / mask.sum().clamp_min(1e-12))
        return loss, metrics

    def _extra_terms(self, ev: StepEval) -> Tensor | None:
        """Terms per unit that `grpo_loss` does not have: other KL forms, entropy."""
        settings, terms = self.settings, []
        if settings.beta and settings.kl_estimator == "exact":
            assert ev.kl is not None
            terms.append(settings.beta * ev.kl)
        if settings.beta and settings.kl_estimator == "k2":
            assert ev.ref_logp is not None
            terms.append(settings.beta * k2(ev.logp - ev.ref_logp))
        if settings.entropy_coef:
            assert ev.entropy is not None
            terms.append(-settings.entropy_coef * ev.entropy)
        return sum(terms[1:], terms[0]) if terms else None

    def _need(self) -> tuple[str, ...]:
        need = ["logp"]
        if self.settings.beta:
            need.append("kl" if self.settings.kl_estimator == "exact" else "ref_logp")
        if self.policy.kind == "categorical":
            need.append("entropy")
        return tuple(need)

    def _mask(self, ev: StepEval, token_mask: Tensor | None = None) -> Float[Tensor, "b u"]:
        """Weight of each unit: scale weights and token mask."""
        mask = ev.mask.to(ev.logp) * self.weights.to(ev.logp)[ev.unit]
        return mask if token_mask is None else mask * token_mask[:, ev.unit]

    def _step_weights(self, experience: Experience, steps: Sequence[int]) -> Float[Tensor, "b u"]:
        """The weights of all units of these steps, of every sample."""
        device = experience.items.device
        chosen = torch.isin(unit_steps(self.policy), torch.tensor(list(steps)))
        mask = (self.weights * chosen).to(device)[None]
        return mask * experience.columns["mask"] if "mask" in experience.columns else mask

    def _steps(
        self, stochastic: Sequence[bool], key: tuple[int, int], step: int, first: int
    ) -> list[int]:
        """The steps to train: stochastic ones of a weight above 0, or a random share of them."""
        counted = set(unit_steps(self.policy)[self.weights > 0].tolist())
        steps = [s for s in range(first, self.policy.num_steps) if stochastic[s] and s in counted]
        if not steps:
            raise UserError(
                "no step of the rollout was random and has a weight, so there is nothing to train"
            )
        if self.settings.step_fraction == 1:
            return steps
        count = max(1, round(self.settings.step_fraction * len(steps)))
        order = torch.randperm(len(steps), generator=stream(key[0], step, 11))
        return sorted(steps[i] for i in order[:count].tolist())
