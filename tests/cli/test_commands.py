from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale import storage
from nextscale.data.sources import open_source
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ
from nextscale.tokenizers.token_maps import TokenMaps, is_token_maps

CPU = ["--device", "cpu", "--dtype", "float32"]


def encode(run, models, folder, *words):
    return run(
        *("encode", "--tokenizer", models["words"], "--dataset", "scenes", "--resolution", 32),
        *("--num_images", 23, "--num_validation_images", 5, "--shard_size", 10, "--batch_size", 4),
        *("--output_dir", folder, *CPU, *words),
    )


def test_encode_writes_token_maps_that_read_back(run, models, tmp_path):
    result = encode(run, models, tmp_path / "maps", "--json")
    assert result.code == 0, result.err
    assert (result.json["num_train"], result.json["num_validation"]) == (23, 5)
    maps = TokenMaps(tmp_path / "maps")
    assert len(maps) == 23
    assert maps.has_captions
    indices = np.array([22, 0, 9, 10, 3])
    tokens, labels, captions = maps.load(indices)
    source = open_source("scenes", resolution=32, num_images=23)
    batch = source.load(indices)
    tokenizer = MultiscaleVQ.from_pretrained(f"{models['words']}/tokenizer")
    assert tokens.dtype == torch.int64
    assert (tokens == tokenizer.encode(batch.images.float() / 127.5 - 1)).all()
    assert (labels == batch.labels).all()
    assert captions == batch.captions
    maps.check_tokenizer(tokenizer)
    maps.check_tokenizer(tokenizer.to_dtype(torch.bfloat16))
    assert len(TokenMaps(tmp_path / "maps", split="validation")) == 5
    assert len(TokenMaps(tmp_path / "maps", num_images=7)) == 7
    with pytest.raises(IndexError):
        maps.load(np.array([23]))


def test_encode_leaves_out_what_is_no_image(run, models, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    for i in range(3):
        (folder / f"broken{i}.png").write_bytes(b"no image")
    words = ["--tokenizer", models["words"], "--dataset", folder, "--resolution", 32, "--json"]
    result = run("encode", *words, "--output_dir", tmp_path / "maps")
    assert result.code == 0, result.err
    maps = [TokenMaps(tmp_path / "maps", split=split) for split in ("train", "validation")]
    counts = [len(m) for m in maps]
    assert sum(counts) == 40
    assert counts == [result.json["num_train"], result.json["num_validation"]]


def test_encode_refuses(run, models, tmp_path):
    assert encode(run, models, tmp_path / "maps", "--num_validation_images", 0).code == 0
    again = encode(run, models, tmp_path / "maps")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "--overwrite" in again.err
    assert encode(run, models, tmp_path / "maps", "--overwrite").code == 0
    wrong = encode(run, models, tmp_path / "b", "--resolution", 16)
    assert wrong.code == 2
    assert "--resolution 32" in wrong.err
    assert encode(run, models, tmp_path / "b", "--batch_size", -1).code == 2
    assert "/no/x" in encode(run, models, tmp_path / "b", "--dataset", "/no/x").err
    assert not is_token_maps(tmp_path / "b")


def test_token_maps_refuse_damage_and_other_tokenizers(run, models, tmp_path):
    folder = tmp_path / "maps"
    encode(run, models, folder)
    other = MultiscaleVQ.from_pretrained(f"{models['words']}/tokenizer")
    with torch.no_grad():
        other.quantizer.codebook.weight += 1
    with pytest.raises(storage.UserError, match="another tokenizer"):
        TokenMaps(folder).check_tokenizer(other)
    with pytest.raises(storage.UserError, match="no images of the split"):
        TokenMaps(folder, split="test")
    path = folder / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(storage.UserError, match="train-00001"):
        TokenMaps(folder)
    (folder / "index.json").unlink()
    with pytest.raises(storage.UserError, match="no finished token maps"):
        TokenMaps(folder)


def test_reconstruct_prints_psnr_and_usage(run, models, tmp_path):
    words = ["reconstruct", "--tokenizer", models["words"], "--resolution", 32, "--num_images", 8]
    result = run(*words, *CPU, "--output_dir", tmp_path / "rec", "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["num_images"] == 8
    assert {"psnr", "usage", "codes_0", "perplexity_2", "checker_agreement"} <= set(report)
    assert (tmp_path / "rec/reconstructions.png").exists()
    plain = run(*words, *CPU)
    assert plain.code == 0
    assert "perplexity" in plain.out


@pytest.mark.parametrize("pth", [False, True])
def test_convert_there_and_back_gives_equal_tensors(run, models, tmp_path, pth):
    there = run(
        *("convert", "--to", "official", "--model", models["class"]),
        *("--output_dir", tmp_path / "o", *(["--pth"] if pth else [])),
    )
    assert there.code == 0, there.err
    end = "pth" if pth else "safetensors"
    files = [tmp_path / f"o/{name}.{end}" for name in ("transformer", "tokenizer")]
    back = run(
        *("convert", "--from", "official", "--transformer", files[0], "--tokenizer", files[1]),
        *("--scales", 1, 2, 4, "--output_dir", tmp_path / "back"),
    )
    assert back.code == 0, back.err
    assert "cfg=1.5 is --guidance_scale 2.5" in back.out
    one, two = (
        NextScalePipeline.from_pretrained(folder, device="cpu", dtype="float32")
        for folder in (models["class"], tmp_path / "back")
    )
    for part in ("transformer", "tokenizer"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (one, two))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_needs_a_direction(run, tmp_path):
    assert run("convert", "--output_dir", tmp_path / "x").code == 2
    words = ["convert", "--from", "official", "--output_dir", tmp_path / "x"]
    assert "--transformer FILE" in run(*words).err


@pytest.mark.parametrize("mode", ["inpaint", "outpaint", "class"])
def test_edit(run, models, tmp_path, mode):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "in.png")
    words = ["edit", mode, "--image", tmp_path / "in.png", "--box", 0, 0.5, 1, 1, "--seed", 5]
    words += ["--model", models["class"], "--output_dir", tmp_path / "out", *CPU]
    result = run(*words, "--class_label", "owl", "--json")
    assert result.code == 0, result.err
    with Image.open(tmp_path / "out/000000.png") as image:
        assert image.size == (32, 32)
        assert json.loads(image.text["nextscale"])["command"] == f"edit {mode}"
    assert (tmp_path / "out/grid.png").exists()
    again = ["--config", tmp_path / "out/recipe.yaml", "--output_dir", tmp_path / "again"]
    assert run("edit", mode, *again).code == 0
    first, second = (tmp_path / name / "000000.png" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_edit_refuses(run, models, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    words = ["--model", models["class"], "--output_dir", tmp_path / "out", *CPU, "--image"]
    box = ["--box", 0, 0, 1, 1]
    assert "needs what to draw" in run("edit", "class", *words, tmp_path / "in.png", *box).err
    assert "no.png" in run("edit", "inpaint", *words, tmp_path / "no.png", *box).err
    wrong = run("edit", "inpaint", *words, tmp_path / "in.png", "--box", 0.5, 0, 0.5, 1)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_info(run, models):
    machine = run("info", "--json")
    assert {"nextscale", "torch", "device", "dtype auto", "extra train"} <= set(machine.json)
    model = run("info", "--model", models["words"], "--json").json
    assert model["pixels"] == "32x32"
    assert model["default guidance_scale"] == 2.0
    assert "COLOR" in model["grammar"]
    assert len(model["sha256 transformer"]) == 64
    shown = run("info", "--model", models["words"]).out
    assert "a red circle left of a blue square" in shown
    assert run("info", "--model", "nope").code == 2


def test_info_checker(run):
    report = run("info", "--checker", "--num_images", 20, "--json").json
    assert report["n"] == 20
    assert {"true_error", "false_error", "false_kinds"} <= set(report)
    assert "true captions refused" in run("info", "--checker", "--num_images", 20).out


def test_train_tokenizer_and_var_from_flags(run, models, tmp_path):
    pytest.importorskip("accelerate")
    shared = ["--resolution", 16, "--num_images", 8, "--train_batch_size", 4, "--report_to", "none"]
    shared += ["--max_train_steps", 2, "--num_validation_images", 4, "--mixed_precision", "no"]
    size = ["--tokenizer.scales", 1, 2, 4, "--tokenizer.channels", 8, "--tokenizer.norm_groups", 4]
    size += ["--tokenizer.channel_multipliers", 1, 1, 1, "--tokenizer.codebook_size", 16]
    result = run(
        *("train", "tokenizer", "--output_dir", tmp_path / "tok", *shared, *size),
        *("--tokenizer.num_res_blocks", 1, "--quantizer_start", 0, "--json"),
    )
    assert result.code == 0, result.err
    assert result.json["steps"] == 2
    assert "val/psnr" in result.json["metrics"]
    assert "step 2 of 2: loss" in result.err  # no terminal: lines instead of a bar
    var = run(
        *(
            "train",
            "var",
            "--output_dir",
            tmp_path / "var",
            "--tokenizer",
            tmp_path / "tok",
            *shared,
        ),
        *("--transformer.depth", 1, "--transformer.width", 16, "--transformer.num_heads", 2),
        *("--words.grammar", "scenes", "--words.encoder_width", 16, "--json"),
    )
    assert var.code == 0, var.err
    assert "val/loss" in var.json["metrics"]


def test_train_refuses_bad_values_before_any_work(run, tmp_path):
    result = run("train", "tokenizer", "--output_dir", tmp_path / "t", "--learning_rate", -1)
    assert result.code == 2
    assert result.err == "nextscale: error: learning_rate is -1.0, but must be above 0.\n"
    missing = run("train", "tokenizer")
    assert missing.code == 2
    assert "output_dir" in missing.err
    assert not (tmp_path / "t").exists()
