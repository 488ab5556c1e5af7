"""nextscale: generate, train, align and measure next-scale image models.

The public names load on first use, so that `import nextscale` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale.pipeline import NextScalePipeline
    from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule
    from nextscale.var import NextScaleTransformer

__version__ = "0.1.0"

__all__ = [
    "MultiscaleVQ",
    "NextScalePipeline",
    "NextScaleTransformer",
    "ScaleSchedule",
    "__version__",
]

_HOMES = {
    "NextScalePipeline": "nextscale.pipeline",
    "MultiscaleVQ": "nextscale.tokenizers",
    "ScaleSchedule": "nextscale.tokenizers",
    "NextScaleTransformer": "nextscale.var",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
