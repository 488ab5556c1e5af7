"""GRPO: groups of samples of one prompt, each judged against its siblings.

What is different on next-scale models: units are tokens whose scales differ in size by two orders
of magnitude (`scale_weight`), a coarse scale can be judged by several completions of it
(`credit=vmr`), and tokens can be weighted by where they lie (`token_mask`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import (
    AGGREGATIONS,
    SCALES,
    combined_advantages,
    group_advantages,
    informative,
    soft_mean,
)
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.method import Loss
from nextscale.align.objectives.grpo import LEVELS, LOSS_TYPES, aggregate, grpo_loss, grpo_metrics
from nextscale.align.objectives.kl import k2
from nextscale.align.rewards.reward import call, numbers
from nextscale.align.trajectory import Policy, StepEval
from nextscale.align.units import trained_weights, unit_steps
from nextscale.errors import UserError, require
from nextscale.streams import stream

KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
WHOLE = ("luspo", "vespo")  # loss types whose ratio is that of a whole sample
_JUDGED = 32  # samples judged at once outside of the loss
TokenMask = Callable[[Float[Tensor, "b 3 H W"], Sequence[str | int]], Float[Tensor, "b u"]]
"""Pictures in [0, 1] and their prompts -> weight of every unit."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of GRPO; names and defaults as in trl 1.16 but for `loss_type`."""

    loss_type: str = "grpo"
    """grpo, bnpo, dapo, dr_grpo, cispo, sapo, luspo or vespo."""
    importance_sampling_level: str = "token"
    """token, or sequence: one ratio per sample (GSPO)."""
    epsilon: float | None = None
    """Clip range of the ratio; None: 0.2 (trl), or 1e-4 for diffusion with log-probabilities
    averaged over dimensions (DDPO), where 0.2 would never clip."""
    epsilon_high: float | None = None
    """Upper clip range; None: epsilon. DAPO: 0.28."""
    delta: float | None = None
    """Two-sided clip: cap of the ratio of bad samples, above 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference."""
    kl_estimator: str = "k3"
    """k3 (trl), k2, exact (the full sum or closed form), or k1 in the reward."""
    use_bias_correction_kl: bool = True
    """Multiply k3 by the importance ratio."""
    scale_rewards: str = "group"
    """Divide advantages by the deviation of the group, of the batch, or none (Dr. GRPO)."""
    multi_objective_aggregation: str = "sum_then_normalize"
    """Or normalize_then_sum (GDPO), for rewards on different scales."""
    std_ddof: int = 1
    """1: unbiased deviation (trl); 0: population (DDPO, Flow-GRPO)."""
    std_eps: float = 1e-4
    """Added to deviations."""
    advantage_clip: float | None = None
    """Clamp advantages to this; 5 in DDPO and its successors."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (categorical policies)."""
    top_entropy_quantile: float = 1.0
    """Only this share of a rollout's tokens, those of highest entropy, get a policy gradient (trl
    takes the share of each micro-batch); 1: all."""

    scale_weight: str = "token"
    """Weight of tokens: token (1), scale (1 / n_k, each scale is one action) or power (n_k^-a)."""
    scale_weight_alpha: float = 0.5
    """a of power."""
    scale_weights: tuple[float, ...] = ()
    """Weights per scale (or denoising step) instead; empty: as scale_weight says."""
    credit: Literal["trajectory", "vmr"] = "trajectory"
    """trajectory: one advantage for all scales. vmr: scales before `vmr_scale` are judged by the
    soft mean over `vmr_samples` completions, the later ones by their own reward."""
    vmr_scale: int = 3
    """First scale (or step) of the suffix."""
    vmr_samples: int = 2
    """Completions per prefix; a group then has num_generations x vmr_samples samples."""
    vmr_temperature: float = 1.0
    """tau of V = tau log mean exp(r / tau)."""
    vmr_alternate: bool = False
    """Train prefix and suffix in alternate rollouts instead of together."""

    chunk_steps: int | None = None
    """Denoising steps per forward and backward pass; None: 1 for diffusion. Next-scale
    transformers judge all scales in one pass."""
    step_fraction: float = 1.0
    """Share of the denoising steps that each optimizer step trains, drawn at random."""

    def __post_init__(self) -> None:
        choices = {
            "loss_type": LOSS_TYPES,
            "importance_sampling_level": LEVELS,
            "kl_estimator": KL_ESTIMATORS,
            "scale_rewards": SCALES,
            "multi_objective_aggregation": AGGREGATIONS,
            "scale_weight": ("token", "scale", "power"),
            "credit": ("trajectory", "vmr"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
        positive = ("epsilon", "epsilon_high", "vmr_samples", "vmr_temperature")
        for name in (*positive, "advantage_clip", "chunk_steps"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        for name in ("beta", "entropy_coef", "std_eps"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        require("std_ddof", self.std_ddof, self.std_ddof in (0, 1), "be 0 or 1")
        given = not self.scale_weights or max(self.scale_weights) > 0
        require("scale_weights", self.scale_weights, given, "have a number above 0")
        if self.multi_objective_aggregation == "normalize_then_sum":
            k1 = self.beta > 0 and self.kl_estimator == "k1"
            if k1 or self.credit == "vmr":
                what = "kl_estimator k1" if k1 else "credit vmr"
                raise UserError(
                    f"{what} needs one reward per sample: use multi_objective_aggregation "
                    "sum_then_normalize with reward_weights or reward_scales"
                )
        for name in ("top_entropy_quantile", "step_fraction"):
            value = getattr(self, name)
            require(name, value, 0 < value <= 1, "lie in (0, 1]")


def check_nested(name: str, loss: GRPOConfig) -> None:
    """What other methods do not take of GRPO's settings is refused, as it would do nothing.

    Raises:
        UserError: For such a setting.
    """
    allowed = {
        "credit": ("trajectory",),
        "kl_estimator": ("k3", "k2", "exact"),
        "top_entropy_quantile": (1.0,),
        "multi_objective_aggregation": ("sum_then_normalize",),
    }
    for key, values in allowed.items():
        value, names = getattr(loss, key), " or ".join(map(str, values))
        require(f"{name}.{key}", value, value in values, f"be {names}: others are GRPO's alone")


class GRPO:
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

    def items_per_group(self, num_generations: int) -> int:
        """Every sample is an example."""
        vmr = self.settings.credit == "vmr"
        return num_generations * (self.settings.vmr_samples if vmr else 1)

    def branch(self) -> tuple[int, int] | None:
        """For credit=vmr, `vmr_samples` completions from `vmr_scale` on."""
        if self.settings.credit != "vmr":
            return None
        return self.settings.vmr_scale, self.settings.vmr_samples

    # ---- from rewards to advantages ----------------------------------------------------------

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages of all samples; those of groups without differences are given weight 0."""
        settings, total = self.settings, rollout.total
        if settings.beta and settings.kl_estimator == "k1":
            total = total - settings.beta * self._mean_log_ratio(rollout)
        plain = self._advantages(rollout, total)
        columns = {"advantages": plain, "old_logps": self.old_logps(rollout)}
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
        strength = columns["advantages"].abs()
        strength = strength if strength.ndim == 1 else strength.amax(dim=1)
        items = torch.arange(len(plain), device=plain.device)[:, None]
        useful = informative(strength, rollout.groups).to(plain)
        return Experience(rollout, items, useful, columns)

    def old_logps(self, rollout: Rollout) -> Float[Tensor, "b u"]:
        """Log-probabilities under the policy when it drew the rollout."""
        parts = rollout.trajectory.logps
        return torch.cat([logp if logp.ndim == 2 else logp[:, None] for logp in parts], dim=1)

    def _advantages(self, rollout: Rollout, total: Tensor) -> Float[Tensor, " b"]:
        """One per sample; normalize_then_sum looks at the rewards one by one."""
        options = self._scaling()
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
    def _mean_log_ratio(self, rollout: Rollout) -> Float[Tensor, " b"]:
        """k1 = log pi - log ref of each sample, mean over units."""
        found = []
        for ev in self._judged(rollout, "ref_logp"):
            assert ev.ref_logp is not None
            mask = self._mask(ev)
            found.append(((ev.logp - ev.ref_logp) * mask).sum(1) / mask.sum(1))
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
        averaged = self.settings.loss_type in ("grpo", "sapo")
        normalizer = each[rows] if averaged else each.mean() * len(rows)
        for chunk in chunks:
            ev = self.policy.evaluate(trajectory, chunk, need=self._need(), network=network)
            yield self._loss(ev, own, self._mask(ev, own.get("mask")), weight, normalizer)

    def _loss(
        self, ev: StepEval, own: dict[str, Tensor], mask: Tensor, weight: Tensor, normalizer: Tensor
    ) -> Loss:
        settings = self.settings
        # Without them the weights are still those that drew the samples.
        old = own["old_logps"][:, ev.unit] if "old_logps" in own else ev.logp.detach()
        advantages = own["advantages"]
        advantages = advantages[:, None] if advantages.ndim == 1 else advantages[:, ev.unit]
        advantages = (advantages * weight[:, None]).expand_as(ev.logp)
        k3 = settings.beta if settings.kl_estimator == "k3" else 0.0
        shared = {
            "epsilon": self.epsilon,
            "epsilon_high": settings.epsilon_high,
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
            delta=settings.delta,
            beta=k3,
            max_completion_length=sum(self.policy.units),
            normalizer=normalizer,
            **shared,
        )
        extra = self._extra_terms(ev)
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
