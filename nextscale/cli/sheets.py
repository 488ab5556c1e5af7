"""Many pictures in one file: filmstrip, grid, ADM archive."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nextscale.storage import atomic

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MARGIN = 4
LINE = 14


def filmstrip(images: Sequence[Tensor], scales: Sequence[tuple[int, int]]) -> Image.Image:
    """The picture after each scale, side by side, each with the scale's side under it.

    Args:
        images: Float [3, H, W] in [0, 1], one per scale.
        scales: (height, width) of every scale.
    """
    from PIL import Image, ImageDraw, ImageFont

    from nextscale.data.images import to_uint8

    height, width = images[0].shape[1:]
    size = (len(images) * (width + MARGIN) - MARGIN, height + LINE)
    strip = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size=10)
    for k, (image, (h, w)) in enumerate(zip(images, scales, strict=True)):
        left = k * (width + MARGIN)
        pixels = np.ascontiguousarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
        strip.paste(Image.fromarray(pixels), (left, 0))
        label = str(h) if h == w else f"{h}x{w}"
        draw.text((left + width / 2, height + 1), label, "black", font=font, anchor="mt")
    return strip


def write_grid(
    path: Path,
    pictures: Sequence[Path],
    captions: Sequence[str],
    per_condition: int,
    text: Mapping[str, str],
) -> None:
    """A sheet of PNG files, a row or more for each prompt or label."""
    import torch

    from nextscale.data.images import decode
    from nextscale.training.grid import save_grid

    images = np.stack([np.asarray(decode(p)) for p in pictures])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    columns = per_condition if 1 < per_condition <= 8 else 8
    save_grid(tensor, path, columns=columns, captions=captions, text=text)


def write_npz(
    path: Path, pictures: Sequence[Path], labels: Sequence[int] | None, *, progress: bool = False
) -> None:
    """arr_0 uint8 [N, H, W, 3] (and arr_1 int64 [N]), picture by picture, never all in memory."""
    from tqdm import tqdm

    from nextscale.data.images import decode

    first = np.asarray(decode(pictures[0]))
    shape = (len(pictures), *first.shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for picture in tqdm(pictures, desc="npz", unit="image", disable=not progress):
                file.write(np.ascontiguousarray(decode(picture)).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
