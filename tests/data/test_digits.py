"""The handwritten digits: real data without a download."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from nextscale.data.sources import open_source
from nextscale.errors import MissingExtraError


def test_splits_are_disjoint_complete_and_fixed():
    parts = {s: open_source("digits", resolution=8, split=s) for s in ("train", "validation")}
    names = {s: part.load(np.arange(len(part))).names for s, part in parts.items()}
    assert (len(parts["train"]), len(parts["validation"])) == (1438, 359)
    assert len(set(names["train"]) | set(names["validation"])) == 1797
    # Trained models depend on the division: it may not move with a version of any library.
    assert names["validation"][:3] == ["digits/750", "digits/547", "digits/1198"]


def test_pixels_and_labels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    source = open_source("digits", resolution=8, split="all")
    batch = source.load(np.array([5, 1796, 5]))
    assert batch.labels.tolist() == labels[[5, 1796, 5]].tolist()
    expected = np.rint(pictures[[5, 1796, 5]] * 255 / 16).reshape(3, 1, 8, 8)
    np.testing.assert_array_equal(batch.images, np.repeat(expected, 3, axis=1))
    assert batch.captions is None
    assert source.num_classes == 10


def test_enlarged_digits_keep_their_contrast():
    batch = open_source("digits", resolution=32, num_images=10).load(np.arange(10))
    assert batch.images.shape == (10, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.images.amax((1, 2, 3)).min() > 200
    assert batch.images.amin((1, 2, 3)).max() == 0


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn.*nextscale\[train\]"):
        open_source("digits", resolution=8)
