"""Listing, decoding, cropping and writing pictures."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.data.images import (
    BadImage,
    decode,
    fit_to,
    list_images,
    save_png,
    scan_folder,
    to_float,
    to_uint8,
)
from nextscale.errors import UserError
from nextscale.streams import stream


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_listing_is_sorted_recursive_and_passes_over_hidden_files(tmp_path):
    for name in ("b/2.PNG", "a/1.jpeg", "c.webp", ".hidden/3.png", "a/._1.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / n for n in ("a/1.jpeg", "b/2.PNG", "c.webp")]
    assert scan_folder(tmp_path)[1] == [tmp_path / "notes.txt"]


def test_listing_follows_linked_class_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "set") == [tmp_path / "set" / "cat" / "1.png"]


def test_folder_without_images_and_missing_folder_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"no image in .*1 other files"):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        list_images(tmp_path / "nowhere")


def test_exif_orientation_is_applied():
    image = noise(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    turned = decode(encoded(image, exif=exif))
    assert turned.size == (10, 20)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new(mode, (4, 4), 0)
    assert np.asarray(decode(encoded(image))).min() == 255
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert decode(encoded(half)).getpixel((0, 0)) == (255, 127, 127)


def test_transparent_palette_and_gif():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert decode(encoded(image, kind, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
        assert decode(encoded(image, kind, transparency=0)).getpixel((1, 0)) == (200, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, kind)))[0, :, 0], [0, 100, 255])


def test_float_tiff_in_unit_range_is_scaled_and_others_are_refused():
    unit = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(decode(encoded(unit, "TIFF")))[0, :, 0], [0, 128, 255])
    with pytest.raises(BadImage, match="outside"):
        decode(encoded(Image.fromarray(np.array([[0, 7]], dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_bad_images(tmp_path, kind):
    content = encoded(noise(64, 64), kind)
    path = tmp_path / "half.img"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match=r"half\.img is no readable image"):
        decode(path)


def test_text_and_missing_files_are_bad_images(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    for name in ("a.png", "b.png"):
        with pytest.raises(BadImage) as caught:
            decode(tmp_path / name)
        assert name in caught.value.name
        copy = pickle.loads(pickle.dumps(caught.value))  # as a data worker would send it
        assert (str(copy), copy.reason) == (str(caught.value), caught.value.reason)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (40, 40), (31, 47)])
def test_center_crop_is_that_of_the_official_code(size):
    from torchvision.transforms import v2

    image = noise(*size)
    steps = [v2.Resize(36, interpolation=v2.InterpolationMode.LANCZOS), v2.CenterCrop(32)]
    np.testing.assert_array_equal(fit_to(image, 32, "center"), v2.Compose(steps)(image))


def test_random_crop_is_keyed_by_its_stream_and_stays_inside():
    image = noise(90, 50)
    crops = [fit_to(image, 32, "random", generator=stream(0, i, 0)) for i in range(30)]
    again = fit_to(image, 32, "random", generator=stream(0, 7, 0))
    np.testing.assert_array_equal(crops[7], again)
    assert len({crop.tobytes() for crop in crops}) > 20
    assert {crop.shape for crop in crops} == {(32, 32, 3)}


def test_overscale_one_leaves_a_picture_of_the_right_size_alone():
    image = noise(32, 32)
    for crop in ("center", "random", "none"):
        result = fit_to(image, 32, crop, overscale=1.0, generator=stream(0))
        np.testing.assert_array_equal(result, np.asarray(image))


def test_squeeze_keeps_the_whole_picture_and_strips_are_refused():
    image = Image.new("RGB", (64, 32), "red")
    image.paste((0, 0, 255), (32, 0, 64, 32))
    squeezed = fit_to(image, 16, "none")
    assert tuple(squeezed[8, 1]) == (255, 0, 0)
    assert tuple(squeezed[8, -2]) == (0, 0, 255)
    with pytest.raises(BadImage, match="64 times"):
        fit_to(Image.new("RGB", (1, 50_000)), 64, "center")


def test_wrong_crops_are_refused():
    with pytest.raises(UserError, match="generator"):
        fit_to(noise(8, 8), 4, "random")
    with pytest.raises(UserError, match=r"overscale .* 0\.5"):
        fit_to(noise(8, 8), 4, "center", overscale=0.5)


def test_save_png_keeps_pixels_and_text(tmp_path):
    pixels = np.asarray(noise(5, 4))
    save_png(pixels, tmp_path / "a.png", {"prompt": "a größeres Bild 東", "seed": "3"})
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text == {"prompt": "a größeres Bild 東", "seed": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(TypeError, match="float64"):
        save_png(np.zeros((2, 2, 3)), tmp_path / "b.png")


def test_ranges():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values)[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(to_uint8((to_float(values) + 1) / 2), values)
    assert to_uint8(torch.tensor([-1.0, 0.499 / 255, 0.501 / 255, 2.0])).tolist() == [0, 0, 1, 255]
    assert to_uint8(torch.tensor([0.5, 126.5 / 255])).tolist() == [128, 127]  # halves go up
