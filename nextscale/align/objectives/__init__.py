"""Objectives: pure functions from log-probabilities to a scalar loss (names as in trl)."""

from nextscale.align.objectives.d2o import d2o_loss
from nextscale.align.objectives.dpo import dpo_loss, dpo_metrics
from nextscale.align.objectives.grpo import grpo_loss, grpo_metrics
from nextscale.align.objectives.kto import kto_loss
from nextscale.align.objectives.nft import diffusion_nft_loss, nft_loss
from nextscale.align.objectives.regression import reg_grpo_loss
from nextscale.align.objectives.seppo import seppo_loss

__all__ = [
    "d2o_loss",
    "diffusion_nft_loss",
    "dpo_loss",
    "dpo_metrics",
    "grpo_loss",
    "grpo_metrics",
    "kto_loss",
    "nft_loss",
    "reg_grpo_loss",
    "seppo_loss",
]
