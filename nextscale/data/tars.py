"""WebDataset tars with random access.

`webdataset` streams: which sample comes next depends on how far each worker has read. Training
here needs batch s to be a function of (seed, s), so the tars are indexed once (a pass over their
headers) and every sample is read by its offset.
"""

from __future__ import annotations

import glob
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.data.images import EXTENSIONS, decode
from nextscale.data.readers import number_labels
from nextscale.errors import UserError, missing_extra

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class _Member:
    """Where the bytes of a file lie."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        # Opened anew each time: no handle to share between threads or forked workers.
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarReader:
    """Samples of WebDataset tars: an image, and `cls` and `txt` beside it."""

    def __init__(
        self,
        tars: list[Path],
        *,
        label_column: str | None = None,
        caption_column: str | None = None,
        known: list[str] | None = None,
    ) -> None:
        self.not_images: list[str] = []
        self._names: list[str] = []
        self._images: list[_Member] = []
        labels, captions = [], []
        label_key, caption_key = label_column or "cls", caption_column or "txt"
        for tar in tars:
            for key, files in _samples(tar).items():
                kind = next((k for k in files if f".{k}" in EXTENSIONS), None)
                if kind is None:
                    self.not_images.append(f"{key} of {tar}")
                    continue
                self._names.append(f"{key}.{kind} of {tar}")
                self._images.append(files[kind])
                labels.append(files.get(label_key))
                captions.append(files.get(caption_key))
        if not self._images:
            raise UserError(
                f"there is no image in {len(tars)} tar files, the first of which is {tars[0]}. A "
                "sample is a group of files such as 0001.jpg, 0001.cls, 0001.txt."
            )
        found_labels = self._complete(labels, label_key, required=label_column is not None)
        self._captions = self._complete(captions, caption_key, required=caption_column is not None)
        self.has_captions = self._captions is not None
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        if found_labels is not None:
            values = [member.read().decode("utf-8", "replace").strip() for member in found_labels]
            self.labels, self.class_names = number_labels(values, self._names, known)

    def _complete(
        self, members: list[_Member | None], key: str, *, required: bool
    ) -> list[_Member] | None:
        """All of them, or None if no sample has one; a few missing is an error."""
        found = [member for member in members if member is not None]
        if not found and not required:
            return None
        if len(found) < len(members):
            raise UserError(
                f'{self._names[members.index(None)]} has no file ".{key}" ({len(found)} of '
                f"{len(members)} samples have one). Every sample needs one."
            )
        return found

    def __len__(self) -> int:
        return len(self._images)

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        return self._names[row]

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        return decode(self._images[row].read(), self._names[row])

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        assert self._captions is not None, "the reader has no captions"
        return self._captions[row].read().decode("utf-8", "replace").strip()

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        return {}


def _samples(tar: Path) -> dict[str, dict[str, _Member]]:
    """Group the files of a tar by key, each under its extension in lower case."""
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise missing_extra("reading WebDataset tars needs webdataset", "train") from error
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                hidden = Path(member.name).name.startswith(".")
                key, extension = base_plus_ext(member.name)
                if member.isfile() and key and extension and not hidden:
                    place = _Member(tar, member.offset_data, member.size)
                    samples.setdefault(key, {})[extension.lower()] = place
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{tar} is no readable, uncompressed tar ({error}). Check the path, and unpack it if "
            "it is compressed: samples are read by their offset."
        ) from error
    return samples


def expand_tars(pattern: str) -> list[Path]:
    """Find the tars of a pattern with braces ("train-{000..009}.tar") or wildcards.

    Args:
        pattern: As WebDataset writes them; "::" joins several.

    Returns:
        Existing files, in the order of the pattern, each wildcard sorted.

    Raises:
        UserError: If a tar is missing or not on this machine.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise missing_extra("reading WebDataset tars needs webdataset", "train") from error
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(
            f'the tars "{pattern}" are not on this machine. Download them first: training reads '
            "samples in random order."
        )
    tars: list[Path] = []
    for name in expand_urls(pattern):
        path = str(Path(name).expanduser())
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not found or not Path(found[0]).is_file():
            raise UserError(f'there is no file {path} (from "{pattern}"). Check the pattern.')
        tars.extend(map(Path, found))
    return tars
