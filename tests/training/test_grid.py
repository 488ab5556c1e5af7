"""The sample sheet: tiles where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.errors import UserError
from nextscale.training import save_grid


def test_tiles_lie_row_by_row(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 20, 30)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (2 * 24 + 4, 3 * 34 + 4, 3)
    fifth = sheet[4 + 24 : 4 + 24 + 20, 4 + 34 : 4 + 34 + 30]
    np.testing.assert_allclose(fifth / 255, images[4].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)


def test_captions_add_room_below(tmp_path: Path) -> None:
    captions = ["a red circle", "a blue square left of a red circle"]
    save_grid(torch.zeros(2, 3, 64, 64), tmp_path / "grid.png", captions=captions)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[0] > 64 + 8 + 12
    assert (sheet[4 + 64 :, :68] < 128).any()
    with pytest.raises(UserError, match="captions has 2 texts for 3 images"):
        save_grid(torch.zeros(3, 3, 64, 64), tmp_path / "grid.png", captions=captions)
