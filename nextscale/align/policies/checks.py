"""What both policies hold to when they draw and judge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from nextscale.align.references import Reference
from nextscale.errors import UserError, require


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, whatever it was afterwards: dropout would change log-probs."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def check_branch(at_step: int, num_steps: int, count: int) -> None:
    """Refuse branches that no trajectory has."""
    require("at_step", at_step, 0 <= at_step <= num_steps, f"lie in [0, {num_steps}]")
    require("count", count, count > 0, "be above 0")


def reference_network(
    baseline: Reference | None, network: nn.Module
) -> contextlib.AbstractContextManager[nn.Module]:
    """The network that KL terms compare with, for a `with` block."""
    if baseline is None:
        raise UserError(
            "this policy has no reference; pass reference= to compare with one, or set beta 0"
        )
    return baseline.use(network)
