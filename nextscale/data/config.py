"""The data flags that every trainer and command shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nextscale.data.images import Crop
    from nextscale.data.sources import ImageSource, Split


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images; the trainers' configurations inherit from it."""

    dataset: str = "scenes"
    """scenes, digits, a folder of images or class folders, a folder with metadata.jsonl, a
    Hugging Face dataset id, parquet files, WebDataset tars, or an .npz."""
    resolution: int = 64
    """Side of the images in pixels."""
    image_column: str = "image"
    """Column of the images in a table."""
    label_column: str | None = None
    """Column of class labels in a table or metadata.jsonl; None: "label" if there is one."""
    caption_column: str | None = None
    """Column of captions; None: "text" or "caption" if there is one."""
    num_classes: int | None = None
    """Labels must lie in [0, num_classes); None: as many as the dataset has."""
    num_images: int | None = None
    """Use only the first so many images of each split."""
    strict: bool = False
    """Fail on a file that is no image instead of naming, counting and skipping it."""


def open_dataset(
    config: DataConfig, split: Split, *, seed: int = 0, crop: Crop | None = None
) -> ImageSource:
    """The source that a configuration names; see `open_source` for `crop` and the errors."""
    from nextscale.data.sources import open_source

    return open_source(
        config.dataset,
        resolution=config.resolution,
        split=split,
        image_column=config.image_column,
        label_column=config.label_column,
        caption_column=config.caption_column,
        num_classes=config.num_classes,
        seed=seed,
        num_images=config.num_images,
        strict=config.strict,
        crop=crop,
    )
