"""Settings of GRPO and of the methods that share its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.align.advantages import AGGREGATIONS, BASELINES, SCALES
from nextscale.align.objectives.grpo import LEVELS, LOSS_TYPES
from nextscale.errors import UserError, require

KL_ESTIMATORS = ("k1", "k2", "k3", "exact")
COVARIANCES = ("none", "clip", "kl")
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of GRPO; names and defaults as in trl 1.16 but for `loss_type`."""

    loss_type: str = "grpo"
    """trl's: grpo, bnpo, dapo, dr_grpo, cispo, sapo, luspo, vespo; and gbpo, gbpo_square (distance
    to the best policy within the clip range; with baseline median, scale_rewards none), mdpo
    (mirror descent)."""
    mirror_step: float = 1.0
    """mdpo: step size; the larger, the weaker the pull to the policy that drew the samples."""
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
    """Divide advantages by the deviation of the group, of the batch, none (Dr. GRPO), or by a Beta
    density of the groups' means: beta_norm (BNPO, for rewards in [0, 1])."""
    baseline: str = "mean"
    """What a group's rewards are compared with: mean, median (GBPO), or score_norm, the mean
    weighted by how far a sample moves the weights, by the proxy 1 - p of its tokens (OBLR-PO)."""
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

    covariance: str = "none"
    """Tokens whose log-probability goes with the advantage make the entropy collapse. clip: a
    random share of those of high covariance gets no gradient (Clip-Cov); kl: those of highest
    covariance are held by the absolute log-ratio, and none is clipped (KL-Cov)."""
    covariance_share: float = 0.01
    """Share of the tokens that are trained (the paper has 0.0002 and 0.002, of far more tokens)."""
    covariance_bounds: tuple[float, float] = (1.0, 5.0)
    """clip: lowest and highest covariance of such tokens."""
    covariance_coef: float = 1.0
    """kl: weight of the absolute log-ratio."""

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
            "baseline": BASELINES,
            "covariance": COVARIANCES,
            "multi_objective_aggregation": AGGREGATIONS,
            "scale_weight": ("token", "scale", "power"),
            "credit": ("trajectory", "vmr"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
        positive = ("epsilon", "epsilon_high", "vmr_samples", "vmr_temperature")
        for name in (*positive, "advantage_clip", "chunk_steps", "mirror_step"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        for name in ("beta", "entropy_coef", "std_eps", "covariance_coef"):
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
        plain = self.baseline == "mean" and self.scale_rewards != "beta_norm"
        together = self.multi_objective_aggregation == "sum_then_normalize"
        if not plain and not (together and self.credit == "trajectory"):
            raise UserError(
                "baseline and scale_rewards beta_norm need one reward and one advantage per "
                "sample: multi_objective_aggregation sum_then_normalize, credit trajectory"
            )
        clipped = self.loss_type in CLIPPED and self.importance_sampling_level == "token"
        if self.covariance == "kl" and not clipped:
            raise UserError(
                f"covariance kl takes the place of the clip of tokens: use loss_type "
                f"{' or '.join(CLIPPED)} and importance_sampling_level token"
            )
        low, high = self.covariance_bounds
        require("covariance_bounds", self.covariance_bounds, low < high, "be lowest, highest")
        if self.scale_rewards == "beta_norm" and self.baseline != "mean":
            raise UserError("scale_rewards beta_norm has its own baseline, the mean")
        for name in ("top_entropy_quantile", "step_fraction", "covariance_share"):
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
        "covariance": ("none",),
        "baseline": ("mean",),
        "scale_rewards": ("group", "batch", "none"),
    }
    for key, values in allowed.items():
        value, names = getattr(loss, key), " or ".join(map(str, values))
        require(f"{name}.{key}", value, value in values, f"be {names}: others are GRPO's alone")
