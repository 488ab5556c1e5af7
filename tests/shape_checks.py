"""jaxtyping's run-time checker for the suite: the annotations with tensor shapes and no others.

Other annotations are pyright's: tests pass wrong values on purpose to see the package's own errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import torch.utils._contextlib
from beartype import beartype
from jaxtyping import AbstractArray


def _is_generator(function: Callable[..., Any]) -> bool:
    return inspect.isgeneratorfunction(inspect.unwrap(function))


# jaxtyping wraps a generator in a plain function, whose steps `torch.no_grad()` would let record
# gradients: the graphs of what the suite samples grew to 15 GB.
_UNWRAPPING: Any = SimpleNamespace(**{**vars(inspect), "isgeneratorfunction": _is_generator})
torch.utils._contextlib.inspect = _UNWRAPPING  # pyright: ignore[reportPrivateImportUsage]


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype` on those arguments and results that name a tensor's shape."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if _names_a_shape(hint)
    }
    return beartype(function)


def _names_a_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_names_a_shape, get_args(hint)))
