"""`nextscale extract`, `generate --control_image`, `eval --preset control`, `train control`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.control import AdditiveConfig, ControlRecord, build_control
from nextscale.control.encoder import EncoderConfig
from nextscale.data.images import save_png
from nextscale.data.scenes import render, sample_scene
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.var.lora import base_fingerprint

PROMPT = "a red circle left of a blue square"
GIVEN = "--control_image MAP --control_type canny"
pytest.importorskip("cv2")


@pytest.fixture(scope="session")
def controlled(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny prompt model with two random control modules."""
    pipe = NextScalePipeline.from_pretrained(models["words"], dtype="float32")
    folder = tmp_path_factory.mktemp("controlled")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in ("canny", "depth"):
            record = ControlRecord(
                type=kind,
                resolution=(32, 32),
                base_fingerprint=base_fingerprint(pipe.transformer),
                extractor={"spec": kind, "settings": {}},
            )
            sizes = AdditiveConfig(encoder=EncoderConfig(width=16, depth=1, heads=2), num_sites=2)
            module = build_control(sizes, pipe.transformer.config, record)
            for parameter in module.parameters():
                parameter.data += torch.randn_like(parameter) * 0.5
            module.save_pretrained(folder / kind)
            pipe.load_control(folder / kind)
    pipe.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(render([sample_scene(1, i) for i in range(3)], 32)):
        save_png(image, tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "000000.png"))


def test_extract_writes_maps_and_how_they_were_made(run, photos, tmp_path) -> None:
    result = run(
        "extract", photos, "--type", "canny", "--low", 20, "--output_dir", tmp_path / "m", "--json"
    )
    assert result.code == 0, result.err
    assert result.json["num_maps"] == 3
    record = json.loads((tmp_path / "m" / "extractor.json").read_text())
    assert record["settings"] == {"low": 20.0, "high": 200}
    with Image.open(tmp_path / "m" / "1.png") as map_:
        assert map_.size == (32, 32)
        assert set(np.unique(np.asarray(map_))) <= {0, 255}
        assert json.loads(map_.info["nextscale"])["name"] == "opencv Canny"


def test_control_changes_pictures_and_strength_zero_does_not(
    generate, controlled, run, photos, tmp_path
) -> None:
    run("extract", photos / "0.png", "--output_dir", tmp_path / "m")
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    save_png(left, tmp_path / "mask.png")
    words = [PROMPT, "--model", controlled, "--seed", 3]
    flags = ["--control_image", tmp_path / "m" / "0.png", "--control_type", "canny"]
    pictures = []
    for name, more in {
        "plain": [],
        "off": [*flags, "--control_scale", 0],
        "on": flags,
        "photo": [*flags, "--control_extract", "--control_image", photos / "0.png"],
        "guess": [*flags, "--guess_mode"],
        "text": [*flags, "--control_in_negative"],
        "knobs": [*flags, "--control_guidance_scale", 4],
        "late": [*flags, "--control_start", 2],
        "early": [*flags, "--control_end", 2],
        "left": [*flags, "--control_mask", tmp_path / "mask.png"],
    }.items():
        result = generate(*words, "--output_dir", tmp_path / name, *more)
        assert result.code == 0, result.err
        pictures.append(pixels(tmp_path / name))
    plain, off, on, photo, *others = pictures
    assert (plain == off).all()
    assert (on == photo).all()
    assert (on != plain).any()
    for other in others:
        assert (other != plain).any()
        assert (other != on).any()
    recipe = (tmp_path / "on" / "recipe.yaml").read_text()
    assert "control_type" in recipe
    again = run(
        "generate", "--config", tmp_path / "on" / "recipe.yaml", "--output_dir", tmp_path / "again"
    )
    assert again.code == 0, again.err
    assert (pixels(tmp_path / "again") == on).all()


def test_control_alone_needs_no_prompt(generate, controlled, run, photos, tmp_path) -> None:
    words = ["--model", controlled, "--seed", 3, "--num_images", 3, "--batch_size", 2]
    flags = ["--control_image", photos / "0.png", "--control_type", "depth", "--guess_mode"]
    result = generate(*words, *flags, "--output_dir", tmp_path / "a")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "a").glob("00*.png"))) == 3
    recipe = tmp_path / "a" / "recipe.yaml"
    again = run("generate", "--config", recipe, "--output_dir", tmp_path / "b")
    assert again.code == 0, again.err
    assert (pixels(tmp_path / "a") == pixels(tmp_path / "b")).all()
    refused = generate("--model", controlled, "--output_dir", tmp_path / "c")
    assert "needs a prompt" in refused.err


def test_maps_are_read_once_for_all_batches(generate, controlled, photos, tmp_path) -> None:
    save_png(np.zeros((16, 16, 3), np.uint8), tmp_path / "small.png")
    flags = ["--control_image", tmp_path / "small.png", "--control_type", "canny"]
    result = generate(PROMPT, "--model", controlled, "--num_images", 6, "--batch_size", 2, *flags)
    assert result.code == 0, result.err
    assert result.err.count("is resized to") == 1


def test_a_training_recipe_can_be_run_again(run, tmp_path) -> None:
    flags = ["--control_type", "canny", "--extractor.low", 50, "--output_dir", tmp_path / "r"]
    printed = run("train", "control", *flags, "--print_config")
    assert printed.code == 0, printed.err
    (tmp_path / "recipe.yaml").write_text(printed.out)
    again = run("train", "control", "--config", tmp_path / "recipe.yaml", "--print_config")
    assert again.code == 0, again.err
    assert again.out == printed.out
    assert "low: 50" in printed.out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_fused_model_keeps_its_controls(controlled, dtype, tmp_path) -> None:
    """Saved after a LoRA was fused, or in float16: the controls belong to the new weights."""
    from nextscale.var.lora import add_lora, save_lora

    tuned = NextScalePipeline.from_pretrained(controlled, dtype="float32")
    add_lora(tuned.transformer, rank=2)
    for name, parameter in tuned.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    settings = {"rank": 2, "alpha": None, "target_modules": ["qkv", "proj", "fc1", "fc2"]}
    save_lora(tuned.transformer, tmp_path / "lora", settings)
    pipe = NextScalePipeline.from_pretrained(controlled, dtype="float32")
    pipe.load_lora(tmp_path / "lora")
    pipe.control("canny")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused", dtype=getattr(torch, dtype))
    again = NextScalePipeline.from_pretrained(tmp_path / "fused", dtype=dtype)
    assert again.control("depth").record.type == "depth"
    again.to(dtype="float32")
    image = torch.zeros(3, 32, 32)
    found = again(PROMPT, control_image=image, control_type="canny", seed=0, output_type="pt")
    if dtype == "float32":
        same = pipe(PROMPT, control_image=image, control_type="canny", seed=0, output_type="pt")
        assert torch.equal(same.tokens, found.tokens)


def test_a_prefix_is_scored_under_its_control(controlled) -> None:
    """With candidates that begin with tokens of their own, the likeliest under control is kept."""
    from nextscale.control import ControlHooks
    from nextscale.control.maps import as_controls

    pipe = NextScalePipeline.from_pretrained(controlled, dtype="float32")
    prefix = torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(0))
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = {"control_image": image, "control_type": "canny", "control_scale": 3.0}
    drawn = pipe(PROMPT, **given, start=prefix, num_candidates=4, seed=0, output_type="pt").tokens
    ids = pipe.transformer.conditioner.tokenize([PROMPT] * 4)
    (part,) = pipe._attach(as_controls(image, "canny", 3.0), 1, 4)
    hooks = ControlHooks(pipe.transformer, [part], cached=False)
    scores = pipe._prefix_score(ids, prefix, [part])
    inputs = pipe.tokenizer.teacher_inputs(torch.nn.functional.pad(prefix, (0, 16)))[:, :4]
    with torch.no_grad():
        logits = pipe.transformer(inputs, ids=ids, num_scales=2, hooks=hooks)
    by_hand = logits.log_softmax(-1).gather(2, prefix[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(scores, by_hand)
    assert any(torch.equal(drawn[0, :5], row) for row in prefix)


def test_two_controls_and_a_module_of_one_s_own(generate, controlled, models, photos, tmp_path):
    module = Path(controlled) / "controls" / "canny"
    image = photos / "0.png"
    two = ["--control_image", image, image, "--control_type", "canny", "depth"]
    both = generate(PROMPT, "--model", controlled, "--seed", 1, *two, "--control_scale", 1, 0)
    assert both.code == 0, both.err
    one = ["--control", module, "--control_image", image, "--control_type", "canny"]
    alone = generate(PROMPT, "--seed", 1, *one, "--output_dir", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert (pixels(tmp_path / "out") == pixels(tmp_path / "alone")).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--control_image MAP", "1 control images and 0 control types"),
        ("--control_type canny", "0 control images and 1 control types"),
        ("--control_image nowhere.png --control_type canny", "nowhere.png is no file"),
        ("--control_image MAP --control_type pose", 'no control "pose" (loaded: canny, depth)'),
        (f"{GIVEN} --control_scale 99", "control_scale is 99"),
        (f"{GIVEN} --control_start 7", "they must lie in 0..3"),
        (f"{GIVEN} --control_scale 1 1", "2 values of control_scale, 1 of control_image; pass one"),
        ("--control_image WIDE --control_type canny", "another aspect"),
        ("--guess_mode", "guess_mode needs --control_image"),
        ("--control_scale 0.5", "control_scale needs --control_image"),
        ("--control_mask MAP", "control_mask needs --control_image"),
        ("--control_scale", "control_scale has no value"),
        ("--control_guidance_scale 2", "control_guidance_scale needs --control_image"),
        (f"{GIVEN} --control /nowhere", "/nowhere is no control module"),
        (f"{GIVEN} --control EMPTY", "holds no control module"),
        (f"{GIVEN} --control_mask WIDE", "control mask has 64 x 16 pixels, another aspect"),
        (f"{GIVEN} --control_mask nowhere.png", "control_mask: nowhere.png is no file"),
        ("--control EMPTY", "control needs --control_image"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags, message, generate, controlled, photos, tmp_path
) -> None:
    save_png(np.zeros((16, 64, 3), np.uint8), tmp_path / "wide.png")
    (tmp_path / "empty").mkdir()
    places = {"MAP": photos / "0.png", "WIDE": tmp_path / "wide.png", "EMPTY": tmp_path / "empty"}
    words = [places.get(word, word) for word in flags.split()]
    result = generate(PROMPT, "--model", controlled, *words)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) <= 2  # a warning may stand before it
    assert not (tmp_path / "out").exists()


def test_calls_that_contradict_themselves_are_refused(controlled: str) -> None:
    from nextscale.control import Control, attach

    pipe = NextScalePipeline.from_pretrained(controlled, dtype="float32")
    map_ = torch.zeros(3, 32, 32)
    map_[:, 8] = 1
    given: dict[str, Any] = {"prompt": [PROMPT] * 4, "num_candidates": 1, "output_type": "pt"}
    control = Control(image=map_, type="canny")
    two = attach(pipe.control("canny"), torch.stack([map_] * 2), control)
    for wrong, message in (
        ({"controls": [control], "control_scale": 0.0}, "control_scale, not both"),
        ({"controls": control}, "controls is a list"),
        ({"controls": [two]}, "has 2 pictures, the call draws 4 images"),
        ({"control_type": [], "control_image": []}, r"control_type is \[\]"),
        ({"control_type": 3, "control_image": map_}, "control_type is 3"),
        ({"controls": [replace(control, end_scale=2.5)]}, "whole numbers, got 2.5"),
        ({"controls": [replace(control, start_scale=None)]}, "whole numbers, got None"),
        ({"controls": [replace(control, strength={"a": 1.0, 3: 1.0})]}, "names the blocks"),
        ({"control_type": "canny", "control_image": map_[:, :0]}, "has the shape"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**given, **wrong)
    with pytest.raises(UserError, match="control_guidance_scale needs a control"):
        pipe.edit(map_[None], box=(0, 0, 8, 8), control_guidance_scale=7)
    with pytest.raises(UserError, match="cannot name a control"):
        pipe.load_control(Path(controlled) / "controls" / "canny", "a/b")
    given["seed"] = 0
    numpy = pipe(**given, controls=[replace(control, strength=np.float32(0.5))]).tokens
    assert torch.equal(numpy, pipe(**given, controls=[replace(control, strength=0.5)]).tokens)


def test_a_model_that_is_cast_keeps_its_controls(controlled: str, tmp_path: Path) -> None:
    pipe = NextScalePipeline.from_pretrained(controlled, dtype="float32").to(dtype="float16")
    assert pipe.control("canny").record.type == "canny"
    pipe.save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "controls" / "canny" / "config.json").is_file()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("record", "resolution"), 64),
        (("record", "resolution"), None),
        (("module", "encoder"), "vit"),
        (("module", "sites"), 3),
        (("architecture",), ["additive"]),
    ],
)
def test_a_damaged_module_is_one_line(key, value, controlled, tmp_path) -> None:
    shutil.copytree(Path(controlled) / "controls" / "canny", tmp_path / "module")
    path = tmp_path / "module" / "config.json"
    config = json.loads(path.read_text())
    place = config
    for name in key[:-1]:
        place = place[name]
    place[key[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"damaged|architecture"):
        NextScalePipeline.from_pretrained(controlled, dtype="float32").load_control(path.parent)


def test_a_bad_picture_among_others_is_left_out(run, photos, tmp_path) -> None:
    (photos / "0.png").write_bytes(b"no picture")
    result = run("extract", photos, "--output_dir", tmp_path / "m", "--json")
    assert result.code == 0
    assert result.json["num_maps"] == 2
    assert "0.png is left out" in result.err
    for name in ("1.png", "2.png"):
        (photos / name).unlink()
    result = run("extract", photos, "--output_dir", tmp_path / "n")
    assert result.code == 2
    assert not (tmp_path / "n").exists()


def test_a_module_of_another_base_is_refused(generate, controlled, models, photos, tmp_path):
    module = Path(controlled) / "controls" / "canny"
    words = ["--control", module, "--control_image", photos / "0.png", "--control_type", "canny"]
    result = generate("--model", models["class"], "--class_labels", 1, *words)
    assert result.code == 2
    assert "was trained on other weights than this model's" in result.err


def test_the_control_preset(run, controlled, tmp_path) -> None:
    words = ["eval", "--preset", "control", "--model", controlled, "--num_images", 6]
    words += ["--num_reference", 70, "--device", "cpu", "--plot", tmp_path / "plots"]
    result = run(*words, "--json", "--output", tmp_path / "r.json")
    assert result.code == 0, result.err
    record = result.json
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert set(record["controls"]) == {"canny", "depth"}
    canny, depth = record["controls"]["canny"], record["controls"]["depth"]
    assert canny["real"]["value"] == 1
    assert canny["floor"]["metric"] == "canny_f1"
    assert depth["real"]["value"] == 0
    assert depth["floor"]["value"] > 0
    for entry in (canny, depth):
        low, high = entry["floor"]["value"], entry["real"]["value"]
        gap = (entry["control"]["value"] - low) / (high - low)
        assert entry["gap_closed"] == pytest.approx(gap)
        most = entry["reconstruction"]["value"]
        share = (entry["control"]["value"] - low) / (most - low)
        assert entry["gap_closed_reconstruction"] == pytest.approx(share)
        assert 0 <= entry["quality"]["prompt_accuracy"] <= 1
    assert (tmp_path / "plots" / "controls.png").is_file()
    table = run(*words, "--control_type", "canny")
    assert "canny_f1" in table.out
    assert "depth_rmse" not in table.out


def test_training_from_the_command_line(run, models, tmp_path) -> None:
    words = ["train", "control", "--model", models["words"], "--control_type", "depth"]
    words += ["--dataset", "scenes", "--resolution", 32, "--num_images", 8]
    words += ["--max_train_steps", 1, "--train_batch_size", 2, "--num_validation_images", 2]
    words += ["--additive.num_sites", 1, "--additive.encoder.width", 16]
    result = run(*words, "--output_dir", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    figures = result.json["metrics"]
    assert figures["val/loss"] == pytest.approx(figures["val/loss_without"], abs=1e-3)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
