"""Where training images come from: one protocol, and `open_source` that finds the right kind.

A source is a finite list of pictures with random access. The endless, shuffled order in which a
trainer reads it comes from `streams.batch_indices`, so that a batch is a function of
(seed, step) alone; sources themselves keep no position and no random state.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from nextscale.data.formats import Columns, Split, find_reader
from nextscale.data.images import BadImage, Crop, fit_to
from nextscale.data.readers import Reader
from nextscale.data.scenes import CLASS_NAMES, Scene, render, sample_scene
from nextscale.errors import UserError, missing_extra
from nextscale.streams import batch_indices, stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

SCENES_LENGTH = 1_000_000
SCENES_SEEDS = {"train": 0, "validation": 1, "all": 0}
HELD_OUT_SHARE = 0.05  # of a dataset that brings no validation part of its own
MAX_HELD_OUT = 2000
ALL_PAIRS_EVERY = 5  # so that the held-out pairs are about as frequent as the others


@dataclass(frozen=True)
class Batch:
    """Pictures with what is known about them; every list has one entry per picture.

    Attributes:
        images: uint8 [b, 3, R, R].
        labels: int64 [b], or None if the source has no classes.
        captions: One text each, or None if the source has no captions.
        names: What to call each picture in a message: a path, a key, "scenes/0/17".
        extra: Further columns of the dataset, by name, as they were read.
        stand_in: bool [b], True where another picture stands in for one that cannot be read, so
            that a training batch keeps its size; None: nowhere.
    """

    images: Tensor
    labels: Tensor | None
    captions: list[str] | None
    names: list[str]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    stand_in: np.ndarray | None = None


@runtime_checkable
class ImageSource(Protocol):
    """What every trainer and command reads pictures from.

    Attributes:
        num_classes: Labels lie in [0, num_classes); None without labels.
        class_names: One name per class, or None if they have no names.
        has_captions: Whether batches carry captions.
        skipped: Files that were no image, in the order in which they were met.
    """

    num_classes: int | None
    class_names: list[str] | None
    has_captions: bool
    skipped: list[str]

    def __len__(self) -> int: ...

    def load(self, indices: np.ndarray, *, step: int = 0) -> Batch:
        """Read the pictures at `indices`; `step` keys the random crops and nothing else."""
        ...

    def captions(self, indices: np.ndarray) -> list[str]:
        """The captions at `indices` without the pictures; empty if there are none."""
        ...


def open_source(
    dataset: str,
    *,
    resolution: int,
    split: Split = "train",
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    num_images: int | None = None,
    strict: bool = False,
    crop: Crop | None = None,
    overscale: float = 1.125,
) -> ImageSource:
    """Open a dataset by its name or place.

    | `dataset` | kind |
    |---|---|
    | scenes | the procedural world, labels and captions |
    | scenes-all | the same with the (colour, shape) pairs that scenes holds out, for evaluators |
    | digits | handwritten digits of scikit-learn, labels |
    | folder of class folders | labels, one class per subfolder in sorted order |
    | folder with metadata.jsonl | `file_name`, and `text`, `label` where present |
    | any other folder of images | no labels |
    | .parquet file, folder of them, hub id OWNER/NAME[:CONFIG] | columns, see below |
    | .tar file, pattern such as "train-{000..009}.tar", folder of them | WebDataset |
    | .zip of images | as a folder; the first folder in it is the class |
    | .npz | arr_0 uint8 [n, h, w, 3], labels in arr_1 where present |

    A folder with subfolders (or a table with splits) called train and validation, val or test is
    read by split. Any other dataset is divided: one picture in 20 (2000 at most) is validation.

    Args:
        dataset: See the table.
        resolution: Side of the pictures in pixels.
        split: Part to read; "all" leaves nothing out of a dataset that has no parts of its own, and
            is the training part of one that has.
        image_column: Column of a table that holds the pictures.
        label_column: Column of labels; "label" if the dataset has one.
        caption_column: Column of captions; "text", then "caption", if the dataset has one.
        num_classes: Refuse labels outside [0, num_classes); None takes what the data has.
        seed: Keys the random crops. It does not change which picture an index names.
        num_images: Use only the first so many pictures of the split; the length of scenes
            (default 1,000,000).
        strict: Fail on a file that is no image instead of skipping it.
        crop: "random", "center" or "none" (squeeze); by default random for the training split.
            The built-in worlds are drawn at the resolution and never cropped.
        overscale: The shorter side is resized to round(overscale * resolution) before the crop.

    Returns:
        The source; `len()` of it is the number of pictures of the split.

    Raises:
        UserError: If there is no such dataset, it is empty, or a column or label is wrong.
        MissingExtraError: If reading this kind needs a library that is not installed.
    """
    if resolution < 1:
        raise UserError(f"resolution must be 1 pixel or more, got {resolution}.")
    if split not in SCENES_SEEDS:
        raise UserError(f'split must be one of {", ".join(SCENES_SEEDS)}, got "{split}".')
    if num_images is not None and num_images < 1:
        raise UserError(f"num_images must be 1 or more, got {num_images}.")
    if dataset in ("scenes", "scenes-all", "digits"):
        source: ImageSource
        if dataset != "digits":
            source = ScenesSource(
                resolution,
                SCENES_SEEDS[split],
                num_images or SCENES_LENGTH,
                all_pairs=dataset == "scenes-all",
            )
        else:
            source = DigitsSource(resolution, split, num_images)
        _check_class_count(dataset, source.num_classes, num_classes)
        return source
    columns = Columns(image_column, label_column, caption_column)
    reader, own_split = find_reader(dataset, split, columns)
    rows = _rows(len(reader), "all" if own_split else split)[:num_images]
    return ReaderSource(
        reader,
        rows,
        dataset=dataset,
        resolution=resolution,
        crop=crop or ("random" if split == "train" else "center"),
        overscale=overscale,
        seed=seed,
        strict=strict,
        num_classes=num_classes,
    )


def _check_class_count(dataset: str, present: int | None, wanted: int | None) -> None:
    if wanted is not None and present is not None and wanted < present:
        raise UserError(
            f'the dataset "{dataset}" has labels 0..{present - 1}, but num_classes is {wanted}. '
            f"Set num_classes to {present} or more."
        )


def _rows(count: int, split: Split) -> np.ndarray:
    """Which pictures belong to a split of a dataset that has no splits of its own.

    The division is fixed for good: it depends on nothing but the number of pictures.
    """
    if split == "all" or count == 1:  # a single picture has to serve for both
        return np.arange(count)
    held_out = min(max(round(HELD_OUT_SHARE * count), 1), MAX_HELD_OUT)
    order = batch_indices(0, 0, count, count)
    return np.sort(order[:held_out] if split == "validation" else order[held_out:])


class ScenesSource:
    """The endless scenes world, cut to a length; each batch has the scenes as `extra["scene"]`."""

    num_classes: int | None = len(CLASS_NAMES)
    has_captions = True

    def __init__(
        self,
        resolution: int,
        scene_seed: int,
        length: int = SCENES_LENGTH,
        *,
        all_pairs: bool = False,
    ) -> None:
        self.resolution = resolution
        self.all_pairs = all_pairs
        self.scene_seed = scene_seed
        self.class_names: list[str] | None = list(CLASS_NAMES)
        self.skipped: list[str] = []
        self._length = length

    def __len__(self) -> int:
        return self._length

    def load(self, indices: np.ndarray, *, step: int = 0) -> Batch:
        """Draw scenes `indices`; `step` plays no part."""
        indices = _checked(indices, len(self))
        scenes = [self._scene(i) for i in indices]
        return Batch(
            _to_tensor(render(scenes, self.resolution)),
            _label_tensor([scene.class_label for scene in scenes]),
            [str(scene.caption) for scene in scenes],
            [f"scenes/{self.scene_seed}/{i}" for i in indices],
            {"scene": scenes},
        )

    def captions(self, indices: np.ndarray) -> list[str]:
        """The captions of scenes `indices`, without drawing them."""
        return [str(self._scene(i).caption) for i in _checked(indices, len(self))]

    def _scene(self, index: int) -> Scene:
        held_out = self.all_pairs and index % ALL_PAIRS_EVERY == 0
        return sample_scene(self.scene_seed, index, held_out=held_out)


class DigitsSource:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, enlarged; 80 % train, 20 % validate."""

    num_classes: int | None = 10
    has_captions = False

    def __init__(self, resolution: int, split: Split, num_images: int | None = None) -> None:
        from PIL import Image

        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise missing_extra('the dataset "digits" needs scikit-learn', "train") from error
        small, labels = load_digits(return_X_y=True)
        grey = np.rint(small.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        total = len(grey)
        order = batch_indices(0, 0, total, total)
        border = round(0.8 * total)
        parts = {"train": order[:border], "validation": order[border:], "all": np.arange(total)}
        self._rows = parts[split][:num_images]
        side = (resolution, resolution)
        # Kept grey: a third of the memory, 7 MB at 64 pixels.
        self._images = np.stack(
            [
                np.asarray(Image.fromarray(grey[i]).resize(side, Image.Resampling.BICUBIC))
                for i in self._rows
            ]
        )
        self._labels = labels[self._rows]
        self.class_names: list[str] | None = [str(digit) for digit in range(10)]
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, indices: np.ndarray, *, step: int = 0) -> Batch:
        """Take digits `indices` of the split; `step` plays no part."""
        indices = _checked(indices, len(self))
        return Batch(
            _to_tensor(np.repeat(self._images[indices][..., None], 3, axis=3)),
            _label_tensor(self._labels[indices]),
            None,
            [f"digits/{self._rows[i]}" for i in indices],
        )

    def captions(self, indices: np.ndarray) -> list[str]:
        """None: digits have no captions."""
        return []


class ReaderSource:
    """Any dataset on disk: a reader says what picture i is, this class decodes and crops it."""

    def __init__(
        self,
        reader: Reader,
        rows: np.ndarray,
        *,
        dataset: str,
        resolution: int,
        crop: Crop,
        overscale: float,
        seed: int,
        strict: bool,
        num_classes: int | None,
    ) -> None:
        self.reader = reader
        self.rows = rows
        self.dataset = dataset
        self.resolution = resolution
        self.crop: Crop = crop
        self.overscale = overscale
        self.seed = seed
        self.strict = strict
        self.class_names = reader.class_names
        self.num_classes = _class_count(reader, dataset, num_classes)
        self.has_captions = reader.has_captions
        self.skipped: list[str] = []
        self._bad: set[int] = set()
        for name in reader.not_images:
            self._skip(name, "it has no image extension")

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, indices: np.ndarray, *, step: int = 0) -> Batch:
        """Read, decode and crop; a broken picture is replaced by the next good one.

        Raises:
            BadImage: If a file is no image and the source is strict.
            UserError: If no picture of the source can be read.
        """
        taken: list[int] = []
        pictures: list[np.ndarray] = []
        wanted = _checked(indices, len(self))
        for index in wanted:
            row, picture = self._next_good(int(index), step)
            taken.append(row)
            pictures.append(picture)
        labels, reader = self.reader.labels, self.reader
        columns = [reader.extra(row) for row in taken]
        return Batch(
            _to_tensor(np.stack(pictures)),
            None if labels is None else _label_tensor(labels[taken]),
            [reader.caption(row) for row in taken] if self.has_captions else None,
            [reader.name(row) for row in taken],
            {key: [c.get(key) for c in columns] for key in sorted({k for c in columns for k in c})},
            np.asarray(taken) != self.rows[wanted],
        )

    def captions(self, indices: np.ndarray) -> list[str]:
        """The captions of pictures `indices`, without decoding the pictures."""
        if not self.has_captions:
            return []
        return [self.reader.caption(int(self.rows[i])) for i in _checked(indices, len(self))]

    def _next_good(self, index: int, step: int) -> tuple[int, np.ndarray]:
        for offset in range(len(self)):
            row = int(self.rows[(index + offset) % len(self)])
            if row in self._bad:
                continue
            try:
                # The crop belongs to the place in the batch order, not to the file that fills it.
                return row, self._picture(row, stream(self.seed, step, index))
            except BadImage as error:
                self._bad.add(row)
                self._skip(self.reader.name(row), error.reason)
        raise UserError(
            f'none of the {len(self)} files of "{self.dataset}" can be read as an image; the last '
            f"one was {self.skipped[-1]}. Check the path and the format of the files."
        )

    def _picture(self, row: int, generator: torch.Generator) -> np.ndarray:
        return fit_to(
            self.reader.image(row),
            self.resolution,
            self.crop,
            overscale=self.overscale,
            generator=generator,
        )

    def _skip(self, name: str, reason: str) -> None:
        if self.strict:
            raise BadImage(name, reason)
        self.skipped.append(name)
        log.warning("skipped %s: %s (%d skipped so far)", name, reason, len(self.skipped))


def _class_count(reader: Reader, dataset: str, wanted: int | None) -> int | None:
    labels = reader.labels
    if labels is None:
        if wanted is not None:
            raise UserError(
                f'num_classes is {wanted}, but the dataset "{dataset}" has no labels. Use one '
                "subfolder per class, name the column with --label_column, or train on captions."
            )
        return None
    present = len(reader.class_names) if reader.class_names else int(labels.max()) + 1
    limit = present if wanted is None else wanted
    outside = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(outside):
        first = int(outside[0])
        raise UserError(
            f"label {labels[first]} of {reader.name(first)} is out of range: with num_classes "
            f"{limit} labels lie in 0..{limit - 1} ({len(outside)} of {len(labels)} labels do "
            "not). Correct the labels or num_classes."
        )
    return limit


def _checked(indices: np.ndarray, length: int) -> np.ndarray:
    indices = np.asarray(indices, dtype=np.int64)
    if indices.ndim != 1 or (len(indices) and not 0 <= indices.min() <= indices.max() < length):
        raise IndexError(f"indices must be a flat array of numbers in [0, {length}): {indices}")
    return indices


def _to_tensor(pictures: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def _label_tensor(labels: Any) -> Tensor:
    import torch

    return torch.from_numpy(np.asarray(labels, dtype=np.int64))
