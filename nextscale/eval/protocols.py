"""What decides a figure of the FID family besides the images: frozen choices, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nextscale.errors import UserError
from nextscale.eval.scores import consecutive_splits

SIDE = 299  # what Inception sees


@dataclass(frozen=True)
class Protocol:
    """How pictures reach Inception. The network and the Fréchet term are the same for all.

    Attributes:
        name: As in `fid[adm]`.
        resize: tf1: bilinear on TensorFlow 1's grid (src = dst in / out, no antialiasing);
            bilinear: half-pixel grid without antialiasing; antialias: the same with it; clean:
            Pillow's bicubic with antialiasing on floats, clipped to 0..255.
        centre: Subtracted from the pixels 0..255 before the division.
        divisor: Of the pixels.
    """

    name: str
    resize: Literal["tf1", "bilinear", "antialias", "clean"]
    centre: float = 128.0
    divisor: float = 128.0


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("adm", "tf1"),
        Protocol("torch-fidelity", "tf1"),
        Protocol("clean", "clean"),
        Protocol("pytorch-fid", "bilinear", centre=127.5, divisor=127.5),
        Protocol("torchmetrics", "antialias"),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        UserError: If there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f'there is no protocol "{name}". Choose one of {", ".join(PROTOCOLS)}.')
    return PROTOCOLS[name]


def inception_splits(protocol: Protocol, count: int) -> np.ndarray:
    """The split of each of `count` pictures in the Inception score, int64 [count].

    adm: consecutive blocks of 5,000. torch-fidelity and torchmetrics: ten of the shuffled set, by
    torch-fidelity's numpy RandomState(2020) (torchmetrics' own shuffle has no seed). The others:
    ten consecutive ones. Borders lie at floor(i count / 10).
    """
    if protocol.name == "adm":
        return np.arange(count) // 5000
    splits = consecutive_splits(count, min(10, count))
    if protocol.name in ("torch-fidelity", "torchmetrics"):
        return splits[np.argsort(np.random.RandomState(2020).permutation(count))]
    return splits


def prepare(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], protocol: Protocol, device: torch.device | str
) -> Float[Tensor, "b 3 299 299"]:
    """Resize and normalise pictures, of one size or of many.

    Args:
        images: uint8, RGB.
        protocol: The choices.
        device: Where the resizing runs, except for `clean`, which is Pillow's.

    Returns:
        float32 input of Inception.
    """
    if protocol.resize == "clean":
        pixels = torch.stack([_clean(image) for image in images]).to(device)
        return (pixels - protocol.centre) / protocol.divisor
    out = torch.empty(len(images), 3, SIDE, SIDE, device=device)
    sizes = [image.shape[:2] for image in images]
    for size in set(sizes):
        rows = [i for i, found in enumerate(sizes) if found == size]
        batch = torch.from_numpy(np.stack([images[i] for i in rows])).to(device)
        pixels = batch.permute(0, 3, 1, 2).float()
        out[rows] = (_resize(pixels, protocol.resize) - protocol.centre) / protocol.divisor
    return out


def _resize(pixels: Tensor, kind: str) -> Tensor:
    if kind == "tf1":
        rows, columns = (_tf1_matrix(n, pixels.device) for n in pixels.shape[2:])
        return rows @ pixels @ columns.T
    if pixels.shape[2:] == (SIDE, SIDE):
        return pixels
    antialias = kind == "antialias"
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=antialias)


@lru_cache(maxsize=16)
def _tf1_matrix(size: int, device: torch.device) -> Float[Tensor, "299 n"]:
    """TensorFlow 1's bilinear resize of one axis as a matrix with two entries per row.

    Its grid is src = dst * size / 299 in float32, without the half pixel of other libraries.
    """
    place = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(size / SIDE)
    low = place.long()
    high = (low + 1).clamp(max=size - 1)
    weight = place - low
    matrix = torch.zeros(SIDE, size)
    rows = torch.arange(SIDE)
    matrix[rows, low] = 1 - weight
    matrix[rows, high] += weight
    return matrix.to(device)


def _clean(image: np.ndarray) -> Float[Tensor, "3 299 299"]:
    """clean-fid's resize (Parmar et al., arXiv 2104.11222): bicubic per channel on floats."""
    from PIL import Image

    channels = []
    for channel in np.moveaxis(image, -1, 0):
        part = Image.fromarray(channel.astype(np.float32))
        part = part.resize((SIDE, SIDE), resample=Image.Resampling.BICUBIC)
        channels.append(np.asarray(part).clip(0, 255))
    return torch.from_numpy(np.stack(channels))
