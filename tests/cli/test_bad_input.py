"""Section 9 of the issue: one plain line with the way out, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nextscale import storage
from nextscale.data import images
from nextscale.pipeline import NextScalePipeline

PROMPT = "a red circle left of a blue square"


def assert_plain(result, code: int, *parts: str) -> None:
    assert result.code == code, result.err
    assert result.err.startswith("nextscale: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


@pytest.fixture
def broken(models, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(models["words"], folder)
    return folder


def test_truncated_checkpoint(generate, broken, tmp_path):
    path = broken / "transformer/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = generate(PROMPT, "--model", broken)
    assert_plain(result, 2, "transformer/model.safetensors", "not a whole")
    assert not (tmp_path / "out").exists()


def test_depth_mismatch(generate, broken, tmp_path):
    config = storage.read_json(broken / "transformer/config.json")
    storage.write_json(broken / "transformer/config.json", {**config, "depth": 3})
    assert_plain(generate(PROMPT, "--model", broken), 2, "blocks.2", "is missing", "depth")
    assert not (tmp_path / "out").exists()


def test_schedule_mismatch(generate, broken):
    config = storage.read_json(broken / "tokenizer/config.json")
    storage.write_json(broken / "tokenizer/config.json", {**config, "scales": [1, 3, 4]})
    assert_plain(generate(PROMPT, "--model", broken), 2, "1 2 4", "1 3 4")


def test_missing_weights(generate, broken):
    (broken / "tokenizer/model.safetensors").unlink()
    assert_plain(generate(PROMPT, "--model", broken), 2, "tokenizer/model.safetensors")


@pytest.mark.parametrize("part", ["tokenizer", "transformer", "conditioner"])
def test_a_configuration_with_an_unknown_key(generate, broken, part):
    config = storage.read_json(broken / part / "config.json")
    storage.write_json(broken / part / "config.json", {**config, "colour": 1})
    assert_plain(generate(PROMPT, "--model", broken), 2, part, "colour")


def test_a_conditioner_without_kind(generate, broken):
    config = storage.read_json(broken / "conditioner/config.json")
    del config["kind"]
    storage.write_json(broken / "conditioner/config.json", config)
    assert_plain(generate(PROMPT, "--model", broken), 2, "conditioner/config.json", "no kind")


@pytest.mark.parametrize(
    ("command", "words", "part"),
    [
        ("var", ["--transformer.depth=-1"], "depth is -1, but must be above 0"),
        ("var", ["--transformer.depth", "0"], "depth is 0"),
        ("var", ["--transformer.width=-64"], "width is -64"),
        ("var", ["--transformer.drop_path", "1.5"], "drop_path is 1.5"),
        ("var", ["--words.max_words", "0"], "max_words is 0"),
        ("var", ["--num_validation_images=-1"], "num_validation_images is -1"),
        ("var", ["--label_smoothing", "5"], "label_smoothing is 5"),
        ("var", ["--lora_rank=-3"], "lora_rank is -3"),
        ("var", ["--progressive_fraction", "4"], "progressive_fraction is 4"),
        ("tokenizer", ["--tokenizer.codebook_size=-5"], "codebook_size is -5"),
        ("tokenizer", ["--tokenizer.phi_ratio", "7"], "phi_ratio is 7"),
        ("tokenizer", ["--train_batch_size=-2"], "train_batch_size is -2"),
    ],
)
def test_sizes_that_no_model_can_have(run, tmp_path, command, words, part):
    result = run("train", command, "--output_dir", tmp_path / "out", *words)
    assert_plain(result, 2, part)
    assert not (tmp_path / "out").exists()


class Boom:
    def __reduce__(self):
        return os.system, ("touch /tmp/nextscale-must-not-exist",)


def test_pickle_with_code_is_refused(run, tmp_path):
    torch.save({"pos_1LC": Boom()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Boom()))
    for name in ("evil.pth", "raw.pth"):
        words = ["--transformer", tmp_path / name, "--tokenizer", tmp_path / name]
        result = run("convert", "--from", "official", *words, "--output_dir", tmp_path / "m")
        assert_plain(result, 2, "could run code")
    assert not Path("/tmp/nextscale-must-not-exist").exists()
    assert not (tmp_path / "m").exists()


def test_swapped_or_wrong_checkpoints(run, models, tmp_path):
    run("convert", "--to", "official", "--model", models["class"], "--output_dir", tmp_path / "o")
    vae, var = tmp_path / "o/tokenizer.safetensors", tmp_path / "o/transformer.safetensors"
    words = ["convert", "--from", "official", "--output_dir", tmp_path / "m"]
    swapped = run(*words, "--transformer", vae, "--tokenizer", var, "--scales", 1, 2, 4)
    assert_plain(swapped, 2, "swapped")
    unknown = run(*words, "--transformer", var, "--tokenizer", vae)
    assert_plain(unknown, 2, "21 positions", "scales")
    wrong = run(*words, "--transformer", var, "--tokenizer", vae, "--scales", 1, 2, 3)
    assert_plain(wrong, 2, "14 tokens", "21 positions")
    absent = run(*words, "--transformer", tmp_path / "no.pth", "--tokenizer", vae)
    assert_plain(absent, 2, "no.pth")
    assert not (tmp_path / "m").exists()


def test_unknown_model(generate, tmp_path):
    assert_plain(generate(PROMPT, "--model", "scense"), 2, "scense", "bundled name")
    assert not (tmp_path / "out").exists()


def test_prompt_outside_the_grammar_shows_it(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(NextScalePipeline, "from_pretrained", None)  # fails before the model loads
    result = generate("a pink circle")
    assert result.code == 2
    assert 'the word "pink" is not in it' in result.err.splitlines()[0]
    assert "COLOR    = red | green" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--class_labels", "4"], ["class label 4", "0 to 3"]),
        (["--class_labels=-1"], ["class label -1"]),
        (["--class_labels", "emu"], ['"emu"', "cat, dog"]),
        (["--prompt", PROMPT], ["takes class_labels"]),
        ([], ["needs class_labels", "--class_labels 0 1"]),
        (["--class_labels", "0", "--top_p", "0"], ["top_p must be in (0, 1]", "1.0"]),
        (["--class_labels", "0", "--top_k", "-1"], ["top_k must be 0"]),
        (["--class_labels", "0", "--temperature", "inf"], ["temperature must be positive and f"]),
        (["--class_labels", "0", "--lora", "x", "--lora_scale", "nan"], ["lora_scale"]),
        (["--class_labels", "0", "--device", "meta"], ['device "meta" cannot be used here']),
        (["--class_labels", "0", "--temperature", "0"], ["temperature must be positive"]),
        (["--class_labels", "0", "--num_images", "-4"], ["num_images must be 1 or more, got -4"]),
        (["--class_labels", "0", "--num_images", "0"], ["num_images must be 1 or more, got 0"]),
        (["--class_labels", "0", "--batch_size", "-1"], ["batch_size must be 1 or more"]),
        (["--class_labels", "0", "--seed", "4294967296"], ["seed"]),
        (["--class_labels", "0", "--seed", "-3"], ["seed must be -1 (random)"]),
        (["--class_labels", "0", "--dtype", "int8"], ["dtype must be auto"]),
        (["--class_labels", "0", "--device", "gpu"], ['device "gpu" is unknown']),
        (["--class_labels", "0", "--guidance_scale", "1", "2"], ["each of the 3 scales"]),
        (["--class_labels", "0", "--lora", "/no/lora"], ["/no/lora"]),
        (["--class_labels", "0", "--lora_scale", "0.5"], ["--lora_scale", "missing"]),
        (["--class_labels", "0", "--negative_prompt", "x"], ["takes prompts"]),
        (["--class_labels", "0", "--resume", "--overwrite"], ["pass one"]),
        (["--prompt_file", "/no/file"], ["/no/file"]),
    ],
)
def test_bad_values(generate, models, tmp_path, words, parts):
    assert_plain(generate("--model", models["class"], *words), 2, *parts)
    assert not (tmp_path / "out").exists()


def test_output_folder_is_a_file(generate, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert_plain(generate(PROMPT), 2, "is a file", "Choose another folder")
    assert_plain(generate(PROMPT, "--output_dir", tmp_path / "out/deeper"), 2, "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_folder_without_permission(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert_plain(generate(PROMPT), 2, "no permission", "Choose another folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_output_folder_that_cannot_be_made(generate):
    assert_plain(generate(PROMPT, "--output_dir", "/proc/nextscale"), 1, "another output folder")


def test_full_disk_keeps_what_is_finished(generate, tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full(source, target):
        if str(target).endswith(".png"):
            if len(written) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = generate(PROMPT, "--num_images", 6, "--seed", 0)
    assert_plain(result, 1, "No space left", "Free some space")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:06d}.png" for i in range(3)]
    assert leftovers(out) == []
    monkeypatch.undo()
    assert generate(PROMPT, "--num_images", 6, "--seed", 0, "--resume").code == 0
    assert len(list(out.glob("0*.png"))) == 6


def test_ctrl_c_keeps_finished_images(generate, tmp_path, monkeypatch):
    save, count = images.save_png, [0]

    def interrupted(*args, **keywords):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        save(*args, **keywords)

    monkeypatch.setattr(images, "save_png", interrupted)
    words = [PROMPT, "--num_images", 6, "--seed", 0]
    result = generate(*words)
    out = tmp_path / "out"
    assert result.code == 1
    assert result.err == (
        f"nextscale: interrupted; 3 images kept in {out}, continue with --resume\n"
    )
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:06d}.png" for i in range(3)]
    assert leftovers(out) == []
    monkeypatch.undo()
    assert generate(*words, "--resume").code == 0
    assert len(list(out.glob("0*.png"))) == 6


def test_ctrl_c_before_the_first_image(generate, monkeypatch):
    def interrupted(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("nextscale.cli.job.read_model", interrupted)
    assert generate(PROMPT).err == "nextscale: interrupted\n"


def test_overwrite_deletes_nothing_before_all_is_known_to_be_good(generate, models, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(models["words"], broken)
    path = broken / "transformer/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert generate(PROMPT, "--num_images", 3).code == 0
    for words in (["--guidance_scale", 1, 2], ["--model", broken]):
        assert generate(PROMPT, "--overwrite", *words).code == 2
        assert len(list(out.glob("0*.png"))) == 3
    assert generate(PROMPT, "--overwrite").code == 0
    assert len(list(out.glob("0*.png"))) == 1


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("generation_config.json", {"foo": 1}, "foo"),
        ("generation_config.json", {"top_p": "x"}, "generation_config.json"),
        ("tokenizer/config.json", {"scales": "x"}, "scales must be sides such as 1 2 3 4"),
    ],
)
def test_damaged_configurations_name_their_file(generate, broken, file, changes, part):
    storage.write_json(broken / file, {**storage.read_json(broken / file), **changes})
    assert_plain(generate(PROMPT, "--model", broken), 2, part)


def test_released_files_of_other_shapes(run, models, tmp_path):
    run("convert", "--to", "official", "--model", models["class"], "--output_dir", tmp_path / "o")
    files = {name: tmp_path / f"o/{name}.safetensors" for name in ("transformer", "tokenizer")}
    flat = torch.zeros(3)
    for name, key, value in (
        ("transformer", "pos_1LC", flat),
        ("transformer", "word_embed.weight", flat),
        ("transformer", "class_emb.weight", torch.zeros(1, 16)),
        ("tokenizer", "quantize.embedding.weight", flat),
        ("tokenizer", "encoder.down.1.block.0.conv1.weight", None),
        ("tokenizer", "encoder.conv_in.weight", torch.zeros(0, 3, 3, 3)),
    ):
        state = storage.read_tensors(files[name])
        state = {k: v for k, v in {**state, key: value}.items() if v is not None}
        bad = {**files, name: tmp_path / "bad.safetensors"}
        storage.write_tensors(bad[name], state)
        words = [word for part, path in bad.items() for word in (f"--{part}", path)]
        words += ["--scales", 1, 2, 4, "--output_dir", tmp_path / "m"]
        result = run("convert", "--from", "official", *words)
        assert_plain(result, 2)
        assert not (tmp_path / "m").exists()


def test_convert_leaves_no_half_result_on_a_full_disk(run, models, tmp_path, monkeypatch):
    write, count = storage.write_tensors, [0]

    def full(path, *args, **keywords):
        count[0] += 1
        if count[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *args, **keywords)

    monkeypatch.setattr(storage, "write_tensors", full)
    words = ["convert", "--to", "official", "--model", models["class"], "--output_dir"]
    assert_plain(run(*words, tmp_path / "o"), 1, "No space left")
    assert not (tmp_path / "o").exists()


def test_convert_replaces_models_only(run, models, tmp_path):
    words = ["convert", "--to", "official", "--model", models["class"], "--overwrite"]
    (tmp_path / "notes.txt").write_text("mine")
    assert_plain(run(*words, "--output_dir", tmp_path), 2, "not empty. Choose another folder.")
    assert (tmp_path / "notes.txt").exists()
    assert run(*words, "--output_dir", tmp_path / "o").code == 0
    assert run(*words, "--output_dir", tmp_path / "o").code == 0


def test_training_refuses_a_list_of_another_length_before_the_first_step(run, tmp_path):
    words = ["--max_train_steps", 1, "--transformer.depth", 1, "--transformer.width", 16]
    words += ["--transformer.num_heads", 1, "--num_images", 8, "--output_dir", tmp_path / "out"]
    words += ["--dataset", "scenes", "--resolution", 64]
    result = run("train", "var", *words, "--generation.guidance_scale", 1, 2)
    assert_plain(result, 2, "guidance_scale needs one value for each of the 6 scales")
    result = run("train", "var", *words, "--progressive_start", 9, "--progressive_fraction", 0.5)
    assert_plain(result, 2, "progressive_start is 9, but must be below 5")
    assert not (tmp_path / "out").exists()


def test_other_failures_are_one_line_and_debug_shows_the_traceback(generate, monkeypatch):
    def fail(*args, **keywords):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(NextScalePipeline, "__call__", fail)
    result = generate(PROMPT)
    assert_plain(result, 1, "RuntimeError: first line", "--debug")
    result = generate(PROMPT, "--debug")  # what failed left no picture, so nothing is in the way
    assert result.code == 1
    assert "Traceback" in result.err


def test_out_of_memory_says_what_to_lower(generate, monkeypatch):
    def fail(*args, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(NextScalePipeline, "__call__", fail)
    assert_plain(generate(PROMPT), 1, "smaller --batch_size")
