"""A small network in place of Inception, and pictures for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class TinyNetwork:
    """Mean colours, a few pixels and their products: quick features of any picture."""

    def __init__(self, protocol: str = "adm") -> None:
        self.protocol, self.taps = protocol, {"pool": 6, "spatial": 4, "logits": 5}
        self.labels = dict.fromkeys(self.taps, protocol)

    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        means = torch.tensor(np.stack([i.reshape(-1, 3).mean(0) / 255 for i in images]))
        spread = torch.tensor(np.stack([i.reshape(-1, 3).std(0) / 255 for i in images]))
        pool = torch.cat([means, spread], dim=1).float()
        return {"pool": pool, "spatial": pool[:, :4] ** 2, "logits": 5 * pool[:, :5]}

    def fingerprint(self) -> dict[str, str]:
        return {"network": "tiny", "protocol": self.protocol}


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (count, 1, 1, 3))
    noise = random.integers(-40, 40, (count, side, side, 3))
    return (colours + noise).clip(0, 255).astype(np.uint8)
