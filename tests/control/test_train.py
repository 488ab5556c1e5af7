"""`train control` on a tiny model: losses fall, the base stays, runs resume, shares are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.control import read_control
from nextscale.control.additive import AdditiveConfig
from nextscale.control.encoder import EncoderConfig
from nextscale.control.train import ControlTrainingConfig, scale_shares, train_control
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import stream
from nextscale.var import NextScaleTransformer
from nextscale.var.lora import base_fingerprint

SMALL = EncoderConfig(width=16, depth=1, heads=2)


@pytest.fixture(scope="session")
def model(control_base: Path) -> Path:
    return control_base


def config(model: Path, folder: Path, **changes: Any) -> ControlTrainingConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "control_type": "depth:scenes",
        "dataset": "scenes",
        "num_images": 64,
        "resolution": 32,
        "output_dir": str(folder),
        "max_train_steps": 4,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "additive": AdditiveConfig(encoder=SMALL, num_sites=2),
        "num_validation_images": 8,
        "report_to": "none",
        "mixed_precision": "no",
        "logging_steps": 1,
        "use_ema": False,
    }
    return ControlTrainingConfig(**{**settings, **changes})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("architecture", ["additive", "adapter", "side_network"])
def test_a_module_is_trained_and_used(architecture: str, model: Path, tmp_path: Path) -> None:
    from nextscale.control import AdapterConfig, SideNetworkConfig

    sizes = {
        "architecture": architecture,
        "adapter": AdapterConfig(encoder=SMALL, num_sites=1),
        "side_network": SideNetworkConfig(encoder=SMALL, num_blocks=1),
    }
    result = train_control(config(model, tmp_path / "run", **sizes), progress=False)
    assert result.steps == 4
    assert (tmp_path / "run" / "samples" / "step_00000004.png").is_file()
    pipe = NextScalePipeline.from_pretrained(model, dtype="float32")
    plain = pipe(class_labels=[3], seed=0, output_type="pt").tokens
    name = pipe.load_control(tmp_path / "run")
    assert name == "depth"
    assert pipe.control("depth").record.extractor["spec"] == "depth:scenes"
    image = torch.rand(1, 32, 32)
    off = pipe(class_labels=[3], seed=0, control_image=image, control_type=name, control_scale=0.0)
    assert torch.equal(off.tokens, plain)
    on = pipe(class_labels=[3], seed=0, control_image=image, control_type=name, control_scale=10.0)
    assert not torch.equal(on.tokens, plain)


def test_control_lowers_the_loss_and_leaves_the_base_alone(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_train_steps": 40, "train_batch_size": 16, "num_validation_images": 32,
        "control_dropout": 0.0, "joint_dropout": 0.0,
    }  # fmt: skip
    result = train_control(config(model, tmp_path / "run", **settings), progress=False)
    assert result.metrics["val/loss"] < result.metrics["val/loss_without"] - 0.05
    network = result.modules["model"]
    base = NextScaleTransformer.from_pretrained(model)
    assert base_fingerprint(network.transformer) == base_fingerprint(base)  # pyright: ignore


def test_dropouts_and_weights_show_in_the_first_loss(model: Path, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"condition_dropout": 0.0, "control_dropout": 0.0, "joint_dropout": 0.0}
    trained = config(model, tmp_path / "a", max_train_steps=20, **kept)
    train_control(trained, progress=False)

    def first(**changes: Any) -> dict[str, float]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run = config(model, folder, **{"max_train_steps": 1, **kept, **changes})
        train_control(run, progress=False)
        return json.loads((folder / "log.jsonl").read_text().splitlines()[0])

    initial, always = str(tmp_path / "a"), 1 - 1e-9
    base, controlled = first()["loss"], first(initial=initial)["loss"]
    without_prompt = first(condition_dropout=always)["loss"]
    assert len({round(value, 4) for value in (base, controlled, without_prompt)}) == 3
    close = pytest.approx
    assert first(initial=initial, control_dropout=always)["loss"] == close(base, abs=1e-5)
    assert first(initial=initial, joint_dropout=always)["loss"] == close(without_prompt, abs=1e-5)
    assert first(scale_weight="scale")["loss"] != close(first(scale_weight="token")["loss"])
    early = first(early_decay=50.0)
    assert early["tokens"] < first()["tokens"]
    assert early["loss"] != close(base)


@pytest.mark.parametrize("unfreeze", ["all", "lora"])
def test_an_unfrozen_base_is_saved_with_its_module(
    unfreeze: str, model: Path, tmp_path: Path
) -> None:
    settings = {"unfreeze": unfreeze, "lora_rank": 2, "base_lr_scale": 1.0}
    train_control(config(model, tmp_path / "run", **settings), progress=False)
    pipe = NextScalePipeline.from_pretrained(tmp_path / "run" / "model", dtype="float32")
    assert pipe.controls == ["depth"]
    own = base_fingerprint(pipe.transformer)
    assert pipe.control("depth").record.base_fingerprint == own
    assert own != base_fingerprint(NextScaleTransformer.from_pretrained(model))
    pipe.save_pretrained(tmp_path / "copy")
    assert read_control(tmp_path / "copy" / "controls" / "depth").record.type == "depth"


def test_a_resumed_run_repeats_the_losses(model: Path, tmp_path: Path) -> None:
    early = {"early_decay": 1.0, "max_train_steps": 6}
    train_control(config(model, tmp_path / "whole", **early), progress=False)
    half = config(
        model, tmp_path / "half", early_decay=1.0, max_train_steps=6, checkpointing_steps=3,
        max_train_minutes=1e-9,
    )  # fmt: skip
    train_control(half, progress=False)
    done = len(losses(tmp_path / "half"))
    assert done < 6
    rest = config(model, tmp_path / "half", resume_from_checkpoint="latest", **early)
    train_control(rest, progress=False)
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "half")
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-4, rtol=0)


def test_a_run_begins_with_an_earlier_module(model: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train_control(config(model, first), progress=False)
    still = {"initial": str(first), "learning_rate": 1e-12, "max_train_steps": 1}
    other = config(model, tmp_path / "second", control_type="segmentation:scenes", **still)
    train_control(other, progress=False)
    before, after = (read_control(tmp_path / name / "model") for name in ("first", "second"))
    assert after.record.type == "segmentation"
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-9, rtol=0)
    larger = AdditiveConfig(encoder=SMALL, num_sites=1)
    with pytest.raises(UserError, match="other sizes; this run has num_sites 1 for its 2"):
        train_control(config(model, tmp_path / "x", additive=larger, **still), progress=False)
    assert not (tmp_path / "x").exists()


def test_shares_of_the_last_scale_are_the_formula_s(model: Path, tmp_path: Path) -> None:
    """methods/control.md 2.3: shares of the tokens of VAR-256."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    tokens = torch.tensor(sides).square().cumsum(0).float()
    for decay, start, share in ((0.0, 5, 0.47), (0.0, 4, 0.41), (0.0, 0, 0.25)):
        run = config(model, tmp_path, early_decay=decay, early_start=start)
        shares = scale_shares(run, 10)
        assert shares.sum() == pytest.approx(1)
        assert (shares[:start] == 0).all()
        assert float((shares * tokens).sum() / 680) == pytest.approx(share, abs=0.01)
    shares = scale_shares(config(model, tmp_path, early_decay=1.0), 10)
    assert shares.argmax() == 4
    assert shares[-1] / shares[4] == pytest.approx(torch.e**-1, rel=1e-5)
    drawn = torch.multinomial(shares, 10_000, replacement=True, generator=stream(0))
    expected = float((shares * tokens).sum())
    assert float(tokens[drawn].mean()) == pytest.approx(expected, rel=0.01)
    assert scale_shares(config(model, tmp_path, early_decay=50.0), 10)[-1] == pytest.approx(0.05)
    assert scale_shares(config(model, tmp_path), 10).tolist() == [0.0] * 9 + [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_start": 3}, "early_start needs early_decay"),
        ({"early_decay": 1.0, "early_start": 3}, "early_start is 3, but must be below 3"),
        ({"architecture": "joint"}, "architecture"),
        ({"control_dropout": 1.0}, "control_dropout"),
        ({"init_ffn_from_base": True}, "is of the architecture adapter"),
        ({"resolution": 64}, "resolution 64 does not fit the model"),
        ({"control_type": "edges"}, 'no control type "edges"'),
    ],
)
def test_bad_settings_end_before_the_first_step(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_control(config(model, tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_two_processes_are_one(
    model: Path, tmp_path: Path, repeat_with_two_processes: Callable[[str, Path, Path], None]
) -> None:
    """Drops are drawn by image and shares of scales by step, whoever holds the batch."""
    train_control(
        config(model, tmp_path / "one", control_dropout=0.5, early_decay=1.0), progress=False
    )
    repeat_with_two_processes("train control", tmp_path / "one", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
