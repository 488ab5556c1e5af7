"""`nextscale train diffusion`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextscale.align import autoencoder_train, diffusion_train
from nextscale.align.autoencoder_train import encode_all, train_autoencoder
from nextscale.align.diffusion_train import (
    DiffusionTrainingConfig,
    caption_tokenizer,
    train_diffusion,
)
from nextscale.cli import main
from nextscale.data.benchmark import load_benchmark
from nextscale.data.captions import VOCABULARY
from nextscale.data.config import open_dataset
from nextscale.errors import UserError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "resolution": 16,
    "autoencoder_steps": 2,
    "autoencoder_batch_size": 8,
    "autoencoder_channels": (8, 16, 16),
    "latent_channels": 4,
    "unet_channels": (32, 32),
    "text_width": 32,
    "text_layers": 1,
    "num_latents": 24,
    "num_validation_images": 8,
    "num_inference_steps": 2,
    "max_train_steps": 2,
    "train_batch_size": 8,
    "mixed_precision": "no",
    "report_to": "none",
    "logging_steps": 1,
}


def configuration(folder: Path, **changes: Any) -> DiffusionTrainingConfig:
    return DiffusionTrainingConfig(output_dir=str(folder), **{**TINY, **changes})


def flags(folder: Path, **changes: Any) -> list[str]:
    words = ["--output_dir", str(folder)]
    for name, value in {**TINY, **changes}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def trained_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"text_encoder", "unet", "vae"}
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def test_the_command_leaves_a_pipeline_of_plain_diffusers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    # The command sends messages to this test's stderr; the next test has another one.
    monkeypatch.setattr(logging.getLogger("nextscale"), "handlers", [])
    words = flags(tmp_path, num_validation_prompts=3, resolution=32)
    assert main(["train", "diffusion", *words, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    figures = {"loss", "autoencoder_psnr", "prompt_accuracy", "prompt_statements"}
    assert {f"val/{name}" for name in figures} <= set(metrics)
    assert (tmp_path / "samples" / "step_00000002.png").is_file()
    assert (tmp_path / "autoencoder" / "samples" / "step_00000002.png").is_file()

    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "model")
    complaints = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert complaints == []
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (pipe.scheduler.config.set_alpha_to_one, pipe.scheduler.config.steps_offset) == (
        False,
        1,
    )
    assert json.loads((tmp_path / "model" / "nextscale.json").read_text()) == {"grammar": "scenes"}
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipe(["a red circle", "a blue cross"], generator=generators, **call).images
    assert images.shape == (2, 3, 32, 32)
    # Users draw what validation drew.
    draw = diffusion_train.drawer(pipe, configuration(tmp_path))
    torch.testing.assert_close(draw(["a red circle", "a blue cross"]), images)
    assert not torch.equal(images[0], images[1])
    monkeypatch.setattr(diffusion_train, "DRAW_BATCH", 1)
    alone = draw(["a red circle", "a blue cross"])
    torch.testing.assert_close(alone, images, rtol=1e-3, atol=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads add up in an order of their own, and Adam amplifies the rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_run_killed_in_either_stage_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    steps: dict[str, Any] = {"autoencoder_steps": 4, "max_train_steps": 4}
    steps |= {"validation_steps": 2, "checkpointing_steps": 2}
    # Rounding depends on where memory lies, and Adam makes whole steps of it where a gradient is
    # nearly 0: losses of two unbroken runs differ by 1.2e-4, and by 3e-5 with this epsilon.
    steps |= {"adam_epsilon": 1e-2}
    train_diffusion(configuration(tmp_path / "one", **steps), progress=False)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    module = autoencoder_train if stage == "autoencoder" else diffusion_train
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_grid", killed)  # in the validation after step 2
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(configuration(tmp_path / "two", **steps), progress=False)
    with pytest.raises(UserError, match="already holds a run"):
        train_diffusion(configuration(tmp_path / "two", **steps), progress=False)
    before = log(tmp_path / "two" / "autoencoder")
    again = configuration(tmp_path / "two", **steps, resume_from_checkpoint="latest")
    train_diffusion(again, progress=False)
    if stage == "denoiser":  # the finished autoencoder is not trained again
        assert log(tmp_path / "two" / "autoencoder") == before

    place = "autoencoder" if stage == "autoencoder" else "."
    resumed = json.loads((tmp_path / "two" / place / "run.json").read_text())
    assert resumed["resumed_from_step"] == 2
    for part in ("autoencoder", "."):
        one, two = (
            [line["loss"] for line in log(tmp_path / name / part) if "loss" in line]
            for name in ("one", "two")
        )
        assert one == pytest.approx(two, rel=1e-4)
    one, two = ({k: v for k, v in w.items() if k[:3] == "vae"} for w in map(trained_weights, runs))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_both_stages_learn(tmp_path: Path) -> None:
    config = configuration(
        tmp_path,
        **{"autoencoder_steps": 30, "max_train_steps": 30, "learning_rate": 3e-3, "seed": 1},
        **{"use_ema": False, "num_latents": 100, "train_batch_size": 16},
    )
    result = train_diffusion(config, progress=False)
    decibels = [line["psnr"] for line in log(tmp_path / "autoencoder") if "psnr" in line]
    assert decibels[-1] > decibels[0] + 3
    assert result.metrics["val/autoencoder_psnr"] > decibels[0] + 3
    # v of unit latents has a mean square of 1: that is the loss of a network that says nothing.
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert losses[0] == pytest.approx(1, abs=0.15)
    assert result.metrics["val/loss"] < 0.9


def test_latents_have_unit_deviation(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    source, other = (open_dataset(config, split) for split in ("train", "validation"))
    vae, _ = train_autoencoder(config, source, other, progress=False)
    latents, captions = encode_all(vae, source, 100, config)
    assert latents.shape == (100, 4, 4, 4)
    assert float(latents.std()) == pytest.approx(1, abs=0.05)
    assert captions == source.captions(np.arange(100))
    pixels = source.load(np.arange(2)).images.float() / 127.5 - 1
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents[:2], expected.float(), rtol=1e-3, atol=1e-3)


def test_every_word_of_scenes_is_one_token_and_reads_back(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    texts = load_benchmark("standard")
    caption_tokenizer(texts, 24).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in VOCABULARY)
    ids = tokenizer(texts, padding="max_length", truncation=True).input_ids
    assert {len(row) for row in ids} == {24}
    read = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [text.replace(" ,", ",") for text in read] == texts
    assert all(
        len(row) - 2 == len(tokenizer.tokenize(t))
        for t in texts
        for row in [tokenizer(t).input_ids]
    )
    strange = tokenizer("a purple kangaroo").input_ids
    assert strange[:3] == tokenizer("a purple").input_ids[:3]
    assert len(strange) > 5  # spelled


def test_captions_that_are_cut_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = caption_tokenizer(["a red circle", "a b c d e f"], 5)
    with caplog.at_level(logging.WARNING):
        diffusion_train._warn_of_cut(tokenizer, ["a red circle", "a b c d e f", "a b c d e f"])
    assert "1 of 2 different captions" in caplog.text
    assert "a b c d e f" in caplog.text


def test_a_dataset_without_captions_is_refused_in_one_line(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", dataset="digits")
    with pytest.raises(UserError, match="needs captions, and digits has none") as caught:
        train_diffusion(config, progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 36}, "resolution is 36, but must be a multiple of 8"),
        ({"unet_channels": (32, 48)}, "multiples of 32"),
        ({"unet_channels": (32,), "unet_heads": 5}, "multiples of 5"),
        ({"autoencoder_channels": ()}, "autoencoder_channels"),
        ({"text_width": 30}, "text_width is 30, but must be a multiple of 4 heads"),
        ({"caption_dropout": 1.0}, "caption_dropout"),
        ({"autoencoder_steps": 0}, "autoencoder_steps is 0"),
        ({"context_length": 2}, "context_length"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration(tmp_path, **changes)
