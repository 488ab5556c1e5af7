"""Pairs of pictures on disk, one preferred to the other: what offline DPO learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale import storage
from nextscale.align.prompts import check_label
from nextscale.data.images import decode, fit_to
from nextscale.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A condition and two pictures of it."""

    condition: str | int
    chosen: Path
    rejected: Path


def read_pairs(path: str | Path, *, num_classes: int | None = None) -> list[Pair]:
    """Read a .jsonl of {"prompt" or "class_label", "chosen", "rejected"}.

    Args:
        path: The file; paths of pictures are relative to it.
        num_classes: Classes of the model; None: it takes prompts.

    Raises:
        UserError: For a line that is none, with its number, and for pictures that are missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pairs {path} does not exist; give a .jsonl file")
    key = "prompt" if num_classes is None else "class_label"
    pairs, missing = [], []
    for number, line in enumerate(storage.read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            condition = entry[key]
            kind = str if num_classes is None else int
            if not isinstance(condition, kind) or isinstance(condition, bool):
                raise TypeError(f"{key} is {condition!r}")
            pair = Pair(condition, path.parent / entry["chosen"], path.parent / entry["rejected"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: needs "{key}", "chosen" and "rejected" ({error!r})'
            ) from error
        check_label(pair.condition, num_classes, f"{path}, line {number}")
        missing += [picture for picture in (pair.chosen, pair.rejected) if not picture.is_file()]
        pairs.append(pair)
    if missing:
        shown = ", ".join(str(p) for p in missing[:3])
        raise UserError(
            f"{path}: {len(missing)} pictures are missing, first {shown}. Paths are relative to "
            "the file"
        )
    if not pairs:
        raise UserError(f"pairs {path} holds no pair")
    return pairs


def load_pairs(
    pairs: Sequence[Pair], rows: np.ndarray, resolution: tuple[int, int]
) -> dict[str, Any]:
    """The pictures of some pairs in [0, 1], scaled and cropped to the model's resolution."""
    chosen = [pairs[int(row)] for row in rows]
    sides = ([p.chosen for p in chosen], [p.rejected for p in chosen])
    images = torch.stack([_picture(path, resolution) for side in sides for path in side])
    return {
        "images": images,
        "conditions": [pair.condition for pair in chosen],
        "rows": torch.from_numpy(np.asarray(rows)),
    }


def _picture(path: Path, resolution: tuple[int, int]) -> Float[Tensor, "3 H W"]:
    if resolution[0] != resolution[1]:
        raise UserError(f"pairs need a model of square pictures, this one draws {resolution}")
    pixels = fit_to(decode(path), resolution[0], "center", overscale=1.0)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
