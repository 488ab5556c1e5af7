"""Windows of tokens: what one update of EAR looks at."""

from __future__ import annotations

from nextscale.errors import require
from nextscale.tokenizers import ScaleSchedule


def token_windows(
    schedule: ScaleSchedule, smallest: int = 25, largest: int | None = 64
) -> list[slice]:
    """Cut the tokens of all scales into windows, coarse to fine (methods/erasure.md 4.2).

    EAR (arXiv 2506.20151) has windows of equal length over a raster; here a window is a scale.
    Small scales are joined until a window has `smallest` tokens, a remainder goes to the window
    before, and large scales are split in raster order. VAR-256: scales 1 to 4, then one by one.

    Args:
        schedule: Scales.
        smallest: Tokens that a window has at least, as far as there are that many.
        largest: Tokens that a window of one scale has at most; None: scales stay whole.

    Returns:
        Windows without gaps or overlaps, from 0 to the number of tokens.
    """
    require("window_smallest", smallest, smallest > 0, "be above 0")
    require("window_largest", largest, largest is None or largest > 0, "be above 0, or None")
    found: list[slice] = []
    start = 0
    for scale in schedule.slices:
        if scale.stop - start < smallest:
            continue  # joined with what follows
        whole = start == scale.start and largest is not None
        length = largest if whole and largest is not None else scale.stop - start
        found += [slice(i, min(i + length, scale.stop)) for i in range(start, scale.stop, length)]
        start = scale.stop
    if start < schedule.num_tokens:  # only a first remainder, as scales grow
        begin = found.pop().start if found else 0
        found.append(slice(begin, schedule.num_tokens))
    return found


def last_scale(schedule: ScaleSchedule, window: slice) -> int:
    """The scale in which a window ends."""
    return next(k for k, scale in enumerate(schedule.slices) if scale.stop >= window.stop)
