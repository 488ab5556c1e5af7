"""A sheet of images as one PNG, so that a person can look at a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nextscale.errors import UserError
from nextscale.storage import atomic

if TYPE_CHECKING:
    from torch import Tensor

PADDING = 4
LINE_HEIGHT = 12


def save_grid(
    images: Tensor,
    path: str | Path,
    columns: int = 8,
    captions: Sequence[str] | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Write images side by side, row by row, into one PNG file.

    Args:
        images: Float [N, 3, H, W] in [0, 1]; values outside are clamped.
        path: The file to write, atomically; parent folders are made.
        columns: Tiles per row.
        captions: One text per image, printed under its tile and wrapped to its width.
        text: Written as PNG text chunks, readable as `Image.open(path).text`.

    Raises:
        UserError: If the shape, `columns` or the number of captions does not fit.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise UserError(f"images must be [N, 3, H, W] with N > 0, got {tuple(images.shape)}.")
    if columns < 1:
        raise UserError(f"columns must be positive, got {columns}. Use 1 or more.")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"captions has {len(captions)} texts for {len(images)} images.")
    pixels = images.detach().float().clamp(0, 1).mul(255).add(0.5).byte().cpu().numpy()
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    count, height, width = pixels.shape[:3]
    font = ImageFont.load_default(size=10)
    texts = [_wrap(text, width, font) for text in captions or []]
    text_height = LINE_HEIGHT * max((text.count("\n") + 1 for text in texts), default=0)
    columns = min(columns, count)
    rows = -(-count // columns)
    cell_width, cell_height = width + PADDING, height + text_height + PADDING
    size = (columns * cell_width + PADDING, rows * cell_height + PADDING)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(count):
        x = PADDING + (index % columns) * cell_width
        y = PADDING + (index // columns) * cell_height
        sheet.paste(Image.fromarray(pixels[index]), (x, y))
        if texts:
            draw.multiline_text((x, y + height), texts[index], "black", font=font, spacing=0)
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=chunks)


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Break a caption at spaces so that each line fits the tile where a word can."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
