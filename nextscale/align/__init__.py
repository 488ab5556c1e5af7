"""Rewards, policies, advantages, objectives, methods: a generator is tuned by what it draws."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextscale.align.config import AlignConfig
    from nextscale.align.rewards import as_reward, open_reward
    from nextscale.align.start_model import Start
    from nextscale.align.train import AlignResult, align

_HOME = {
    "AlignConfig": "config",
    "AlignResult": "train",
    "Start": "start_model",
    "align": "train",
    "as_reward": "rewards",
    "open_reward": "rewards",
}

__all__ = ["AlignConfig", "AlignResult", "Start", "align", "as_reward", "open_reward"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
