"""Listing, decoding, cropping and writing pictures: done here and nowhere else."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from nextscale.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_ASPECT = 64
Crop = Literal["random", "center", "none"]


class BadImage(UserError):
    """A file that is no readable image.

    Attributes:
        name: The file.
        reason: Why it cannot be read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} is no readable image: {reason}. Remove or replace it; in a dataset it is "
            "skipped unless --strict is given."
        )
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        # Exceptions are rebuilt from `args`, the message, when a data worker hands one over.
        return type(self), (self.name, self.reason)


def scan_folder(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Sort the files of a folder and its subfolders into images, by extension, and the rest.

    Hidden files and folders are passed over, as are the Thumbs.db and desktop.ini of Windows.

    Args:
        folder: An existing folder.

    Returns:
        Images and other files, each sorted by path.

    Raises:
        UserError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. Check the path.")
    images: list[Path] = []
    others: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
                continue
            path = Path(parent, name)
            (images if path.suffix.lower() in EXTENSIONS else others).append(path)
    return sorted(images), sorted(others)


def list_images(folder: str | Path) -> list[Path]:
    """Find the images of a folder and its subfolders by their extension.

    Args:
        folder: An existing folder.

    Returns:
        Paths, sorted; at least one.

    Raises:
        UserError: If there is no such folder, or no image in it.
    """
    images, others = scan_folder(folder)
    if not images:
        raise no_images(folder, len(others))
    return images


def is_sheet(path: Path) -> bool:
    """Grids and filmstrips that `nextscale generate` puts beside its pictures and recipe."""
    named = path.name == "grid.png" or re.fullmatch(r"\d{6}_scales\.png", path.name)
    return bool(named) and (path.parent / "recipe.yaml").is_file()


def no_images(folder: str | Path, others: int) -> UserError:
    """Build the error for a folder without images; `others` is the number of other files."""
    return UserError(
        f"there is no image in {folder} ({others} other files). "
        f"Images end in {', '.join(e[1:] for e in EXTENSIONS)}."
    )


def decode(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read a picture as the viewer would see it, in 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit values are scaled to 8
    bits, of an animation the first frame is taken. Colour profiles are ignored.

    Args:
        source: A path, or the bytes of a file.
        name: What to call it in the error; the path by default.

    Returns:
        An image of mode RGB, fully loaded; `format` and `info["mode"]` are the file's.

    Raises:
        BadImage: If it is missing, truncated, too large, or no image.
    """
    if name is None:
        name = "an image in memory" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            found = to_rgb(ImageOps.exif_transpose(image))
            found.format, found.info["mode"] = image.format, image.mode
            return found
    except Image.UnidentifiedImageError as error:
        raise BadImage(name, "its content is in no image format that Pillow knows") from error
    except (
        OSError,  # truncated or missing; the formats' plugins add the rest
        SyntaxError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        OverflowError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise BadImage(name, str(error) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit colours of a picture of any mode; 16 bits are scaled, transparency lies on white.

    Raises:
        ValueError: For floats outside [0, 1].
    """
    if image.mode.startswith("I"):  # I;16 and its kin; 16-bit grey of some formats comes as I
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("its floating-point values are outside [0, 1]")
        image = Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit_to(
    image: Image.Image,
    resolution: int,
    crop: Crop,
    *,
    overscale: float = 1.125,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """Make a square picture: resize the shorter side with Lanczos, then crop.

    The preparation of VAR's training and validation (arXiv 2404.02905, official code).

    Args:
        image: Mode RGB.
        resolution: Side of the result in pixels.
        crop: "random", "center", or "none" to squeeze the whole picture into the square.
        overscale: The shorter side becomes round(overscale * resolution), 1 or more; the crop then
            takes a part of the picture. Plays no part with crop="none".
        generator: Source of a random crop's place, a CPU generator.

    Returns:
        uint8 [resolution, resolution, 3].

    Raises:
        BadImage: If one side is more than 64 times the other: a crop would show nothing of it, and
            the enlarged strip could fill the memory.
        UserError: If overscale is below 1, or the crop is unknown or random without a generator.
    """
    if overscale < 1:
        raise UserError(f"overscale must be 1 or more, got {overscale}. Use 1 for no enlargement.")
    side = (resolution, resolution)
    if crop == "none":
        return np.asarray(image.resize(side, Image.Resampling.LANCZOS))
    short = min(image.size)
    if max(image.size) > MAX_ASPECT * short:
        reason = f"one side is more than {MAX_ASPECT} times the other ({image.size})"
        raise BadImage("the picture", reason)
    target = round(overscale * resolution)
    width, height = (target * n // short for n in image.size)
    room = (width - resolution, height - resolution)
    if crop == "center":
        left, top = (round(n / 2) for n in room)
    elif crop == "random" and generator is not None:
        left, top = _draw_place(room, generator)
    else:
        raise UserError(
            f'crop must be "random" (with a generator), "center" or "none", got "{crop}".'
        )
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def _draw_place(room: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    import torch

    u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return int(u * (room[0] + 1)), int(v * (room[1] + 1))


def save_png(
    image: Image.Image | np.ndarray, path: str | Path, text: Mapping[str, str] | None = None
) -> None:
    """Write a PNG so that the file is either complete or absent.

    Args:
        image: A PIL image, or uint8 [h, w, 3] or [h, w].
        path: Where to; its folder must exist.
        text: Written as PNG text chunks, readable as `Image.open(path).text`.
    """
    from nextscale.storage import atomic

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"save_png takes uint8 arrays, got {image.dtype}. Use to_uint8 first.")
        image = Image.fromarray(image)
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1], the range of the tokenizers."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8, rounded half up as VAR's; what lies outside is clamped."""
    import torch

    return (images.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)
