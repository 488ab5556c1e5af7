"""Readers of datasets on disk: what picture i is, what label, caption and name it has.

A reader decodes but does not resize, and has no opinion on order. Folders and .npz are read here,
tables in `tables.py`, WebDataset tars in `tars.py`; `sources.open_source` chooses.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from nextscale.data.images import decode, no_images, scan_folder
from nextscale.errors import UserError


@runtime_checkable
class Reader(Protocol):
    """A finite list of pictures with random access.

    Attributes:
        labels: int64 [n], or None.
        class_names: Name of each label, or None.
        has_captions: Whether `caption` may be called.
        not_images: Files beside the pictures that are none, to be reported.
    """

    labels: np.ndarray | None
    class_names: list[str] | None
    has_captions: bool
    not_images: list[str]

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        ...

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        ...

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        ...

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        ...


def number_labels(
    values: Sequence[Any], names: Sequence[str], known: list[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Turn a column of labels into integers.

    Args:
        values: Integers (numbers in text count as such) or class names, not a mixture.
        names: What to call each row in an error.
        known: Class names in the order of their numbers, from another part of the dataset; by
            default the names that occur, sorted.

    Returns:
        Labels int64 [n], and the class names if the column held names.

    Raises:
        UserError: If a label is missing, or neither a number nor a name.
    """
    for value, name in zip(values, names, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, str, np.integer)):
            raise UserError(
                f"the label of {name} is {value!r}. Give every picture an integer or a class name."
            )
    try:
        return np.asarray([int(value) for value in values], dtype=np.int64), known
    except ValueError:
        texts = [str(value) for value in values]
    classes = known or sorted(set(texts))
    number = {text: i for i, text in enumerate(classes)}
    for text, name in zip(texts, names, strict=True):
        if text not in number:
            raise UserError(
                f'the class "{text}" of {name} does not occur in the training part. '
                f"Its classes are {shortened(classes)}."
            )
    return np.asarray([number[text] for text in texts], dtype=np.int64), classes


def shortened(names: Sequence[str]) -> str:
    """List at most ten names for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


class FolderReader:
    """Image files, with what class folders or metadata.jsonl say about them."""

    def __init__(
        self,
        paths: list[Path],
        *,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        captions: list[str] | None = None,
        extras: list[dict[str, Any]] | None = None,
        not_images: Sequence[Path] = (),
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.class_names = class_names
        self.has_captions = captions is not None
        self.not_images = [str(path) for path in not_images]
        self._captions = captions
        self._extras = extras

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        return str(self.paths[row])

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        return decode(self.paths[row])

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        assert self._captions is not None, "the reader has no captions"
        return self._captions[row]

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        return self._extras[row] if self._extras else {}


def read_folder(folder: Path, known: list[str] | None = None) -> FolderReader:
    """Read a folder of class folders, or a flat folder of images without labels.

    Every image below a subfolder belongs to the subfolder's class; classes are numbered in sorted
    order, as torchvision's ImageFolder does. One image outside of any subfolder makes it flat.

    Args:
        folder: An existing folder.
        known: Class names in the order of their numbers, from the training part.

    Raises:
        UserError: If there is no image in the folder or in one of its class folders.
    """
    images, others = scan_folder(folder)
    if not images:
        raise no_images(folder, len(others))
    owners = [path.relative_to(folder).parts[0] for path in images]
    if any(path.parent == folder for path in images):
        return FolderReader(images, not_images=others)
    if known is None:
        folders = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        empty = [name for name in folders if name not in set(owners)]
        if empty:
            raise UserError(
                f"there is no image in {len(empty)} of the {len(folders)} class folders of "
                f"{folder}: {shortened(empty)}. Remove them or fill them."
            )
        known = folders
    number = {name: i for i, name in enumerate(known)}
    unknown = sorted(set(owners) - set(number))
    if unknown:
        raise UserError(
            f"{folder} has class folders that the training part has not: {shortened(unknown)}. "
            f"The training part has {shortened(known)}."
        )
    labels = np.asarray([number[owner] for owner in owners], dtype=np.int64)
    return FolderReader(images, labels=labels, class_names=known, not_images=others)


def read_metadata(
    folder: Path,
    *,
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    known: list[str] | None = None,
) -> FolderReader:
    """Read a folder with metadata.jsonl: one JSON object per line, `file_name` and more.

    Args:
        folder: Holds metadata.jsonl; file names are relative to it.
        image_column: Key of the file name; "image" stands for the usual `file_name`.
        label_column: Key of the label; "label" if present.
        caption_column: Key of the caption; "text", then "caption", if present.
        known: Class names in the order of their numbers, from the training part.

    Raises:
        UserError: If a line is no JSON object, lacks a key, or names a file that is not there.
    """
    source = folder / "metadata.jsonl"
    file_column = "file_name" if image_column == "image" else image_column
    rows, places = _read_lines(source)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    label_column = choose_column(str(source), columns, label_column, ("label",), "label_column")
    caption_column = choose_column(
        str(source), columns, caption_column, ("text", "caption"), "caption_column"
    )
    for row, place in zip(rows, places, strict=True):
        for column in (file_column, label_column, caption_column):
            if column is not None and row.get(column) is None:
                raise UserError(f'{place} has no "{column}". Every line needs one.')
        if not (folder / str(row[file_column])).is_file():
            raise UserError(
                f"{place} names the file {row[file_column]}, which is not in {folder}. "
                f"{file_column} is relative to that folder."
            )
    labels = class_names = None
    if label_column is not None:
        labels, class_names = number_labels([row[label_column] for row in rows], places, known)
    used = {file_column, label_column, caption_column}
    return FolderReader(
        [folder / row[file_column] for row in rows],
        labels=labels,
        class_names=class_names,
        captions=[str(row[caption_column]) for row in rows] if caption_column else None,
        extras=[{key: row[key] for key in row if key not in used} for row in rows],
    )


def _read_lines(source: Path) -> tuple[list[dict[str, Any]], list[str]]:
    rows, places = [], []
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"line {number} of {source}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is no JSON ({error}). Write one object per line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is no JSON object. Write one object per line.")
        rows.append(row)
        places.append(place)
    if not rows:
        raise UserError(f'{source} is empty. Write one {{"file_name": ...}} object per line.')
    return rows, places


def choose_column(
    dataset: str, columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str
) -> str | None:
    """Find a column by its given name, or by one of its usual names.

    Args:
        dataset: What to call the dataset in the error.
        columns: Those that it has.
        wanted: The name the person gave; None to look for the usual names.
        usual: Names to look for; not finding any is no error.
        flag: The option that names the column, for the error.

    Raises:
        UserError: If `wanted` is not there.
    """
    if wanted is None:
        return next((name for name in usual if name in columns), None)
    if wanted not in columns:
        raise UserError(
            f'there is no column "{wanted}" in {dataset}; it has {shortened(list(columns))}. '
            f"Name one of these with --{flag}."
        )
    return wanted


class NpzReader:
    """Pictures of one size in arr_0 of an .npz, and labels in arr_1 where there are any."""

    has_captions = False

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"there is no file {path}. Check the path.")
        try:
            # The array stays in the file where it can: reference sets have gigabytes.
            mapped = _map_array(path, "arr_0")
            with np.load(path, allow_pickle=False) as arrays:
                self.pictures: np.ndarray = arrays["arr_0"] if mapped is None else mapped
                labels = arrays.get("arr_1")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is no .npz with pictures in arr_0 ({error}). "
                "Write one with numpy.savez(path, pictures)."
            ) from error
        shape, kind = self.pictures.shape, self.pictures.dtype
        if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or shape[0] == 0:
            raise UserError(
                f"arr_0 of {path} must be uint8 [n, height, width, 3], got {kind} {list(shape)}."
            )
        if labels is not None and labels.shape != shape[:1]:
            raise UserError(
                f"arr_1 of {path} must hold {shape[0]} labels, got shape {list(labels.shape)}."
            )
        self.path = path
        self.not_images: list[str] = []
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        if labels is not None:
            names = [self.name(row) for row in range(len(labels))]
            self.labels, self.class_names = number_labels(labels.tolist(), names)

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        return f"{self.path}[{row}]"

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        return Image.fromarray(np.asarray(self.pictures[row]))

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        raise AssertionError("an .npz has no captions")

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        return {}


def _map_array(path: Path, key: str) -> np.memmap | None:
    """Map an uncompressed member of an .npz; None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)  # ZIP local header: the lengths of its name and extra
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(member.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if header is None:
            return None
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        order = "F" if fortran else "C"
        return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape, order=order)
