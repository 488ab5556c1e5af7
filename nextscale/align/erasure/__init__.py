"""Taking concepts out of a next-scale model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextscale.align.erasure.config import EraseConfig
    from nextscale.align.erasure.train import EraseResult, erase

_HOME = {"EraseConfig": "config", "EraseResult": "train", "erase": "train"}

__all__ = ["EraseConfig", "EraseResult", "erase"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
