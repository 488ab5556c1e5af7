"""Modules without their wrapper, and without gradients of their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def bare(module: nn.Module) -> nn.Module:
    """Take off the DDP wrapper, to reach other methods than forward or to skip gradient exchange.

    The forward of what comes out still runs in mixed precision; its other methods do not.
    """
    wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
    return module.module if wrapped else module


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare module as a fixed function: gradients pass through, its weights get none.

    For a generator's loss through its discriminator; DDP would wait for the missing gradients.
    """
    module = bare(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
