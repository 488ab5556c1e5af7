"""The one loop that the trainers share: steps, EMA, checkpoint, resume, log (on accelerate)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextscale.training.checkpoint import latest_checkpoint
    from nextscale.training.config import TrainingConfig
    from nextscale.training.grid import save_grid
    from nextscale.training.loop import FitResult, fit
    from nextscale.training.optimizers import adamw, decay_groups
    from nextscale.training.schedules import lr_factor, weight_decay_at
    from nextscale.training.wrapping import bare, frozen

# The command line reads TrainingConfig for its help, so this import must not pull in torch.
_HOME = {
    "TrainingConfig": "config",
    "fit": "loop",
    "FitResult": "loop",
    "bare": "wrapping",
    "frozen": "wrapping",
    "adamw": "optimizers",
    "decay_groups": "optimizers",
    "latest_checkpoint": "checkpoint",
    "lr_factor": "schedules",
    "weight_decay_at": "schedules",
    "save_grid": "grid",
}

__all__ = [
    "FitResult",
    "TrainingConfig",
    "adamw",
    "bare",
    "decay_groups",
    "fit",
    "frozen",
    "latest_checkpoint",
    "lr_factor",
    "save_grid",
    "weight_decay_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
