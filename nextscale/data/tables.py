"""Tables of pictures: parquet files and datasets of the Hugging Face hub, through `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.data.images import BadImage, decode
from nextscale.data.readers import choose_column, number_labels
from nextscale.errors import UserError, missing_extra

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL import Image

VALIDATION_NAMES = ("validation", "val", "valid", "test")


class TableReader:
    """One split of a table, with a column of pictures."""

    def __init__(
        self,
        table: Dataset,
        place: str,
        *,
        image_column: str,
        label_column: str | None,
        caption_column: str | None,
        known: list[str] | None = None,
    ) -> None:
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        columns = table.column_names
        choose_column(place, columns, image_column, (), "image_column")
        if len(table) == 0:
            raise UserError(f"{place} has no rows.")
        label = choose_column(place, columns, label_column, ("label",), "label_column")
        self._caption = choose_column(
            place, columns, caption_column, ("text", "caption"), "caption_column"
        )
        self._image = image_column
        if isinstance(table.features[image_column], ImageFeature):
            # The pictures are decoded here, so that every kind of dataset treats them alike.
            table = table.cast_column(image_column, ImageFeature(decode=False))
        self.table = table
        self.place = place
        self.has_captions = self._caption is not None
        self.not_images: list[str] = []
        self.labels: np.ndarray | None = None
        self.class_names: list[str] | None = None
        if label is not None:
            names = [self.name(row) for row in range(len(table))]
            values = table.select_columns([label])[:][label]
            self.labels, self.class_names = number_labels(values, names, known)
            if isinstance(table.features[label], ClassLabel):
                self.class_names = list(table.features[label].names)
        self._others = [c for c in columns if c not in (image_column, label, self._caption)]
        self._side = table.select_columns(self._others) if self._others else None
        self._captions = table.select_columns([self._caption]) if self._caption else None
        self._pictures = table.select_columns([image_column])

    def __len__(self) -> int:
        return len(self.table)

    def name(self, row: int) -> str:
        """What to call picture `row` in a message."""
        return f"row {row} of {self.place}"

    def image(self, row: int) -> Image.Image:
        """Decode picture `row` to RGB, or raise BadImage."""
        value = self._pictures[row][self._image]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, bytes | str):
            raise BadImage(
                self.name(row), f'the column "{self._image}" holds {type(value).__name__}'
            )
        return decode(value, self.name(row))

    def caption(self, row: int) -> str:
        """The text of picture `row`."""
        assert self._captions is not None, "the reader has no captions"
        value = self._captions[row][self._caption]
        if isinstance(value, list):  # several captions of one picture, as in COCO
            value = value[0] if value else ""
        return "" if value is None else str(value)

    def extra(self, row: int) -> dict[str, Any]:
        """Further columns of picture `row`."""
        return {} if self._side is None else self._side[row]


def open_table(
    dataset: str,
    *,
    split: str,
    image_column: str,
    label_column: str | None,
    caption_column: str | None,
) -> tuple[TableReader, bool]:
    """Open a parquet file, a folder of them, or a hub dataset.

    Args:
        dataset: A path or pattern ending in .parquet, a folder, or OWNER/NAME[:CONFIG].
        split: "train", "validation" or "all".
        image_column: Column of pictures.
        label_column: Column of labels; "label" if present.
        caption_column: Column of captions; "text", then "caption", if present.

    Returns:
        The reader, and whether the table itself has the splits: if not, the caller divides it.

    Raises:
        UserError: If there is no such dataset or column.
        MissingExtraError: If `datasets` is not installed.
    """
    parts = {str(name): table for name, table in _load(dataset).items()}
    train = "train" if "train" in parts else next(iter(parts))
    validation = next((n for n in VALIDATION_NAMES if n in parts and n != train), None)

    def read(part: str, known: list[str] | None) -> TableReader:
        return TableReader(
            parts[part],
            f'the split "{part}" of {dataset}',
            image_column=image_column,
            label_column=label_column,
            caption_column=caption_column,
            known=known,
        )

    reader = read(train, None)
    if split == "validation" and validation is not None:
        reader = read(validation, reader.class_names)
    return reader, validation is not None


def _load(dataset: str) -> DatasetDict:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise missing_extra(f'the dataset "{dataset}" needs datasets', "train") from error
    try:
        if Path(dataset).is_dir():
            return datasets.load_dataset("parquet", data_dir=dataset)
        if dataset.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=dataset)
        name, _, config = dataset.partition(":")
        return datasets.load_dataset(name, config or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        if dataset.endswith(".parquet") or Path(dataset).exists():
            advice = "Check the path, and that the files are parquet."
        else:
            advice = (
                "There is no such folder either. Check the name; without a network, or with "
                "HF_HUB_OFFLINE=1, only datasets that were downloaded before can be used; a "
                "dataset of several configurations is called OWNER/NAME:CONFIG."
            )
        raise UserError(f'cannot open the dataset "{dataset}": {reason}. {advice}') from error
