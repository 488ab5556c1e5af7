"""The schedule of scales: every piece of index arithmetic on token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nextscale.errors import UserError

# Schedules of the released checkpoints by the token count L of a transformer file.
OFFICIAL_SCALES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclass(frozen=True)
class ScaleSchedule:
    """Scales 0..K-1, coarse to fine; tokens are concatenated coarse to fine, row-major in a scale.

    Attributes:
        sides: One (height, width) in latent cells per scale; a plain integer means a square.
    """

    sides: tuple[tuple[int, int], ...]

    def __init__(self, sides: Iterable[int | Sequence[int]]) -> None:
        try:
            pairs = tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in sides)
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(f"scales must be sides such as 1 2 3 4, got {sides}") from error
        if not pairs or any(min(pair) < 1 for pair in pairs):
            raise UserError(f"scales must be positive sides such as 1 2 3 4, got {list(pairs)}")
        object.__setattr__(self, "sides", pairs)

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.sides)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the finest scale, the latent grid."""
        return self.sides[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(h * w for h, w in self.sides)

    @property
    def num_tokens(self) -> int:
        """L, tokens of all scales."""
        return sum(self.lengths)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each scale lies in the sequence of L tokens."""
        starts = [sum(self.lengths[:k]) for k in range(self.num_scales + 1)]
        return tuple(slice(a, b) for a, b in pairwise(starts))

    def split(self, tokens: Tensor, dim: int = 1) -> list[Tensor]:
        """Cut the token axis of length L into K pieces.

        Raises:
            UserError: If the axis has another length.
        """
        if tokens.shape[dim] != self.num_tokens:
            raise UserError(
                f"expected {self.num_tokens} tokens for the scales {self}, got {tokens.shape[dim]}"
            )
        return list(tokens.split(list(self.lengths), dim=dim))

    def scale_index(self, device: torch.device | str | None = None) -> Int[Tensor, " t"]:
        """The scale 0..K-1 of each of the L positions."""
        lengths = torch.tensor(self.lengths, device=device)
        scales = torch.arange(self.num_scales, device=device)
        return scales.repeat_interleave(lengths, output_size=self.num_tokens)

    def causal_mask(self, device: torch.device | str | None = None) -> Bool[Tensor, "t t"]:
        """Block-causal mask, True where row i may attend to column j: scale(i) >= scale(j)."""
        scale = self.scale_index(device)
        return scale[:, None] >= scale[None, :]

    def truncate(self, num_scales: int) -> ScaleSchedule:
        """The first `num_scales` scales (progressive training)."""
        return ScaleSchedule(self.sides[:num_scales])

    def to_list(self) -> list[int | list[int]]:
        """JSON form; the constructor reads it back."""
        return [h if h == w else [h, w] for h, w in self.sides]

    def __str__(self) -> str:
        return " ".join(str(h) if h == w else f"{h}x{w}" for h, w in self.sides)


@overload
def as_schedule(scales: ScaleSchedule | Iterable[int | Sequence[int]]) -> ScaleSchedule: ...
@overload
def as_schedule(scales: None) -> None: ...
def as_schedule(
    scales: ScaleSchedule | Iterable[int | Sequence[int]] | None,
) -> ScaleSchedule | None:
    """A schedule from itself, from sides, or from None."""
    if scales is None or isinstance(scales, ScaleSchedule):
        return scales
    return ScaleSchedule(scales)
