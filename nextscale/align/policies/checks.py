"""What both policies hold to when they draw and judge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from nextscale.errors import require


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
