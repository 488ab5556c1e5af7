"""What a published protocol asks for beyond its metrics, checked before anything is measured."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.errors import UserError
from nextscale.eval.images import FileImages, Images

LOSSY_NAME = re.compile(r"\.(jpe?g|jpe|webp|gif|avif|jp2)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A benchmark as papers report it.

    Attributes:
        classes: Number of them.
        per_class: Pictures of each.
        side: Of the pictures, in pixels.
        keys: Arrays of the reference file.
        reference_pictures: In arr_0 of the reference file.
        reference: Its usual name.
    """

    classes: int
    per_class: int
    side: int
    keys: tuple[str, ...]
    reference_pictures: int
    reference: str

    def check(self, images: Images, reference: Any, side: int | None = None) -> list[str]:
        """Refuse samples and a reference that make another number than the published ones.

        Args:
            images: The samples.
            reference: Path of the reference file.
            side: Of pictures that are still to be drawn; None: of the first.

        Returns:
            Warnings: what cannot be seen from here.

        Raises:
            UserError: Naming what differs.
        """
        self._check_reference(reference)
        count = self.classes * self.per_class
        if len(images) != count:
            raise UserError(
                f"the protocol takes {count} pictures, {self.per_class} of each of "
                f"{self.classes} classes; these are {len(images)}"
            )
        found = []
        if isinstance(images, FileImages):
            names = (images.name(row) for row in range(count))
            lossy = next((name for name in names if LOSSY_NAME.search(name)), None)
            if lossy is not None:
                raise UserError(
                    f"the protocol takes PNGs (or an .npz): {lossy} is lossy, and another FID"
                )
        if images.labels is None:
            found.append(
                f"whether there are {self.per_class} pictures of each class cannot be seen: "
                "sort them into class folders, or pack labels as arr_1"
            )
        else:
            counts = np.bincount(images.labels, minlength=self.classes)
            if len(counts) > self.classes or (counts != self.per_class).any():
                raise UserError(
                    f"the protocol takes {self.per_class} pictures of each of {self.classes} "
                    f"classes; here a class has {counts.min()} to {counts.max()}"
                )
        sides = (side, side) if side else images.load([0])[0].shape[:2]
        if sides != (self.side, self.side):
            raise UserError(
                f"the protocol takes pictures of {self.side}x{self.side}, these are "
                f"{sides[1]}x{sides[0]}"
            )
        return found

    def _check_reference(self, reference: Any) -> None:
        wanted = f"{self.reference} of the ADM suite (keys {', '.join(self.keys)})"
        if not isinstance(reference, str | Path):
            raise UserError(f"the reference must be {wanted}")
        try:
            with zipfile.ZipFile(reference) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                with archive.open("arr_0.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0
                    header = read if version == (1, 0) else np.lib.format.read_array_header_2_0
                    pictures = header(file)[0][0]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"the reference must be {wanted}, not {reference} ({error})") from error
        missing = [key for key in self.keys if key not in names]
        if missing:
            raise UserError(f"the reference must be {wanted}: {reference} has no {missing[0]}")
        if pictures != self.reference_pictures:
            raise UserError(
                f"the reference must be {wanted}, with {self.reference_pictures} pictures for "
                f"precision and recall: {reference} has {pictures}"
            )


PUBLISHED = {
    "var-imagenet256": Published(
        classes=1000,
        per_class=50,
        side=256,
        keys=("arr_0", "mu", "sigma", "mu_s", "sigma_s"),
        reference_pictures=10_000,
        reference="VIRTUAL_imagenet256_labeled.npz",
    )
}
