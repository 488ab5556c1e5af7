"""The pass over pictures and what is made of it: batches, processes, files, warnings, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_network import TinyNetwork, pictures

from nextscale.errors import UserError
from nextscale.eval import small_features
from nextscale.eval.features import exact_convolutions, extract, parts_of
from nextscale.eval.frechet import Moments, frechet_distance
from nextscale.eval.images import ArrayImages, open_images
from nextscale.eval.measure import evaluate
from nextscale.eval.scores import inception_score
from nextscale.eval.statistics import (
    read_statistics,
    save_statistics,
    statistics_of,
)

ALL = ("fid", "sfid", "isc", "kid", "prc", "vendi")


def write(folder: Path, pixels: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{index:03d}{suffix}")
    return folder


def values(record: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in record["metrics"].items()}


def test_one_pass_gives_what_the_functions_give(network: TinyNetwork) -> None:
    fake, real = pictures(60, seed=1), pictures(70, seed=2)
    found = values(evaluate(fake, real, network=network, metrics=ALL))
    a, b = (network(list(p)) for p in (real, fake))
    for name, tap in (("fid", "pool"), ("sfid", "spatial")):
        m, n = Moments.of(a[tap]), Moments.of(b[tap])
        expected = frechet_distance(m.mean, m.covariance, n.mean, n.covariance)
        assert found[f"{name}[adm]"] == pytest.approx(expected, rel=1e-10)
    assert found["isc[adm]"] == pytest.approx(inception_score(b["logits"], 1)[0], rel=1e-10)
    assert set(found) == {
        f"{name}[adm]"
        for name in (
            *("fid", "sfid", "isc", "kid", "kid_full", "precision", "recall", "density"),
            *("coverage", "vendi"),
        )
    }


def test_inception_score_of_many_splits(network: TinyNetwork) -> None:
    fake = pictures(53)
    network = TinyNetwork("clean")
    record = evaluate(fake, network=network, metrics=["isc"])
    mean, std = inception_score(network(list(fake))["logits"], 10)
    entry = record["metrics"]["isc[clean]"]
    assert entry["value"] == pytest.approx(mean, rel=1e-10)
    assert entry["params"] == {"splits": 10, "std_over_splits": pytest.approx(std, rel=1e-8)}


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_batches_and_workers_change_nothing(
    network: TinyNetwork, tmp_path: Path, batch_size: int
) -> None:
    fake, real = write(tmp_path / "fake", pictures(50, 1)), pictures(40, 2)
    expected = evaluate(fake, real, network=network, metrics=ALL, batch_size=16)
    again = evaluate(fake, real, network=network, metrics=ALL, batch_size=batch_size, num_workers=1)
    assert values(again) == pytest.approx(values(expected), rel=1e-9)
    assert again["manifest"]["samples"] == expected["manifest"]["samples"]


def test_sheets_of_generate_are_left_out(network: TinyNetwork, tmp_path: Path) -> None:
    folder = write(tmp_path / "out", pictures(5))
    Image.new("RGB", (99, 50), "red").save(folder / "grid.png")
    Image.new("RGB", (99, 50), "red").save(folder / "000003_scales.png")
    assert evaluate(folder, network=network, metrics=["vendi"])["manifest"]["samples"]["count"] == 7
    (folder / "recipe.yaml").write_text("command: generate")
    record = evaluate(folder, network=network, metrics=["vendi"])
    assert record["manifest"]["samples"]["count"] == 5
    assert "grids and filmstrips of nextscale generate left out: 2" in record["warnings"]


def test_subsets_that_are_the_whole_set_give_no_error(network: TinyNetwork) -> None:
    entry = evaluate(pictures(30, 1), pictures(30, 2), network=network, metrics=["kid"])["metrics"]
    assert entry["kid[adm]"]["se"] is None
    assert entry["kid[adm]"]["params"]["subset_size"] == 30


def test_every_source_gives_the_same(network: TinyNetwork, tmp_path: Path) -> None:
    pixels = pictures(30)
    folder = write(tmp_path / "folder", pixels)
    np.savez(tmp_path / "a.npz", pixels)
    np.save(tmp_path / "a.npy", pixels)
    sources = [folder, tmp_path / "a.npz", tmp_path / "a.npy", pixels, torch.from_numpy(pixels)]
    sources.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    hashes = set()
    for source in sources:
        record = evaluate(source, network=network, metrics=["vendi"])
        hashes.add(record["manifest"]["samples"]["pixels_sha256"])
    drawn = evaluate(
        lambda start, count: pixels[start : start + count],
        network=network, metrics=["vendi"], num_images=30, batch_size=7,
    )  # fmt: skip
    assert {drawn["manifest"]["samples"]["pixels_sha256"]} == hashes


def test_statistics_stand_for_the_reference(network: TinyNetwork, tmp_path: Path) -> None:
    fake, real = pictures(60, 1), pictures(60, 2)
    features = extract(open_images(real), network, moments=["pool", "spatial"])
    statistics = statistics_of(features, network.fingerprint(), "x")
    save_statistics(statistics, tmp_path / "ref.npz")
    expected = values(evaluate(fake, real, network=network, metrics=["fid", "sfid"]))
    record = evaluate(fake, tmp_path / "ref.npz", network=network, metrics=["fid", "sfid"])
    assert values(record) == pytest.approx(expected, rel=1e-12)
    assert record["metrics"]["fid[adm]"]["n_ref"] == 60
    assert not any("does not say" in w for w in record["warnings"])
    with pytest.raises(UserError, match="protocol adm, not clean"):
        evaluate(fake, tmp_path / "ref.npz", network=TinyNetwork("clean"))
    with pytest.raises(UserError, match=r"prc needs .* and .*ref\.npz holds statistics"):
        evaluate(fake, tmp_path / "ref.npz", network=network, metrics=["prc"])


def test_statistics_of_a_folder_are_cached_by_content(tmp_path: Path) -> None:
    class Counting(TinyNetwork):
        seen = 0

        def __call__(self, images, indices=()):  # type: ignore[no-untyped-def]
            self.seen += len(images)
            return super().__call__(images)

    real, cache, fake = write(tmp_path / "real", pictures(40, 2)), tmp_path / "cache", pictures(30)
    network = Counting()
    settings = {"network": network, "cache": cache}
    first = evaluate(fake, real, **settings)
    assert network.seen == 70
    second = evaluate(fake, real, **settings)
    assert network.seen == 100  # the samples alone
    assert values(second) == pytest.approx(values(first), rel=1e-12)
    assert second["metrics"]["fid[adm]"]["n_ref"] == 40
    real.rename(tmp_path / "moved")
    evaluate(fake, tmp_path / "moved", **settings)
    assert network.seen == 130
    Image.fromarray(pictures(1, 9)[0]).save(tmp_path / "moved" / "000.png")
    changed = evaluate(fake, tmp_path / "moved", **settings)
    assert network.seen == 200
    assert values(changed) != values(first)
    network.protocol = "clean"
    evaluate(fake, tmp_path / "moved", **settings)
    assert network.seen == 270
    assert len(list(cache.iterdir())) == 3
    evaluate(fake, tmp_path / "moved", metrics=["fid", "prc"], **settings)  # needs the pictures
    assert network.seen == 340


def test_statistics_of_others(network: TinyNetwork, tmp_path: Path) -> None:
    fake, real = pictures(60, 1), pictures(60, 2)
    m = Moments.of(network(list(real))["pool"])
    np.savez(tmp_path / "plain.npz", mu=m.mean.numpy(), sigma=m.covariance.numpy())
    record = evaluate(fake, tmp_path / "plain.npz", network=network)
    expected = evaluate(fake, real, network=network)
    assert values(record) == pytest.approx(values(expected), rel=1e-12)
    assert any("does not say which protocol" in w for w in record["warnings"])
    # The ADM suite's file: statistics of one set, and pictures for precision and recall.
    np.savez(tmp_path / "adm.npz", real, mu=m.mean.numpy(), sigma=m.covariance.numpy())
    both = evaluate(fake, tmp_path / "adm.npz", network=network, metrics=["fid", "prc"])
    assert values(both)["fid[adm]"] == pytest.approx(values(expected)["fid[adm]"], rel=1e-12)
    assert 0 <= values(both)["precision[adm]"] <= 1
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(UserError, match="has 9 pool features, the network 6"):
        evaluate(fake, tmp_path / "wide.npz", network=network)


def test_jackknife_error_is_the_spread_of_repeated_draws(network: TinyNetwork) -> None:
    real, metrics = pictures(400, seed=99), ("fid", "isc", "kid", "prc", "vendi")
    records = [
        evaluate(pictures(200, seed), real, network=network, metrics=metrics)["metrics"]
        for seed in range(30)
    ]
    for name in ("fid", "isc", "kid", "kid_full", "precision", "density", "vendi"):
        entries = [record[f"{name}[adm]"] for record in records]
        spread = float(np.std([r["value"] for r in entries], ddof=1))
        typical = float(np.mean([r["se"] for r in entries]))
        assert 0.6 * spread < typical < 1.7 * spread, name


def test_jackknife_of_the_inception_score_leaves_pictures_out() -> None:
    network, fake = TinyNetwork("clean"), pictures(80)
    entry = evaluate(fake, network=network, metrics=["isc"])["metrics"]["isc[clean]"]
    logits, part = network(list(fake))["logits"].numpy(), np.arange(80) % 20
    split = np.arange(80) * 10 // 80
    without = [
        np.mean([inception_score(logits[(split == s) & (part != b)], 1)[0] for s in range(10)])
        for b in range(20)
    ]
    expected = np.sqrt(19 / 20 * ((without - np.mean(without)) ** 2).sum())
    assert entry["se"] == pytest.approx(expected, rel=1e-8)


def test_without_jackknife_there_are_only_errors_of_means(network: TinyNetwork) -> None:
    metrics = ("fid", "isc", "kid", "prc", "vendi")
    record = evaluate(
        pictures(80), pictures(80, 1), network=network, metrics=metrics, jackknife=False
    )
    given = {name for name, entry in record["metrics"].items() if entry["se"] is not None}
    assert given == {"precision[adm]", "density[adm]"}


WORKER = """
import json, sys
import torch.distributed as dist
from tiny_network import TinyNetwork, pictures
from nextscale.eval import small_features
from nextscale.eval.measure import evaluate
dist.init_process_group("gloo")
metrics = ("fid", "sfid", "isc", "kid", "prc", "vendi")
record = evaluate(pictures(53, 1), pictures(41, 2), network=TinyNetwork(), metrics=metrics)
both = [pictures(53, 1, 64), pictures(41, 2, 64)]
metrics = ("fd_scenes", "kid_scenes", "vendi_scenes")
real = evaluate(*both, network=small_features(), metrics=metrics, batch_size=8)
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(json.dumps([record, real]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same(network: TinyNetwork, tmp_path: Path, world: int) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests" / "eval")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={world}", str(script), str(tmp_path / "r.json")),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, real = json.loads((tmp_path / "r.json").read_text())
    expected = evaluate(pictures(53, 1), pictures(41, 2), network=network, metrics=ALL)
    assert values(found) == pytest.approx(values(expected), rel=1e-12)
    assert found["manifest"]["samples"] == expected["manifest"]["samples"]
    both = (pictures(53, 1, 64), pictures(41, 2, 64))
    metrics = ("fd_scenes", "kid_scenes", "vendi_scenes")
    expected = evaluate(*both, network=small_features(), metrics=metrics)
    assert values(real) == pytest.approx(values(expected), rel=1e-5)


def test_convolutions_are_exact_and_still_cudnns() -> None:
    with exact_convolutions():
        assert torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.allow_tf32


def test_pairs(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "eval"
    expected = json.loads((golden / "expected.json").read_text())["recon"]
    with np.load(golden / "features.npz") as file:
        originals, pixels = (np.moveaxis(file[f"img_{k}"], 1, -1) for k in ("ref", "rec"))
    record = evaluate(pixels, originals, metrics=["psnr", "ssim"])["metrics"]
    psnr = record["psnr"]
    assert psnr["value"] == pytest.approx(expected["psnr_mean_of_images"], rel=1e-9)
    assert psnr["params"]["of_pooled_error"] == pytest.approx(
        expected["psnr_of_pooled_mse"], rel=1e-9
    )
    assert record["ssim"]["value"] == pytest.approx(expected["ssim_mean"], rel=1e-9)
    spread = np.std(expected["psnr_per_image"], ddof=1) / 3**0.5
    assert psnr["se"] == pytest.approx(spread, rel=1e-9)
    equal = evaluate(originals, originals, metrics=["psnr"])["metrics"]["psnr"]
    assert (equal["value"], equal["params"]["infinite"]) == (None, 3)
    with pytest.raises(UserError, match="3 pictures and 2 originals"):
        evaluate(pixels, originals[:2], metrics=["psnr"])
    together = evaluate(pixels, originals, network=TinyNetwork(), metrics=["psnr", "rfid"])
    assert together["metrics"]["psnr"]["value"] == psnr["value"]
    assert together["metrics"]["rfid[adm]"]["n_ref"] == 3
    with pytest.raises(UserError, match="needs pictures of 161 pixels"):
        evaluate(pixels, originals, metrics=["ms_ssim"])
    large = pictures(2, side=176)
    shifted = evaluate(large, large[::-1].copy(), metrics=["ms_ssim"])["metrics"]["ms_ssim"]
    assert 0 <= shifted["value"] < 1


def test_a_file_with_pictures_and_statistics(network: TinyNetwork, tmp_path: Path) -> None:
    """As the ADM suite's: its pictures are fewer than those of its statistics."""
    pixels, many = pictures(6, 1), network(list(pictures(40, 2)))
    arrays = {}
    for tap, names in (("pool", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        moments = Moments.of(many[tap])
        arrays |= dict(zip(names, (moments.mean.numpy(), moments.covariance.numpy()), strict=True))
    np.savez(tmp_path / "adm.npz", arr_0=pixels, **arrays)
    fake = pictures(6, 3)
    found = evaluate(fake, tmp_path / "adm.npz", network=network, metrics=["fid", "prc"])["metrics"]
    assert found["precision[adm]"]["n_ref"] == 6
    assert found["fid[adm]"]["n_ref"] is None  # the file does not say of how many
    expected = evaluate(fake, pixels, network=network, metrics=["rfid"])["metrics"]["rfid[adm]"]
    pairs = evaluate(fake, tmp_path / "adm.npz", network=network, metrics=["rfid"])["metrics"]
    assert pairs["rfid[adm]"] == expected


def test_parts_of_the_jackknife_share_every_class(network: TinyNetwork) -> None:
    labels = np.repeat(np.arange(4), 40)
    part = parts_of(160, 20, labels)
    for label in range(4):
        assert np.bincount(part[labels == label], minlength=20).tolist() == [2] * 20
    # Four classes far apart: sorted or in turn, the error is that of the pictures in a class.
    pixels = np.concatenate([pictures(40, 1) // 4 + 60 * label for label in range(4)])
    turn = np.argsort(np.tile(np.arange(40), 4), kind="stable")
    errors = []
    for order in (np.arange(160), turn):
        samples = ArrayImages(pixels[order].astype(np.uint8))
        samples.labels = labels[order]
        metrics = ["fid", "kid", "vendi", "isc"]
        record = evaluate(samples, pictures(50, 5), network=network, metrics=metrics)["metrics"]
        names = ("fid", "kid_full", "vendi", "isc")  # the subsets of kid go by order
        errors.append([record[f"{name}[adm]"]["se"] for name in names])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_a_last_split_of_one_picture_has_an_error_too() -> None:
    class Constant(TinyNetwork):
        def __call__(self, images, indices=()):  # type: ignore[no-untyped-def]
            return {"logits": torch.randn(len(images), 5, generator=generator)}

    generator = torch.Generator().manual_seed(0)
    record = evaluate(
        np.zeros((5001, 1, 1, 3), np.uint8), network=Constant(), metrics=["isc"], batch_size=5001
    )
    entry = record["metrics"]["isc[adm]"]
    assert entry["params"]["splits"] == 2
    assert 0 < entry["se"] < 1


def test_folders_with_parts(tmp_path: Path) -> None:
    write(tmp_path / "train", pictures(3))
    write(tmp_path / "val", pictures(2, 1))
    with pytest.raises(UserError, match="has the parts train, val: pass the one that is meant"):
        open_images(tmp_path)
    (tmp_path / "val").rename(tmp_path / "more")
    assert len(open_images(tmp_path)) == 3
    Image.fromarray(pictures(1, 9)[0]).save(tmp_path / "loose.png")
    assert len(open_images(tmp_path)) == 6


def test_lossy_members_of_tars_are_named(network: TinyNetwork, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    folder = write(tmp_path / "set", pictures(3), ".jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    record = evaluate(tmp_path / "set.tar", network=network, metrics=["vendi"])
    (warning,) = [w for w in record["warnings"] if "lossy" in w]
    assert warning.startswith(f"3 files are lossy (000.jpg of {tmp_path / 'set.tar'})")


def test_labels_start_at_zero(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=pictures(2), arr_1=[-1, 0])
    with pytest.raises(UserError, match=r"x.npz has the label -1: labels start at 0"):
        open_images(tmp_path / "x.npz")


def test_scores_by_prompt_share_the_pass(network: TinyNetwork) -> None:
    from nextscale.data.sources import open_source

    batch = open_source("scenes", resolution=64, split="train").load(np.arange(12))
    pixels, prompts = batch.images.permute(0, 2, 3, 1).numpy(), list(batch.captions or ())
    wrong = [*prompts[:9], *prompts[:3]]
    settings = {"network": network, "metrics": ["checker", "vendi"], "batch_size": 5}
    good = evaluate(pixels, prompts=prompts, **settings)["metrics"]
    assert good["checker"]["value"] == 1
    assert good["checker"]["se"] is None  # no spread was seen
    bad = evaluate(pixels, prompts=wrong, **settings)["metrics"]["checker"]
    assert bad["value"] == pytest.approx(9 / 12)
    sums = [0.25 - 0.75] * 3 + [0.25] * 6  # clusters by prompt
    expected = (9 / 8 * sum(s**2 for s in sums)) ** 0.5 / 12
    assert bad["se"] == pytest.approx(expected)
    assert bad["params"] == {"prompts": 9}
    with pytest.raises(UserError, match="checker needs the prompt of every picture"):
        evaluate(pixels, metrics=["checker"])
    with pytest.raises(UserError, match="3 prompts for 12 pictures"):
        evaluate(pixels, metrics=["checker"], prompts=prompts[:3])
    with pytest.raises(UserError, match="no network that gives pool"):
        evaluate(pixels, pixels)
    own = {"bright": lambda images, prompts: images.mean(dim=(1, 2, 3))}
    found = evaluate(pixels, scorers=own)["metrics"]  # prompts are not needed
    assert set(found) == {"bright"}
    assert found["bright"]["value"] == pytest.approx(pixels.mean() / 255, rel=1e-6)
    wrong_shape = {"bright": lambda images, prompts: images.mean(dim=(2, 3))}
    with pytest.raises(UserError, match=r"one score per picture, \[12\], not \[12, 3\]"):
        evaluate(pixels, scorers=wrong_shape)


def test_warnings(network: TinyNetwork, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    write(mixed / "a", pictures(4, side=16))
    write(mixed / "b", pictures(3, 1, side=16)[:, :, :8], ".jpg")
    Image.fromarray(pictures(4)[0]).save(mixed / "a" / "again.png")
    (mixed / "note.txt").touch()
    real = np.concatenate([pictures(4), pictures(9, 5)])
    record = evaluate(mixed, real, network=network)
    text = "\n".join(record["warnings"])
    for part in (
        "8 pictures: figures of the FID family are published for 50,000",
        f"2 sizes: 16x16 (5), 8x16 (3), first {mixed / 'b' / '000.jpg'}",
        f"3 pictures are not square ({mixed / 'b' / '000.jpg'})",
        f"1 pictures repeat another one, pixel for pixel ({mixed / 'a' / 'again.png'} is",
        "pictures that are in the reference too: 4",
        f"3 files are lossy ({mixed / 'b' / '000.jpg'})",
        "the classes are unbalanced: 3 pictures of class 1, 5 of class 0",
        f"1 files are no pictures ({mixed / 'note.txt'})",
    ):
        assert part in text, part
    assert record["manifest"]["samples"]["kinds"] == {"PNG RGB": 5, "JPEG RGB": 3}
    few = evaluate(pictures(5), pictures(9, 1), network=network)
    assert any("5 pictures are fewer than the 6 pool features" in w for w in few["warnings"])


def test_what_cannot_be_measured(network: TinyNetwork, tmp_path: Path) -> None:
    real = pictures(9)
    for metrics, message in (
        (["fdi"], 'no metric "fdi". Did you mean fid'),
        ("psrn", 'no metric "psrn". Did you mean psnr'),
        (["fid,isc"], "Put spaces between names"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(real, real, network=network, metrics=metrics)
    with pytest.raises(UserError, match="k is 0, but must be 1 or more"):
        evaluate(real, real, network=network, metrics=["prc"], k=0)
    with pytest.raises(UserError, match=r"k = 9 neighbours need more than 9 pictures .* got 9"):
        evaluate(real, real, network=network, metrics=["prc"], k=9)
    with pytest.raises(UserError, match="stack a list of pictures"):
        evaluate([real[0], real[1]], real, network=network)
    with pytest.raises(UserError, match="there is no file or folder nowhere"):
        evaluate("nowhere", real, network=network)
    with pytest.raises(UserError, match="fid compares with a reference"):
        evaluate(real, network=network)
    with pytest.raises(UserError, match="2 pictures or more are needed, got 1"):
        evaluate(pictures(1), real, network=network)
    with pytest.raises(UserError, match="a reference needs 2 pictures or more, got 1"):
        evaluate(real, pictures(1), network=network)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        evaluate(tmp_path / "empty", real, network=network)
    with pytest.raises(UserError, match="uint8"):
        evaluate(real.astype(np.float32), real, network=network)
    broken = write(tmp_path / "broken", real)
    Image.fromarray(real[0]).save(broken / "bad.jpg")
    (broken / "bad.jpg").write_bytes((broken / "bad.jpg").read_bytes()[:200])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"bad\.jpg is no readable image"):
            evaluate(broken, real, network=network, batch_size=2, num_workers=workers)
    for name, content in (
        ("text.npz", b"not a zip"),
        ("float.npz", np.zeros((3, 4, 4, 3))),
        ("objects.npz", np.array([{}], dtype=object)),
    ):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            np.savez(tmp_path / name, content)
        with pytest.raises(UserError, match=name):
            evaluate(tmp_path / name, real, network=network)

    class Broken(TinyNetwork):
        def __call__(self, images, indices=()):  # type: ignore[no-untyped-def]
            return {tap: value * float("nan") for tap, value in super().__call__(images).items()}

    with pytest.raises(UserError, match="of picture 0 are not finite"):
        evaluate(real, real, network=Broken())


def test_odd_files_are_read_as_a_viewer_shows_them(network: TinyNetwork, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    grey = np.full((8, 8), 128, np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.full((8, 8, 4), (9, 9, 9, 0), np.uint8)).save(folder / "clear.png")
    Image.new("CMYK", (8, 8), (0, 0, 0, 127)).save(folder / "press.jpg", quality=100)
    images = open_images(folder)
    found = {Path(images.name(i)).name: images.load([i])[0] for i in range(3)}
    assert (found["deep.png"] == 128).all()
    assert (found["clear.png"] == 255).all()  # transparent lies over white
    assert found["press.jpg"].shape == (8, 8, 3)
    record = evaluate(folder, network=network, metrics=["vendi"])
    assert record["metrics"]["vendi[adm]"]["value"] > 1
    (warning,) = [w for w in record["warnings"] if "not 8-bit RGB" in w]
    assert warning.startswith("3 files are not 8-bit RGB (CMYK, I;16, RGBA; ")


def test_statistics_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match="no mean"):
        read_statistics(tmp_path / "shapes.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([None]), sigma=np.eye(4))
    with pytest.raises(UserError, match="can be read"):
        read_statistics(tmp_path / "objects.npz")
