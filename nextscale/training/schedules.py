"""Learning rate and weight decay as pure functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math

from nextscale.training.config import TrainingConfig

# VAR (arXiv 2404.02905, released trainer): where the warm-up starts.
VAR_WARMUP_START = 0.005


def lr_factor(config: TrainingConfig, step: int) -> float:
    """Learning rate of a step as a fraction of the peak.

    Args:
        config: The run; `lr_scheduler`, `lr_warmup_steps`, `lr_final`, `max_train_steps` count.
        step: Number of optimizer steps already taken, from 0.
    """
    warmup = config.lr_warmup_steps
    if step < warmup:
        if config.lr_scheduler == "var":
            return VAR_WARMUP_START + (1 - VAR_WARMUP_START) * step / warmup
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.max_train_steps - 1 - warmup))
    if config.lr_scheduler == "constant":
        return 1.0
    if config.lr_scheduler == "linear":
        left = 1 - progress
    elif config.lr_scheduler == "cosine":
        left = 0.5 + 0.5 * math.cos(math.pi * progress)
    else:
        left = min(1.0, (1 - progress) / (1 - config.lr_hold))
    return config.lr_final + (1 - config.lr_final) * left


def weight_decay_at(config: TrainingConfig, step: int) -> float:
    """Weight decay of a step: a half cosine from `weight_decay` to `weight_decay_end`.

    Args:
        config: The run.
        step: Number of optimizer steps already taken, from 0.
    """
    if config.weight_decay_end is None:
        return config.weight_decay
    progress = min(1.0, step / max(1, config.max_train_steps - 1))
    ramp = 0.5 + 0.5 * math.cos(math.pi * progress)
    return config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * ramp
