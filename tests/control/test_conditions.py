"""Extractors and the checks of what is given as a map."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.control import Control, open_extractor
from nextscale.control.conditions import colour_labels, label_colours, suspect_map
from nextscale.control.maps import as_controls, as_maps, as_mask
from nextscale.data.scenes import ground_truth, render, sample_scene
from nextscale.errors import MissingExtraError, UserError
from nextscale.eval.controllability import mean_iou

SCENES = [sample_scene(1, index) for index in range(12)]
PICTURES = render(SCENES, 64)


def test_canny_is_opencv_s() -> None:
    cv2 = pytest.importorskip("cv2")
    maps = open_extractor("canny", low=50, high=150)(PICTURES)
    assert maps.shape == (12, 3, 64, 64)
    assert maps.dtype == np.float32
    for picture, found in zip(PICTURES, maps, strict=True):
        expected = cv2.Canny(picture, 50, 150) > 0
        assert (found == expected).all()
        assert 0.005 < found.mean() < 0.4


def test_edges_lie_on_the_outlines() -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("kornia")
    edges = np.stack([ground_truth(scene, 64).edges for scene in SCENES])
    near = np.stack([_grown(e) for e in edges])
    plain = [all(s.fill == "solid" for s in scene.shapes) for scene in SCENES]  # bars have edges
    for kind, share in (("canny", 0.8), ("scribble", 0.6)):
        found = open_extractor(kind)(PICTURES)[plain, 0]
        assert (found * near[plain]).sum() / found.sum() > share, kind
    soft = open_extractor("softedge")(PICTURES)[:, 0]
    assert soft[edges].mean() > 3 * soft[~near].mean()


def _grown(edges: np.ndarray) -> np.ndarray:
    padded = np.pad(edges, 2)
    return np.max(
        [padded[i : i + 64, j : j + 64] for i in range(5) for j in range(5)], axis=0
    ).astype(bool)


def test_depth_and_segmentation_of_scenes_are_the_true_ones() -> None:
    truth = [ground_truth(scene, 64) for scene in SCENES]
    depth = open_extractor("depth")(PICTURES)[:, 0]
    assert np.abs(depth - np.stack([t.depth for t in truth])).mean() < 0.01
    coloured = open_extractor("segmentation")(PICTURES)
    assert mean_iou(np.stack([t.segmentation for t in truth]), colour_labels(coloured)) > 0.9


def test_normals_are_unit_vectors_that_face_the_viewer_on_flat_ground() -> None:
    pytest.importorskip("kornia")
    maps = open_extractor("normal")(PICTURES)
    normals = maps * 2 - 1
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-3)
    ground = open_extractor("depth")(PICTURES)[:, 0] == 0
    flat = ground & (np.abs(normals[:, 2]) > 0.99)
    assert flat.sum() > 0.6 * ground.sum()


def test_lowres_and_inpaint() -> None:
    low = open_extractor("lowres", factor=16)(PICTURES)
    assert len(np.unique(low[0, 0])) <= 16
    np.testing.assert_allclose(low.mean(axis=(2, 3)) * 255, PICTURES.mean(axis=(1, 2)), atol=0.05)
    hole = open_extractor("inpaint", box=(0, 0, 0.5, 1))(PICTURES)
    assert (hole[:, :, :32] == 0).all()
    np.testing.assert_allclose(
        hole[:, :, 32:] * 255, PICTURES.transpose(0, 3, 1, 2)[:, :, 32:], atol=1e-3
    )


def test_records_say_how_maps_were_made() -> None:
    pytest.importorskip("cv2")
    record = open_extractor("canny", low=10).record()
    assert record["spec"] == "canny"
    assert record["settings"] == {"low": 10, "high": 200}
    assert record["polarity"] == "white lines on black"
    again = open_extractor(record["spec"], **record["settings"])
    assert again.record() == record


def test_label_colours_are_read_back() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    colours = label_colours(labels[0]).astype(np.float32).transpose(2, 0, 1)[None] / 255
    assert len(np.unique(label_colours(labels[0]).reshape(-1, 3), axis=0)) == 256
    assert (colour_labels(colours) == labels).all()
    noise = np.random.default_rng(0).uniform(-0.008, 0.008, colours.shape).astype(np.float32)
    assert (colour_labels(np.clip(colours + noise, 0, 1)) == labels).mean() > 0.95


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("edges", {}, 'there is no control type "edges"; choose one of canny'),
        ("canny:x", {}, 'canny has one source, got "x"'),
        ("canny", {"medium": 3}, "has no 'medium'"),
        ("inpaint", {"box": (0.5, 0, 0.2, 1)}, r"box is \(top, left, bottom, right\)"),
        ("depth:/nowhere/at all", {}, 'depth: "/nowhere/at all" cannot be loaded'),
    ],
)
def test_bad_extractors_are_refused(spec: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_extractor(spec, **settings)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "controlnet_aux", None)
    with pytest.raises(MissingExtraError, match=r"control-aux"):
        open_extractor("hed")


def test_transformers_models_make_depth_and_segmentation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"height": 32, "width": 32}
    processor = transformers.SegformerImageProcessor(size=size)
    config = transformers.SegformerConfig(
        num_labels=5, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    processor.save_pretrained(tmp_path / "seg")
    model.save_pretrained(tmp_path / "seg")
    found = open_extractor(f"segmentation:{tmp_path / 'seg'}")(PICTURES[:2])
    assert set(np.unique(colour_labels(found))) <= set(range(5))


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("canny", {"low": "50"}, "low must be a number"),
        ("canny", {"low": float("nan")}, "low is nan"),
        ("scribble", {"blur": 0}, "blur is 0"),
        ("lowres", {"factor": 0}, "factor is 0"),
        ("inpaint", {"box": (0.1, 0.2, 0.3)}, "box is"),
    ],
)
def test_settings_out_of_range_are_refused(
    spec: str, settings: dict[str, Any], message: str
) -> None:
    if spec in ("canny", "scribble"):
        pytest.importorskip("cv2")
    with pytest.raises(UserError, match=message):
        open_extractor(spec, **settings)


def test_maps_may_be_float_arrays() -> None:
    maps = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    assert torch.equal(as_maps(maps, "lowres", (8, 8)), torch.from_numpy(maps))
    torch.testing.assert_close(as_mask(maps[0, 0], (8, 8)), torch.from_numpy(maps[0, 0]))


# ---- maps of a call --------------------------------------------------------------------------


def test_suspicious_maps_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("cv2")
    photo = PICTURES[0].transpose(2, 0, 1).astype(np.float32) / 255
    canny = open_extractor("canny")(PICTURES[:1])[0]
    depth = open_extractor("depth")(PICTURES[:1])[0]
    for kind, fine in (("canny", canny), ("depth", depth)):
        assert suspect_map(kind, fine) is None
        assert suspect_map(kind, photo) is not None
    assert "invert" in str(suspect_map("canny", 1 - canny))
    for picture in PICTURES[:8]:
        nearness = open_extractor("depth")(picture[None])[0]
        assert "invert" in str(suspect_map("depth", 1 - nearness))
    grey = np.broadcast_to(photo.mean(axis=0), photo.shape) * 0.8 + 0.1
    assert "extract" in str(suspect_map("hed", grey))
    big = photo.repeat(8, axis=1).repeat(8, axis=2)
    for wrong in (photo, big, grey, depth, canny):
        assert "not those of classes" in str(suspect_map("segmentation", wrong))
    assert "unit vectors" in str(suspect_map("normal", depth))
    with caplog.at_level(logging.WARNING, logger="nextscale"):
        as_maps(torch.from_numpy(1 - canny), "canny", (64, 64))
        as_maps(torch.from_numpy(np.stack([canny, *[1 - canny] * 3])), "canny", (64, 64))
    assert "canny: the control image is probably no map of this type" in caplog.text
    assert "canny: 3 of 4 images are probably no map of this type" in caplog.text
    for kind in ("canny", "depth", "segmentation"):
        assert "one colour" in str(suspect_map(kind, np.zeros((3, 64, 64), np.float32)))
    for picture in PICTURES[:8]:
        assert suspect_map("segmentation", open_extractor("segmentation")(picture[None])[0]) is None


def test_maps_of_all_kinds_of_input_are_alike() -> None:
    array = PICTURES[0]
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    for given in (array, Image.fromarray(array), expected, expected[0]):
        assert torch.equal(as_maps(given, "lowres", (64, 64)), expected)
    assert as_maps(array[..., 0], "depth", (64, 64)).shape == (1, 3, 64, 64)
    assert as_maps([array, array], "lowres", (64, 64)).shape == (2, 3, 64, 64)


def test_maps_of_16_bits_keep_their_values() -> None:
    depth = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    deep = Image.fromarray((depth * 65535).astype(np.uint16))
    for given in (deep, deep.convert("I"), Image.fromarray(depth)):
        assert np.abs(as_maps(given, "depth", (64, 64))[0, 0].numpy() - depth).max() < 1 / 255
    with pytest.raises(UserError, match="outside"):
        as_maps(Image.fromarray(depth * 5), "depth", (64, 64))


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_thin_lines_outlive_a_smaller_map(kind: str) -> None:
    for row in range(8):
        lines = torch.zeros(3, 512, 512)
        lines[:, 200 + row] = 1
        expected = torch.zeros(3, 64, 64)
        expected[:, 25] = 1
        assert torch.equal(as_maps(lines, kind, (64, 64))[0], expected)


def test_maps_are_resized_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    binary = (torch.rand(3, 128, 128) > 0.5).float()
    with caplog.at_level(logging.WARNING, logger="nextscale"):
        maps = as_maps(binary, "canny", (64, 64))
    assert "128 x 128 pixels and is resized to 64 x 64" in caplog.text
    assert set(maps.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 64, 64), r"has the shape \[4, 64, 64\]; maps are"),
        (torch.full((3, 64, 64), 2.0), r"has values in \[2, 2\]; maps are in \[0, 1\]"),
        (torch.zeros(3, 64, 128), "another aspect than the model's"),
        (np.zeros((64, 64, 3)), r"has the shape \[64, 64, 3\]; maps are"),
        ("edges.png", "is a str; pass an image"),
        ([], "the list of maps of the control canny is empty"),
    ],
)
def test_bad_maps_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_maps(given, "canny", (64, 64))


def test_controls_of_a_call() -> None:
    one = as_controls("a", "canny", 0.5)
    assert one == [Control(image="a", type="canny", strength=0.5)]
    assert as_controls(["a"], ["canny"], None) == [Control(image="a", type="canny")]
    two = as_controls(["a", "b"], ["canny", "depth"], [0.5, 1.0])
    assert [(c.type, c.strength) for c in two] == [("canny", 0.5), ("depth", 1.0)]
    for image, kind, scale, message in (
        (["a"], ["canny", "depth"], None, "2 control types and 1 control images"),
        (["a", "b"], ["canny", "depth"], [1.0], "2 control types and 1 control scales"),
        (None, "canny", None, "control_image is missing"),
        ("a", None, None, "control_type is missing"),
    ):
        with pytest.raises(UserError, match=message):
            as_controls(image, kind, scale)
