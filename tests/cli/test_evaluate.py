"""`nextscale eval` and its relatives, with random weights in place of Inception's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from nextscale.data.benchmark import load_benchmark

pytest.importorskip("torch_fidelity")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("fake", 6), ("real", 5)):
        (tmp_path / name).mkdir()
        for index in range(count):
            pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


WEIGHTS = ("--random_weights", 0, "--num_workers", 0, "--device", "cpu")


def test_eval_prints_a_table_and_writes_the_record(run, folders):
    words = ["--samples", folders / "fake", "--reference", folders / "real", *WEIGHTS]
    out = folders / "r.json"
    result = run("eval", *words, "--metrics", "fid", "sfid", "isc", "kid", "--output", out)
    assert result.code == 0, result.err
    for part in ("fid[adm]", "sfid[adm]", "isc[adm]", "kid[adm]", "lower", "higher"):
        assert part in result.out
    assert "random weights; the figures mean nothing" in result.err
    assert "warning: 6 pictures are fewer than the 2048 pool features" in result.err
    record = json.loads(out.read_text())
    assert record["valid"] is False
    assert record["metrics"]["fid[adm]"]["n_gen"] == 6
    assert record["metrics"]["fid[adm]"]["n_ref"] == 5
    assert record["manifest"]["network"]["resize"] == "tf1"
    assert record["manifest"]["samples"]["sizes"] == {"24x24": 6}


def test_eval_stats_are_a_reference(run, folders):
    stats = folders / "ref.npz"
    made = run("eval", "stats", "--samples", folders / "real", "--output", stats, *WEIGHTS)
    assert made.code == 0, made.err
    words = ["eval", "--samples", folders / "fake", "--metrics", "fid", "--json", *WEIGHTS]
    by_stats = run(*words, "--reference", stats).json["metrics"]["fid[adm]"]
    by_pictures = run(*words, "--reference", folders / "real").json["metrics"]["fid[adm]"]
    assert by_stats["value"] == pytest.approx(by_pictures["value"], rel=1e-9)
    small = folders / "small.npz"
    for part in ("fake", "real"):
        for path in (folders / part).iterdir():
            Image.open(path).resize((64, 64)).save(path)
    words_of = ["--features", "scenes", "--device", "cpu"]
    made = run("eval", "stats", "--samples", folders / "real", "--output", small, *words_of)
    assert made.code == 0, made.err
    scenes = ["eval", "--samples", folders / "fake", "--metrics", "fd_scenes", "--json"]
    both = [run(*scenes, "--reference", r, "--device", "cpu") for r in (small, folders / "real")]
    found = [r.json["metrics"]["fd_scenes"]["value"] for r in both]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    count = run("eval", "--samples", folders / "fake", "--num_images", 3, "--metrics", "vendi")
    assert (count.code, "--num_images is for --model" in count.err) == (2, True)
    other = run(*words, "--reference", stats, "--protocol", "clean")
    assert other.code == 2
    assert "protocol adm, not clean" in other.err


def test_eval_pack(run, folders):
    packed = folders / "p.npz"
    result = run("eval", "pack", "--samples", folders / "fake", "--output", packed)
    assert result.code == 0, result.err
    with np.load(packed) as file:
        assert file["arr_0"].shape == (6, 24, 24, 3)
    for source in (folders / "fake", packed):
        words = ("eval", "--samples", source, "--metrics", "vendi", "--json", *WEIGHTS)
        hashes = {run(*words).json["manifest"]["samples"]["pixels_sha256"]}
    assert len(hashes) == 1
    for kind in ("a", "b"):
        (folders / "classes" / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folders / "classes" / kind / "x.jpg")
    labelled = run("eval", "pack", "--samples", folders / "classes", "--output", packed)
    assert "warning: 2 files are lossy" in labelled.err
    with np.load(packed) as file:
        assert file["arr_1"].tolist() == [0, 1]
    wrong = run("eval", "pack", "--samples", folders / "fake", "--output", packed, "--count", 9)
    assert (wrong.code, "has 6 pictures, not 9" in wrong.err) == (2, True)
    Image.new("RGB", (8, 8)).save(folders / "fake" / "x.png")
    mixed = run("eval", "pack", "--samples", folders / "fake", "--output", packed)
    assert (mixed.code, "x.png is 8x8, the first is 24x24" in mixed.err) == (2, True)


def test_eval_of_a_model_and_of_its_pictures(run, models, tmp_path):
    words = ["eval", "--metrics", "checker", "--json", "--device", "cpu"]
    drawn = run(*words, "--model", "scenes", "--num_images", 4, "--seed", 5)
    assert drawn.code == 0, drawn.err
    assert drawn.json["metrics"]["checker"]["n_gen"] == 4
    assert drawn.json["manifest"]["generation"]["seed"] == 5
    assert len(drawn.json["manifest"]["weights"]) == 64
    folder = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(load_benchmark("standard")[:4]))
    generated = run(
        *(
            "generate",
            "--prompt_file",
            prompts,
            "--seed",
            5,
            "--output_dir",
            folder,
            "--device",
            "cpu",
        )
    )
    assert generated.code == 0, generated.err
    (folder / "grid.png").unlink()
    for more in ([], ["--prompts", prompts]):
        read = run(*words, "--samples", folder, *more)
        assert read.code == 0, read.err
        assert read.json["metrics"] == drawn.json["metrics"]
    (folder / "note.png").write_bytes((folder / "000000.png").read_bytes())
    Image.new("RGB", (64, 64)).save(folder / "other.png")
    silent = run(*words, "--samples", folder)
    assert (silent.code, "other.png does not say its prompt" in silent.err) == (2, True)
    neither = run("eval", "--metrics", "checker")
    assert (neither.code, "pass --samples FOLDER or --model NAME" in neither.err) == (2, True)
    both = run("eval", "--metrics", "checker", "--samples", folder, "--model", "scenes")
    assert (both.code, "not both" in both.err) == (2, True)
    early = run(*words, "--model", "scenes", "--output", folder / "000000.png" / "x.json")
    assert (early.code, "cannot write" in early.err) == (2, True)
    none = run(*words, "--model", "scenes", "--num_images", 0)
    assert (none.code, "num_images must be 1 or more" in none.err) == (2, True)
    classes = run(*words[:1], "--model", models["class"], "--metrics", "vendi", *WEIGHTS, "--json")
    assert classes.json["metrics"]["vendi[adm]"]["n_gen"] == 200


def test_eval_compare(run, tmp_path):
    for name, value in (("a", 3.0), ("b", 2.5)):
        entry = {"value": value, "se": 0.3, "n_gen": 9}
        record = {"metrics": {"fid[adm]": entry, f"only[{name}]": entry}, "valid": name == "a"}
        record["manifest"] = {"network": {"weights": name}, "reference": "same"}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    result = run("eval", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert set(result.json) == {"fid[adm]"}
    assert result.json["fid[adm]"]["difference"] == -0.5
    assert result.json["fid[adm]"]["se"] == pytest.approx(0.3 * 2**0.5)
    assert "b.json was made with random weights" in result.err
    assert "the two have another network" in result.err
    assert "another reference" not in result.err
    (tmp_path / "c.json").write_text("[]")
    other = run("eval", "compare", tmp_path / "a.json", tmp_path / "c.json")
    assert (other.code, "no result of nextscale eval" in other.err) == (2, True)


def test_eval_without_weights_says_every_way_out(run, folders, monkeypatch):
    for name in ("NEXTSCALE_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(folders / name))
    monkeypatch.delenv("NEXTSCALE_INCEPTION", raising=False)
    words = ["eval", "--samples", folders / "fake", "--reference", folders / "real"]
    result = run(*words)
    assert result.code == 1
    assert result.err.count("\n") == 1
    for part in (
        *("weights-inception-2015-12-05-6726825d.pth", "6726825d", "torch-fidelity", "pytorch-fid"),
        *("--weights", "NEXTSCALE_INCEPTION", "--download", str(folders / "NEXTSCALE_CACHE")),
    ):
        assert part in result.err
    absent = run(*words, "--weights", "no.pth")
    assert (absent.code, "no.pth, which is not there" in absent.err) == (2, True)


def test_the_scenes_preset(run, tmp_path):
    words = ["eval", "--preset", "scenes", "--num_images", 40, "--num_reference", 80, "--json"]
    result = run(*words, "--device", "cpu", "--num_candidates", 1, "--plot", tmp_path / "plots")
    assert result.code == 0, result.err
    found = result.json["metrics"]
    assert {
        "checker",
        "fd_scenes",
        "clip_cosine[scenes-clip]",
        "recall_scenes",
        "vendi_scenes",
    } <= (set(found))
    assert found["checker"]["n_gen"] == 40
    assert found["fd_scenes"]["n_ref"] == 80
    assert result.json["manifest"]["preset"] == "scenes"
    assert result.json["manifest"]["generation"]["num_candidates"] == 1
    assert (tmp_path / "plots" / "extremes.png").is_file()
    true = run(*words, "--samples", "scenes", "--device", "cpu")
    assert true.code == 0, true.err
    best = true.json["metrics"]
    assert best["checker"]["value"] == 1
    assert best["fd_scenes"]["value"] < found["fd_scenes"]["value"]
    name = "clip_cosine[scenes-clip]"
    assert best[name]["value"] > found[name]["value"]


def test_the_tokenizer_preset(run):
    words = ["eval", "--preset", "tokenizer", "--num_images", 24, "--json", "--device", "cpu"]
    result = run(*words)
    assert result.code == 0, result.err
    found = result.json["metrics"]
    assert 28 < found["psnr"]["value"] < 36
    assert found["checker"]["value"] > 0.9
    assert found["fd_scenes"]["n_ref"] == 24
    both = run(*words, "--samples", "scenes")
    assert (both.code, "--reconstruct goes with --model" in both.err) == (2, True)


def test_the_imagenet_preset_checks_first(run, folders):
    words = ["eval", "--preset", "var-imagenet256", "--samples", folders / "fake", *WEIGHTS]
    none = run(*words)
    assert (none.code, "compare with a reference" in none.err) == (2, True)
    folder = run(*words, "--reference", folders / "real")
    assert (folder.code, "must be VIRTUAL_imagenet256_labeled.npz" in folder.err) == (2, True)
    pixels = np.zeros((10_000, 1, 1, 3), np.uint8)
    np.savez(folders / "adm.npz", arr_0=pixels, mu=[0], sigma=[0], mu_s=[0], sigma_s=[0])
    few = run(*words, "--reference", folders / "adm.npz")
    assert few.code == 2
    for flag, value in (("--protocol", "clean"), ("--k", 9), ("--precision", "bf16")):
        other = run(*words, "--reference", folders / "adm.npz", flag, value)
        assert (other.code, f"has {flag[2:]} " in other.err) == (2, True), other.err
    assert "takes 50000 pictures, 50 of each of 1000 classes; these are 6" in few.err


def test_drawn_pictures_are_saved(run, tmp_path):
    words = ["eval", "--model", "scenes", "--metrics", "checker", "--num_images", 3, "--json"]
    words += ["--device", "cpu", "--num_candidates", 1, "--save_images", tmp_path / "kept"]
    first = run(*words)
    assert first.code == 0, first.err
    assert len(list((tmp_path / "kept").glob("*.png"))) == 3
    assert run(*words).json["metrics"] == first.json["metrics"]
    # The pictures say their prompts.
    read = run("eval", "--samples", tmp_path / "kept", "--metrics", "checker", "--json")
    assert read.json["metrics"] == first.json["metrics"]
    other = run(*words, "--seed", 9)
    assert (other.code, "another model, number or other settings" in other.err) == (2, True)
    for size in (1, 2):  # what is drawn does not depend on the batches of the pass
        fresh = run(*words[:-1], tmp_path / f"fresh{size}", "--batch_size", size)
        hashes = [r.json["manifest"]["samples"]["pixels_sha256"] for r in (first, fresh)]
        assert hashes[0] == hashes[1]


def test_reconstruction_names_a_broken_file(run, folders):
    for index in range(45):  # of which the validation part is two
        (folders / "real" / f"{index}.png").write_bytes(b"\x89PNG and no more")
    words = ["eval", "--model", "scenes", "--metrics", "psnr", "--device", "cpu"]
    result = run(*words, "--reconstruct", folders / "real")
    assert result.code == 2
    assert "is no readable image" in result.err
    both = run(*words, "--reconstruct", "scenes", "--save_images", folders / "x")
    assert (both.code, "--save_images keeps drawn pictures" in both.err) == (2, True)


def test_clip_needs_prompts(run, folders):
    words = ["eval", "--samples", folders / "fake", "--metrics", "clip", "--device", "cpu"]
    silent = run(*words, "--clip_model", "scenes-clip")
    assert (silent.code, "does not say its prompt" in silent.err) == (2, True)
    (folders / "few.txt").write_text('{"file_name": "0.png"}\n')
    lines = run(*words, "--clip_model", "scenes-clip", "--prompts", folders / "few.txt")
    assert (lines.code, "holds JSON, not one prompt per line" in lines.err) == (2, True)
    (folders / "few.txt").write_text("a red circle\n")
    few = run(*words, "--clip_model", "scenes-clip", "--prompts", folders / "few.txt")
    assert (few.code, "1 prompts for 6 pictures" in few.err) == (2, True)
    text = "\n".join(["a red circle"] * 5 + ["a blue square and " * 20])
    (folders / "all.txt").write_text(text)
    found = run(*words, "--clip_model", "scenes-clip", "--prompts", folders / "all.txt", "--json")
    assert found.code == 0, found.err
    assert "1 prompts are longer than scenes-clip reads, and were cut" in found.json["warnings"]


def test_eval_geneval(run, tmp_path):
    lines = [
        {"tag": "counting", "prompt": "two red circles"},
        {"tag": "x", "prompt": "a red cross"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["eval", "geneval", "--prompts", tmp_path / "p.jsonl", "--device", "cpu", "--json"]
    drawn = run(*words, "--output_dir", tmp_path / "out", "--num_images", 2, "--num_candidates", 1)
    assert drawn.code == 0, drawn.err
    assert drawn.json["drawn"] == 4
    assert (tmp_path / "out" / "00001" / "samples" / "0001.png").is_file()
    rows = [{"tag": "a", "prompt": "p", "correct": c} for c in (True, False)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summed = run("eval", "geneval", "--results", tmp_path / "r.jsonl", "--json")
    assert summed.json["score"] == 0.5
    (tmp_path / "r.jsonl").write_text('{"tag": "a"}')
    bad = run("eval", "geneval", "--results", tmp_path / "r.jsonl")
    assert (bad.code, "is no result of GenEval" in bad.err) == (2, True)
    neither = run("eval", "geneval")
    assert (neither.code, "pass --prompts FILE to draw" in neither.err) == (2, True)
