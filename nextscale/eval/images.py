"""Where the pictures to be measured come from: one interface over files, arrays and functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nextscale import processes, storage
from nextscale.data.formats import Columns, find_reader
from nextscale.data.images import BadImage, decode, is_sheet, save_png, scan_folder
from nextscale.data.readers import FolderReader, Reader, read_folder
from nextscale.data.tables import VALIDATION_NAMES
from nextscale.data.tars import expand_tars
from nextscale.errors import UserError

Function = Callable[[int, int], np.ndarray]
"""f(start, count) -> uint8 [count, h, w, 3]: draws pictures instead of reading them."""


@runtime_checkable
class Images(Protocol):
    """A finite list of uint8 RGB pictures.

    Attributes:
        labels: int64 [n], or None.
        parallel: Whether worker processes may read them.
        kinds: Format and mode of the files that were read, such as "PNG RGB".
    """

    labels: np.ndarray | None
    parallel: bool
    kinds: dict[int, str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        ...

    def load(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Pictures uint8 [h, w, 3], of one size or of many."""
        ...


class FileImages:
    """Pictures of a folder, an .npz with arr_0, tars or tables, by the readers of `data`."""

    parallel = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not Path(path).exists() and "{" not in str(path):
            raise UserError(
                f"there is no file or folder {path}. Give a folder of pictures, or an .npz, .npy, "
                ".zip, .tar or .parquet."
            )
        self.kinds: dict[int, str] = {}
        self.reader: Reader = _pictures_of(self.path) or find_reader(str(path), "all", Columns())[0]
        names = [self.reader.name(row) for row in range(len(self.reader))]
        self.rows = [row for row, name in enumerate(names) if not is_sheet(Path(name))]
        self.sheets = len(names) - len(self.rows)
        labels = self.reader.labels
        self.labels = None if labels is None else labels[self.rows]
        if self.labels is not None and self.labels.min() < 0:
            raise UserError(f"{path} has the label {self.labels.min()}: labels start at 0")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Path, or place in its file."""
        return self.reader.name(self.rows[index])

    def files(self) -> list[Path]:
        """Every file that holds pictures of the set."""
        if isinstance(self.reader, FolderReader):
            return [self.reader.paths[row] for row in self.rows]
        if self.path.is_dir():
            return sorted(path for path in self.path.rglob("*") if path.is_file())
        return [self.path] if self.path.exists() else sorted(map(Path, expand_tars(str(self.path))))

    def captions(self) -> list[str] | None:
        """Of every picture, where the files have any."""
        if not self.reader.has_captions:
            return None
        return [self.reader.caption(row) for row in self.rows]

    def load(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Decode; a file that cannot be read is an error that names it."""
        try:
            found = [self.reader.image(self.rows[row]) for row in rows]
        except BadImage as error:
            message = f"{error.name} is no readable image: {error.reason}. Remove or replace it."
            raise UserError(message) from error
        self.kinds |= {
            row: f"{picture.format} {picture.info.get('mode', 'RGB')}"
            for row, picture in zip(rows, found, strict=True)
            if picture.format is not None
        }
        return [np.asarray(picture) for picture in found]


def _pictures_of(folder: Path) -> FolderReader | None:
    """All pictures of a folder, whatever lies beside them; None: of tables, tars, or a list."""
    if not folder.is_dir() or (folder / "metadata.jsonl").is_file():
        return None
    parts = [name for name in ("train", *VALIDATION_NAMES) if (folder / name).is_dir()]
    if len(parts) > 1:
        raise UserError(f"{folder} has the parts {', '.join(parts)}: pass the one that is meant")
    pictures, _ = scan_folder(folder)
    if not pictures or (parts and all(path.parent != folder for path in pictures)):
        return None
    return read_folder(folder)


class ArrayImages:
    """Pictures in memory, or mapped from an .npy file."""

    labels: np.ndarray | None = None
    parallel = False

    def __init__(self, pixels: np.ndarray) -> None:
        self.kinds: dict[int, str] = {}
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
            raise UserError(
                f"pictures must be uint8 [n, h, w, 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Its place."""
        return f"picture {index}"

    def load(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Rows of the array."""
        return [np.asarray(self.pixels[row]) for row in rows]


class DrawnImages:
    """Pictures that a function draws, in batches of consecutive indices.

    Args:
        draw: The function.
        count: Of pictures.
        folder: Keep them there as PNGs, and draw only those that are not there yet.
        about: What they are drawn by; a folder of other pictures is refused.
        labels: Of their classes.
        text: What the PNG of a picture says about it, as text chunks.
    """

    parallel = False

    def __init__(
        self,
        draw: Function,
        count: int,
        folder: Path | None = None,
        about: Mapping[str, Any] | None = None,
        labels: np.ndarray | None = None,
        text: Callable[[int], Mapping[str, str]] | None = None,
    ) -> None:
        self.labels, self.text = labels, text
        self.draw, self.count, self.folder = draw, count, folder
        self.kinds: dict[int, str] = {}
        if folder is None:
            return
        claim_folder(folder, {**(about or {}), "count": count})

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """Its place."""
        return f"generated picture {index}"

    def load(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Draw rows[0], rows[0] + 1, ..., or read what an earlier run has drawn."""
        if self.folder is None:
            return self._draw(rows)
        paths = [self.folder / f"{row:06d}.png" for row in rows]
        if all(path.is_file() for path in paths):
            return [np.asarray(decode(path)) for path in paths]
        drawn = self._draw(rows)
        for row, path, picture in zip(rows, paths, drawn, strict=True):
            save_png(picture, path, self.text(row) if self.text else None)
        return drawn

    def _draw(self, rows: Sequence[int]) -> list[np.ndarray]:
        pixels = ArrayImages(np.asarray(self.draw(rows[0], len(rows)))).pixels
        if len(pixels) != len(rows):
            raise UserError(f"the source drew {len(pixels)} pictures where {len(rows)} were asked")
        return list(pixels)


def claim_folder(folder: str | Path, about: Mapping[str, Any]) -> None:
    """Make a folder for pictures, or find it as the same run left it.

    The first process looks, and all hear what it found.

    Args:
        folder: Where to.
        about: What the pictures are drawn by; kept in source.json.

    Raises:
        UserError: If it holds anything else.
    """
    problem = ""
    if processes.is_main():
        try:
            _claim(Path(folder), json.loads(json.dumps(dict(about))))
        except UserError as error:
            problem = str(error)
    if problem := processes.gather(problem)[0]:
        raise UserError(problem)


def _claim(folder: Path, what: dict[str, Any]) -> None:
    mark = folder / "source.json"
    with storage.os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in folder.iterdir() if not path.name.startswith(".tmp-")]
    if mark.is_file():
        if storage.read_json(mark) != what:
            raise UserError(
                f"{folder} holds pictures of another model, number or other settings "
                "(source.json): take another folder"
            )
    elif found:
        raise UserError(f"{folder} is not empty: take another folder")
    else:
        storage.write_json(mark, what)


def open_images(
    source: str | Path | np.ndarray | Tensor | Function | Images, count: int | None = None
) -> Images:
    """Make one interface of what holds pictures.

    Args:
        source: A folder (with subfolders), .npz with arr_0, .npy, .zip, .tar or .parquet; an array
            or tensor uint8 [n, h, w, 3], a tensor uint8 [n, 3, h, w]; a function f(start, count).
        count: How many pictures a function draws.

    Raises:
        UserError: If there are none, or floats, whose range would be a guess.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | Path):
        if Path(source).suffix == ".npy":
            try:
                return ArrayImages(np.load(source, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise UserError(f"{source} is no .npy with pictures ({error})") from error
        return FileImages(source)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        if source.ndim == 4 and source.shape[1] == 3 and source.shape[-1] != 3:
            source = source.permute(0, 2, 3, 1)
        return ArrayImages(source.numpy())
    if isinstance(source, np.ndarray):
        return ArrayImages(source)
    if not callable(source):
        raise UserError(
            f"pictures come as a path, an array, a tensor or a function, not as {type(source)}; "
            "stack a list of pictures of one size into an array uint8 [n, h, w, 3]"
        )
    if count is None or count < 1:
        raise UserError(f"a source function needs its number of pictures, got {count}")
    return DrawnImages(source, count)
