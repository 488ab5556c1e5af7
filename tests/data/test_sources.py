"""Every kind of dataset, on a handful of pictures made here."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.data.images import BadImage
from nextscale.data.sources import open_source
from nextscale.errors import UserError
from nextscale.streams import batch_indices

SHADES = (0, 40, 80, 120, 160, 200)


def picture(shade: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A plain picture, recognised by its shade whatever the crop."""
    return Image.new("RGB", size, (shade, shade, 255 - shade))


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    picture(shade).save(buffer, format="PNG")
    return buffer.getvalue()


def fill(folder, shades=SHADES, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for i, shade in enumerate(shades):
        (folder / f"{prefix}{i}.png").write_bytes(png(shade))
    return folder


def write_metadata(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def write_tar(path, samples):
    """One dict of extension -> bytes per sample."""
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def all_of(dataset, **options):
    source = open_source(str(dataset), **{"resolution": 8, "split": "all", **options})
    return source, source.load(np.arange(len(source)))


def shades(batch):
    return batch.images[:, 0, 4, 4].tolist()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` from writing to the cache of whoever runs the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


# --- kinds -------------------------------------------------------------------------------------


def test_scenes_are_captioned_and_validation_is_another_stream():
    source = open_source("scenes", resolution=16, num_images=50)
    batch = source.load(np.array([3, 49, 3]))
    assert len(source) == 50
    assert batch.images.shape == (3, 3, 16, 16)
    assert torch.equal(batch.images[0], batch.images[2])
    assert batch.captions[0] == batch.captions[2] != batch.captions[1]
    assert source.class_names[batch.labels[0]].split()[0] in batch.captions[0]
    other = open_source("scenes", resolution=16, split="validation").load(np.array([3]))
    assert not torch.equal(other.images[0], batch.images[0])
    assert len(open_source("scenes", resolution=16)) == 1_000_000


def test_class_folders_are_numbered_as_torchvision_does(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path / "dog", (0, 40))
    fill(tmp_path / "cat" / "deep", (80,))
    fill(tmp_path / "Ant", (120,))
    source, batch = all_of(tmp_path)
    official = ImageFolder(str(tmp_path))
    assert source.class_names == official.classes == ["Ant", "cat", "dog"]
    assert batch.names == [path for path, _ in official.samples]
    assert batch.labels.tolist() == official.targets
    assert shades(batch) == [120, 80, 0, 40]
    assert source.num_classes == 3
    assert batch.labels.dtype == torch.int64


def test_split_folders_share_the_classes_of_training(tmp_path):
    fill(tmp_path / "train" / "cat", (0,))
    fill(tmp_path / "train" / "dog", (40, 80))
    fill(tmp_path / "val" / "dog", (120,))
    source, batch = all_of(tmp_path, split="train")
    assert shades(batch) == [0, 40, 80]
    source, batch = all_of(tmp_path, split="validation")
    assert (shades(batch), batch.labels.tolist(), source.num_classes) == ([120], [1], 2)
    fill(tmp_path / "val" / "emu", (160,))
    with pytest.raises(UserError, match="class folders that the training part has not: emu"):
        open_source(str(tmp_path), resolution=8, split="validation")


def test_flat_folder_has_no_labels(tmp_path):
    source, batch = all_of(fill(tmp_path))
    assert shades(batch) == list(SHADES)
    assert (batch.labels, batch.captions, source.num_classes) == (None, None, None)
    with pytest.raises(UserError, match=r"num_classes is 10.*no labels"):
        open_source(str(tmp_path), resolution=8, num_classes=10)
    with pytest.raises(UserError, match="--label_column"):
        open_source(str(tmp_path), resolution=8, label_column="label")


def test_metadata_brings_captions_labels_and_extra_columns(tmp_path):
    fill(tmp_path, (0, 40, 80))
    rows = [
        {"file_name": "2.png", "text": "bright", "label": "cat", "conditioning": "edges/2.png"},
        "",
        {"file_name": "0.png", "text": "größer", "label": "ant", "conditioning": None},
    ]
    source, batch = all_of(write_metadata(tmp_path, rows))
    assert shades(batch) == [80, 0]
    assert batch.captions == ["bright", "größer"]
    assert (source.class_names, batch.labels.tolist()) == (["ant", "cat"], [1, 0])
    assert batch.extra == {"conditioning": ["edges/2.png", None]}
    assert source.has_captions


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": "0.png"}, {"seen": 1}], r'line 2 of .* has no "file_name"'),
        ([{"file_name": "no.png"}], r"line 1 of .* names the file no\.png, which is not in"),
        ([{"file_name": "0.png", "text": "x"}, {"file_name": "1.png"}], r'line 2 .* no "text"'),
        (["{oops"], "line 1 of .* is no JSON"),
        (["[1]"], "line 1 of .* is no JSON object"),
        ([""], "is empty"),
        ([{"file_name": "0.png", "label": 1.5}], r"the label of line 1 of .* is 1\.5"),
    ],
)
def test_faulty_metadata_is_named_with_its_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        open_source(write_metadata(fill(tmp_path), rows), resolution=8)


@pytest.fixture
def parquet(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["zebra", "ant"]),
            "text": datasets.Value("string"),
            "score": datasets.Value("float64"),
        }
    )
    rows = {
        "image": [{"bytes": png(shade), "path": None} for shade in SHADES[:3]],
        "label": [0, 1, 1],
        "text": ["one", "two", "three"],
        "score": [0.0, 0.5, 1.0],
    }
    (tmp_path / "table").mkdir()
    path = tmp_path / "table" / "data.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("whole_folder", [False, True])
def test_parquet(parquet, whole_folder):
    source, batch = all_of(parquet.parent if whole_folder else parquet)
    assert shades(batch) == list(SHADES[:3])
    assert (source.class_names, batch.labels.tolist()) == (["zebra", "ant"], [0, 1, 1])
    assert batch.captions == ["one", "two", "three"]
    assert batch.extra == {"score": [0.0, 0.5, 1.0]}


def test_parquet_columns_by_name(parquet):
    _, batch = all_of(parquet, label_column="text", caption_column="score")
    assert batch.labels.tolist() == [0, 2, 1]
    assert batch.captions == ["0.0", "0.5", "1.0"]
    for flag in ("image_column", "label_column", "caption_column"):
        with pytest.raises(UserError, match=f'no column "nope".*image, label.*--{flag}'):
            open_source(str(parquet), resolution=8, **{flag: "nope"})


def test_parquet_with_plain_bytes_and_a_broken_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "plain.parquet"
    table = {"picture": [png(0), b"junk", png(80)], "label": ["b", "b", "a"]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    source, batch = all_of(path, image_column="picture")
    assert shades(batch) == [0, 80, 80]
    assert batch.labels.tolist() == [1, 0, 0]  # the label goes with the picture that was taken
    assert source.skipped[0].startswith("row 1 of ")
    (tmp_path / "bad.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot open .*bad\.parquet"):
        open_source(str(tmp_path / "bad.parquet"), resolution=8)
    with pytest.raises(UserError, match=r"cannot open .*none\.parquet"):
        open_source(str(tmp_path / "none.parquet"), resolution=8)


def test_parquet_with_its_own_splits(parquet):
    import shutil

    shutil.move(parquet, parquet.parent / "train-00000-of-00001.parquet")
    shutil.copy(
        parquet.parent / "train-00000-of-00001.parquet",
        parquet.parent / "validation-00000-of-00001.parquet",
    )
    for split in ("train", "validation"):
        assert len(open_source(str(parquet.parent), resolution=8, split=split)) == 3


def test_hub_dataset_without_network_is_a_clear_error(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r'cannot open the dataset "some-one/pictures".*OFFLINE'):
        open_source("some-one/pictures", resolution=8)


def test_tars_are_read_in_any_order(tmp_path):
    for number, half in enumerate((SHADES[:3], SHADES[3:])):
        samples = {
            f"set/{number}{i}": {
                "PNG": png(s),
                "cls": str(i).encode(),
                "txt": f"shade {s}".encode(),
            }
            for i, s in enumerate(half)
        }
        write_tar(tmp_path / f"part-{number}.tar", samples)
    for dataset in ("part-{0..1}.tar", "part-*.tar", ""):
        source, batch = all_of(tmp_path / dataset)
        assert shades(batch) == list(SHADES)
    assert batch.labels.tolist() == [0, 1, 2] * 2
    assert batch.captions == [f"shade {s}" for s in SHADES]
    assert source.num_classes == 3
    assert shades(source.load(np.array([5, 0, 3]))) == [200, 0, 120]
    with pytest.raises(UserError, match=r"no file .*part-2\.tar"):
        open_source(str(tmp_path / "part-{0..2}.tar"), resolution=8)


def test_tars_of_a_folder_with_splits(tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a": {"png": png(0), "cls": b"cat"}})
    write_tar(tmp_path / "val-0.tar", {"b": {"png": png(40), "cls": b"cat"}})
    for split, shade in (("train", 0), ("validation", 40)):
        assert shades(all_of(tmp_path, split=split)[1]) == [shade]


def test_faulty_tars(tmp_path):
    half = {"a": {"png": png(0), "cls": b"1"}, "b": {"png": png(0)}}
    with pytest.raises(UserError, match=r'b.png of .* has no file "\.cls" \(1 of 2'):
        open_source(write_tar(tmp_path / "half.tar", half), resolution=8)
    with pytest.raises(UserError, match="no image in 1 tar files"):
        open_source(write_tar(tmp_path / "none.tar", {"a": {"txt": b"x"}}), resolution=8)
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    with pytest.raises(UserError, match=r"junk\.tar is no readable, uncompressed tar"):
        open_source(str(tmp_path / "junk.tar"), resolution=8)
    with pytest.raises(UserError, match="not on this machine"):
        open_source("https://example.org/a.tar", resolution=8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    pictures = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in SHADES])
    save(tmp_path / "a.npz", pictures, np.arange(6))
    source, batch = all_of(tmp_path / "a.npz", overscale=1.0)
    np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1), pictures)
    assert batch.labels.tolist() == list(range(6))
    assert source.num_classes == 6


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"must be uint8 .* \[2, 3, 8, 8\]"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "must be uint8 .* float64"),
        ({"mu": np.zeros(3)}, "no .npz with pictures in arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3)}, "must hold 2 labels"),
    ],
)
def test_faulty_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a.npz"), resolution=8)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no such set", "/nowhere/at/all", "./missing", "a/b/c"])
def test_unknown_dataset_lists_what_there_is(name):
    with pytest.raises(UserError, match=r"there is no dataset .*scenes, digits"):
        open_source(name, resolution=8)


def test_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no image in"):
        open_source(str(tmp_path), resolution=8)
    fill(tmp_path / "cat")
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"1 of the 2 class folders of .*: dog"):
        open_source(str(tmp_path), resolution=8)


def test_label_out_of_range_names_picture_and_limit(tmp_path):
    rows = [{"file_name": "0.png", "label": 1}, {"file_name": "1.png", "label": 4}]
    dataset = write_metadata(fill(tmp_path), rows)
    assert open_source(dataset, resolution=8, num_classes=5).num_classes == 5
    with pytest.raises(UserError, match=r"label 4 of .*1\.png is out of range.*0\.\.3"):
        open_source(dataset, resolution=8, num_classes=4)
    with pytest.raises(UserError, match=r"labels 0\.\.9, but num_classes is 3"):
        open_source("digits", resolution=8, num_classes=3)
    rows[0]["label"] = -1
    dataset = write_metadata(tmp_path, rows)
    with pytest.raises(UserError, match=r"label -1 of .* is out of range"):
        open_source(dataset, resolution=8)


@pytest.mark.parametrize("option", [{"resolution": 0}, {"num_images": 0}, {"split": "dev"}])
def test_options_out_of_range(option):
    with pytest.raises(UserError, match=next(iter(option))):
        open_source("scenes", **{"resolution": 8, **option})


def test_broken_files_are_named_counted_and_replaced(tmp_path, caplog):
    fill(tmp_path)
    (tmp_path / "1.png").write_text("no picture")
    (tmp_path / "5.png").write_bytes(png(200)[:40])
    (tmp_path / "notes.txt").write_text("no picture either")
    with caplog.at_level(logging.WARNING):
        source, batch = all_of(tmp_path)
        assert shades(batch) == [0, 80, 80, 120, 160, 0]  # the next good one, round the corner
        source.load(np.arange(6))
    assert source.skipped == [str(tmp_path / n) for n in ("notes.txt", "1.png", "5.png")]
    assert len(caplog.records) == 3  # once per file, not once per batch
    assert "5.png" in caplog.messages[-1]
    assert "(3 skipped so far)" in caplog.messages[-1]


def test_strict_fails_on_the_first_broken_file(tmp_path):
    fill(tmp_path)
    (tmp_path / "1.png").write_text("no picture")
    source = open_source(str(tmp_path), resolution=8, split="all", strict=True)
    source.load(np.array([0]))
    with pytest.raises(BadImage, match=r"1\.png is no readable image"):
        source.load(np.array([0, 1]))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadImage, match=r"notes\.txt"):
        open_source(str(tmp_path), resolution=8, strict=True)


def test_folder_of_broken_files_ends_with_an_error(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no picture")
    source = open_source(str(tmp_path), resolution=8, split="all")
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 2 files"):
            source.load(np.array([0]))


# --- determinism -------------------------------------------------------------------------------


def textured(folder, count=40):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
    return str(folder)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    dataset = textured(tmp_path)

    def batch(step, seed=0):
        source = open_source(dataset, resolution=16, seed=seed)
        return source.load(batch_indices(seed, step, 4, len(source)), step=step)

    assert torch.equal(batch(3).images, batch(3).images)
    assert batch(3).names == batch(3).names != batch(4).names
    assert not torch.equal(batch(3).images, batch(3, seed=1).images)


def test_a_picture_depends_on_its_index_and_step_not_on_its_batch(tmp_path):
    source = open_source(textured(tmp_path), resolution=16)
    together = source.load(np.array([5, 9, 2]), step=7).images
    for place, index in enumerate((5, 9, 2)):
        assert torch.equal(together[place], source.load(np.array([index]), step=7).images[0])
    crops = [source.load(np.array([5]), step=step).images.numpy().tobytes() for step in range(8)]
    assert len(set(crops)) > 1


def test_validation_crops_do_not_move(tmp_path):
    source = open_source(textured(tmp_path), resolution=16, split="validation")
    images = [source.load(np.arange(len(source)), step=step).images for step in (0, 5)]
    assert torch.equal(*images)


def test_held_out_pictures_are_apart_and_stay_the_same(tmp_path):
    dataset = textured(tmp_path)
    parts = {}
    for split in ("train", "validation", "all"):
        source = open_source(dataset, resolution=8, split=split)
        parts[split] = source.load(np.arange(len(source))).names
    assert (len(parts["train"]), len(parts["validation"])) == (38, 2)
    assert sorted(parts["train"] + parts["validation"]) == parts["all"]
    first = open_source(dataset, resolution=8, num_images=3)
    assert first.load(np.arange(3)).names == parts["train"][:3]


def test_one_picture_serves_for_training_and_validation(tmp_path):
    fill(tmp_path, (0,))
    for split in ("train", "validation"):
        assert len(open_source(str(tmp_path), resolution=8, split=split)) == 1


def test_sources_can_be_sent_to_data_workers(tmp_path, parquet):
    tar = write_tar(tmp_path / "a.tar", {"a": {"png": png(0)}, "b": {"png": png(40)}})
    folder = textured(tmp_path / "folder")
    for dataset in ("scenes", "digits", folder, tar, str(parquet)):
        source = open_source(dataset, resolution=8, split="all")
        copy = pickle.loads(pickle.dumps(source))
        indices = np.array([1, 0])
        assert torch.equal(source.load(indices).images, copy.load(indices).images)


def test_indices_out_of_range_are_refused():
    with pytest.raises(IndexError):
        open_source("scenes", resolution=8, num_images=5).load(np.array([5]))
