"""Which reader a dataset on disk or on the hub calls for, by its name and its content."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextscale.data.readers import FolderReader, NpzReader, Reader, read_folder, read_metadata
from nextscale.data.tables import VALIDATION_NAMES, open_table
from nextscale.data.tars import TarReader, expand_tars
from nextscale.data.zips import ZipReader
from nextscale.errors import UserError

Split = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that the person gave; None where the usual names are looked for."""

    image: str = "image"
    label: str | None = None
    caption: str | None = None


def find_reader(dataset: str, split: Split, columns: Columns) -> tuple[Reader, bool]:
    """Open a dataset on disk or on the hub by what its name looks like.

    Args:
        dataset: A path, a pattern, or a hub id.
        split: Part to read.
        columns: Names of columns.

    Returns:
        The reader, and whether the dataset itself has the splits: if not, the caller divides it.

    Raises:
        UserError: If there is no such dataset.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path, split, columns)
    if path.suffix == ".npz":
        _refuse_columns(dataset, columns)
        return NpzReader(path), False
    if path.suffix == ".zip":
        _refuse_columns(dataset, columns)
        return ZipReader(path), False
    if path.suffix == ".tar":
        return _open_tars({"train": expand_tars(dataset)}, split, columns)
    if path.suffix == ".parquet":
        return _open_table(str(path), split, columns)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", dataset):
        return _open_table(dataset, split, columns)
    raise UserError(
        f'there is no dataset "{dataset}". Use scenes, digits, a folder of images, a .parquet, '
        ".tar, .zip or .npz file, or a hub id such as OWNER/NAME."
    )


def _open_folder(folder: Path, split: Split, columns: Columns) -> tuple[Reader, bool]:
    if (folder / "metadata.jsonl").is_file():
        return _read_metadata(folder, columns), False
    if (folder / "train").is_dir():
        train, own = _open_folder(folder / "train", "all", columns)
        part = next((folder / n for n in VALIDATION_NAMES if (folder / n).is_dir()), None)
        if split != "validation" or part is None:
            return train, own or part is not None
        if (part / "metadata.jsonl").is_file():
            return _read_metadata(part, columns, train.class_names), True
        if isinstance(train, FolderReader):
            return read_folder(part, train.class_names), True
        return _open_folder(part, "all", columns)[0], True
    tars = {part: paths for part, paths in _by_part(folder.glob("*.tar")).items() if paths}
    if tars:
        return _open_tars(tars, split, columns)
    if any(folder.rglob("*.parquet")):
        return _open_table(str(folder), split, columns)
    _refuse_columns(str(folder), columns)
    return read_folder(folder), False


def _by_part(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Sort files named val-000.tar and the like from the others."""
    parts: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in sorted(paths):
        held_out = re.match(rf"({'|'.join(VALIDATION_NAMES)})(?![a-z])", path.name)
        parts["validation" if held_out else "train"].append(path)
    return parts


def _open_tars(parts: dict[str, list[Path]], split: Split, columns: Columns) -> tuple[Reader, bool]:
    own = len(parts) > 1

    def read(paths: list[Path], known: list[str] | None = None) -> TarReader:
        names = {"label_column": columns.label, "caption_column": columns.caption}
        return TarReader(paths, known=known, **names)

    train = read(next(iter(parts.values())))
    if own and split == "validation":
        return read(parts["validation"], train.class_names), True
    return train, own


def _open_table(dataset: str, split: Split, columns: Columns) -> tuple[Reader, bool]:
    return open_table(
        dataset,
        split=split,
        image_column=columns.image,
        label_column=columns.label,
        caption_column=columns.caption,
    )


def _read_metadata(folder: Path, columns: Columns, known: list[str] | None = None) -> Reader:
    return read_metadata(
        folder,
        image_column=columns.image,
        label_column=columns.label,
        caption_column=columns.caption,
        known=known,
    )


def _refuse_columns(dataset: str, columns: Columns) -> None:
    for flag, value in (("label_column", columns.label), ("caption_column", columns.caption)):
        if value is not None:
            raise UserError(
                f'{dataset} has no columns, so --{flag} "{value}" means nothing. Leave it out, or '
                "describe the files in a metadata.jsonl beside them."
            )
