"""Keys and values of the scales that are already decoded."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Preallocated keys and values of all L positions for every block.

    A block writes the positions of the scale it computes and reads those that the mask policy
    shows it. Rows can be dropped or repeated between scales (guidance that ends early, branches).

    Args:
        depth: Blocks.
        batch: Rows.
        heads: Attention heads.
        num_tokens: L.
        head_size: Channels per head.
        dtype: Of keys and values.
        device: Where.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch: int,
        heads: int,
        num_tokens: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (depth, batch, heads, num_tokens, head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def update(self, block: int, where: slice, keys: Tensor, values: Tensor) -> None:
        """Store [b, n, l, e] at the positions `where`."""
        self.keys[block, :, :, where] = keys
        self.values[block, :, :, where] = values

    def read(self, block: int, where: slice) -> tuple[Tensor, Tensor]:
        """Keys and values at the positions `where`, as views."""
        return self.keys[block, :, :, where], self.values[block, :, :, where]

    def select(self, rows: Tensor | slice) -> None:
        """Keep, drop, reorder or repeat rows; a slice keeps the memory, an index tensor copies."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
