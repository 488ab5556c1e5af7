"""Published protocols are checked before anything is measured; kept drawings; zips; GenEval."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_network import TinyNetwork, pictures

from nextscale.errors import UserError
from nextscale.eval import evaluate
from nextscale.eval.geneval import read_lines, write_folders
from nextscale.eval.images import DrawnImages, open_images
from nextscale.eval.measure import measure
from nextscale.eval.plots import draw_plots
from nextscale.eval.published import Published

SMALL = Published(
    classes=3, per_class=2, side=8, keys=("arr_0", "mu"), reference_pictures=4, reference="R.npz"
)


def adm_file(path: Path, count: int = 4, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=pictures(count, side=8), **{"mu": np.zeros(3), **more})
    return path


def class_folders(
    folder: Path, counts: tuple[int, ...], side: int = 8, suffix: str = "png"
) -> Path:
    for kind, count in enumerate(counts):
        (folder / f"c{kind}").mkdir(parents=True)
        for i, picture in enumerate(pictures(count, kind, side)):
            Image.fromarray(picture).save(folder / f"c{kind}" / f"{i}.{suffix}")
    return folder


def test_a_right_set_passes(tmp_path: Path) -> None:
    images = open_images(class_folders(tmp_path / "good", (2, 2, 2)))
    assert SMALL.check(images, adm_file(tmp_path / "R.npz")) == []
    flat = open_images(pictures(6, side=8))
    (warning,) = SMALL.check(flat, tmp_path / "R.npz")
    assert "whether there are 2 pictures of each class cannot be seen" in warning


@pytest.mark.parametrize(
    ("counts", "side", "suffix", "message"),
    [
        ((2, 2, 1), 8, "png", "takes 6 pictures, 2 of each of 3 classes; these are 5"),
        ((3, 2, 1), 8, "png", "here a class has 1 to 3"),
        ((2, 2, 2), 9, "png", "pictures of 8x8, these are 9x9"),
        ((2, 2, 2), 8, "jpg", "takes PNGs"),
        ((2, 2, 2), 8, "jpeg", "takes PNGs"),
    ],
)
def test_other_samples_are_refused(
    tmp_path: Path, counts: tuple[int, ...], side: int, suffix: str, message: str
) -> None:
    images = open_images(class_folders(tmp_path / "bad", counts, side, suffix))
    with pytest.raises(UserError, match=message):
        SMALL.check(images, adm_file(tmp_path / "R.npz"))


def test_what_is_still_to_be_drawn_is_refused_too(tmp_path: Path) -> None:
    reference = adm_file(tmp_path / "R.npz")

    def draw(start: int, count: int) -> np.ndarray:
        raise AssertionError("nothing needs to be drawn")

    labels = np.repeat([0, 1, 2], 2)
    assert SMALL.check(DrawnImages(draw, 6, labels=labels), reference, 8) == []
    with pytest.raises(UserError, match="of 8x8, these are 64x64"):
        SMALL.check(DrawnImages(draw, 6, labels=labels), reference, 64)
    with pytest.raises(UserError, match="here a class has 1 to 3"):
        SMALL.check(DrawnImages(draw, 6, labels=np.array([0, 0, 0, 1, 1, 2])), reference, 8)


def test_other_references_are_refused(tmp_path: Path) -> None:
    images = open_images(pictures(6, side=8))
    with pytest.raises(UserError, match=r"with 4 pictures for precision and recall.* has 3"):
        SMALL.check(images, adm_file(tmp_path / "few.npz", 3))
    np.savez(tmp_path / "plain.npz", arr_0=pictures(4, side=8))
    with pytest.raises(UserError, match=r"plain.npz has no mu"):
        SMALL.check(images, tmp_path / "plain.npz")
    for nothing in (None, tmp_path, tmp_path / "nowhere.npz"):
        with pytest.raises(UserError, match=r"the reference must be R.npz of the ADM suite"):
            SMALL.check(images, nothing)


def test_drawn_pictures_are_kept_and_drawn_once(tmp_path: Path) -> None:
    pixels, asked = pictures(7, side=8), []

    def draw(start: int, count: int) -> np.ndarray:
        asked.append((start, count))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return pixels[start : start + count]

    settings = {"network": TinyNetwork(), "metrics": ["vendi"], "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        evaluate(DrawnImages(draw, 7, tmp_path / "kept", {"seed": 1}), **settings)
    record = evaluate(DrawnImages(draw, 7, tmp_path / "kept", {"seed": 1}), **settings)
    assert asked == [(0, 3), (3, 3), (3, 3), (6, 1)]
    assert record["metrics"] == evaluate(pixels, **settings)["metrics"]
    assert record["manifest"]["samples"]["count"] == 7
    again = evaluate(tmp_path / "kept", **settings)["manifest"]["samples"]
    assert again["pixels_sha256"] == record["manifest"]["samples"]["pixels_sha256"]
    for count, seed in ((7, 2), (8, 1)):
        with pytest.raises(UserError, match="another model, number or other settings"):
            DrawnImages(draw, count, tmp_path / "kept", {"seed": seed})
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".tmp-0.json").touch()  # of a run that was killed at its first file
    DrawnImages(draw, 7, tmp_path / "begun")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").touch()
    with pytest.raises(UserError, match="is not empty"):
        DrawnImages(draw, 7, tmp_path / "full")


@pytest.mark.parametrize("workers", [0, 1])
def test_zips_are_read_in_place(tmp_path: Path, workers: int) -> None:
    folder = class_folders(tmp_path / "set", (3, 2))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder))
        archive.writestr("note.txt", "no picture")
    images = open_images(tmp_path / "set.zip")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    settings = {"network": TinyNetwork(), "metrics": ["vendi"], "batch_size": 2}
    ours = evaluate(tmp_path / "set.zip", num_workers=workers, **settings)
    assert ours["metrics"] == evaluate(folder, **settings)["metrics"]
    assert ours["manifest"]["samples"] == evaluate(folder, **settings)["manifest"]["samples"]


def test_bad_zips_are_named(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no.zip is no .zip that can be read"):
        open_images(tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("note.txt", "no picture")
    with pytest.raises(UserError, match="there is no image in"):
        open_images(tmp_path / "empty.zip")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("a.png", b"\x89PNG and no more")
        archive.writestr("b.png", b"\x89PNG and no more")
    with pytest.raises(UserError, match=r"bad.zip/a.png is no readable image"):
        evaluate(tmp_path / "bad.zip", network=TinyNetwork(), metrics=["vendi"])


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    samples = class_folders(tmp_path / "set", (9, 6, 4), side=16)
    measured = measure(
        samples, pictures(30, 5), network=TinyNetwork(), metrics=["fid"], keep=["pool"]
    )
    written = {path.name: path for path in draw_plots(measured, tmp_path / "plots")}
    assert set(written) == {"features.png", "extremes.png", "per_class.csv"}
    for name in ("features.png", "extremes.png"):
        with Image.open(written[name]) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 2
    lines = written["per_class.csv"].read_text().splitlines()
    assert lines[0] == "class,pictures,distance to the nearest reference (pool)"
    rows = [line.split(",") for line in lines[1:]]
    assert {row[0]: row[1] for row in rows} == {"0": "9", "1": "6", "2": "4"}
    distances = [float(row[2]) for row in rows]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0


def test_geneval_folders(tmp_path: Path) -> None:
    lines = [{"tag": "counting", "prompt": "two dogs"}, {"tag": "colors", "prompt": "a red bus"}]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    asked = []

    def draw(prompts: list[str], seeds: list[int]) -> np.ndarray:
        asked.extend(zip(prompts, seeds, strict=True))
        return pictures(len(prompts))

    assert write_folders(read_lines(path), draw, tmp_path / "out", per_prompt=2, seed=7) == 4
    assert asked == [("two dogs", 7), ("two dogs", 8), ("a red bus", 9), ("a red bus", 10)]
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == lines[1]
    (tmp_path / "out" / "00001" / "samples" / "0001.png").unlink()
    assert write_folders(read_lines(path), draw, tmp_path / "out", per_prompt=2, seed=7) == 1
    assert asked[-1] == ("a red bus", 10)
    with pytest.raises(UserError, match="another model, number or other settings"):
        write_folders(read_lines(path), draw, tmp_path / "out", per_prompt=2, seed=8)
    with pytest.raises(UserError, match='line 1 of the prompts has no "prompt"'):
        write_folders([{"tag": "x"}], draw, tmp_path / "y")
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"line 1 of .* is no JSON object"):
        read_lines(path)
