"""A .zip of pictures, read in place: a folder of pictures that is one file."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from nextscale.data.images import EXTENSIONS, BadImage, decode, no_images
from nextscale.data.readers import number_labels
from nextscale.errors import UserError


class ZipReader:
    """Image files of a .zip; their first folder is the class, if every one lies in a folder."""

    has_captions = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            names = sorted(info.filename for info in self._archive().infolist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no .zip that can be read ({error})") from error
        files = [PurePosixPath(name) for name in names if not name.endswith("/")]
        seen = [f for f in files if not any(p.startswith((".", "__MACOSX")) for p in f.parts)]
        self._members = [str(f) for f in seen if f.suffix.lower() in EXTENSIONS]
        self.not_images = [f"{path}/{f}" for f in seen if f.suffix.lower() not in EXTENSIONS]
        if not self._members:
            raise no_images(path, len(self.not_images))
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        owners = [PurePosixPath(member).parts[0] for member in self._members]
        if len(set(owners)) > 1 and all("/" in member for member in self._members):
            self.labels, self.class_names = number_labels(owners, self._members)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        return f"{self.path}/{self._members[row]}"

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        try:
            content = self._archive().read(self._members[row])
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise BadImage(self.name(row), str(error)) from error
        return decode(content, self.name(row))

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        raise AssertionError("a .zip has no captions")

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        return {}

    def _archive(self) -> zipfile.ZipFile:
        """Opened once in each process: a forked one must not share the file's position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.path))
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}
