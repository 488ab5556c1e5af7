"""The transformer's trainer: learning, fine-tuning, LoRA, progressive training, resuming."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.data.images import to_float
from nextscale.data.sources import open_source
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.tokenizers.token_maps import write_token_maps
from nextscale.tokenizers.train import initialize
from nextscale.var import NextScaleTransformer, SamplingConfig, TransformerConfig
from nextscale.var.conditioning import ClassConditioner, WordConditioner, WordEncoderConfig
from nextscale.var.examples import self_corrected
from nextscale.var.lora import base_fingerprint
from nextscale.var.train import (
    TransformerTrainingConfig,
    _progress_at,
    train_transformer,
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tokenizer for 16x16 scenes."""
    config = TokenizerConfig(
        scales=(1, 2, 4),
        codebook_size=32,
        codebook_dim=4,
        channels=8,
        channel_multipliers=(1, 1, 2),
        num_res_blocks=1,
        norm_groups=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiscaleVQ(config)
        initialize(tokenizer)
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, tokenizer: Path, **changes: Any) -> TransformerTrainingConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "tokenizer": str(tokenizer),
        "dataset": "scenes",
        "resolution": 16,
        "num_images": 64,
        "transformer": TransformerConfig(
            depth=2, width=32, num_heads=2, drop_path=0.0, gate_init=1.0, shared_modulation=True
        ),
        "words": WordEncoderConfig(grammar="scenes", encoder_width=16, encoder_heads=2),
        "max_train_steps": 10,
        "train_batch_size": 8,
        "learning_rate": 3e-3,
        "num_validation_images": 16,
        "mixed_precision": "no",
        "report_to": "none",
        "logging_steps": 1,
        "ema_decay": 0.5,
        "generation": SamplingConfig(guidance_scale=2.0),
    }
    return TransformerTrainingConfig(**{**values, **changes})


def losses(folder: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_own_captions_with_rare_and_many_words(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    rows = []
    for i in range(24):
        pixels = np.full((16, 16, 3), 10 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        # Every caption has a word of its own: those of the validation part are not in training.
        rows.append({"file_name": f"{i}.png", "text": f"grey level{i}" + " very" * (i % 7)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = WordEncoderConfig(max_words=5, encoder_width=16, encoder_heads=2)
    changes: dict[str, Any] = {"dataset": str(folder), "max_train_steps": 2, "words": words}
    train_transformer(settings(tmp_path / "run", tokenizer_folder, **changes), progress=False)
    pipe = NextScalePipeline.from_pretrained(tmp_path / "run" / "model")
    assert pipe("very grey", seed=0).images[0].size == (16, 16)
    with pytest.raises(UserError, match="has not learned: purple"):
        pipe("purple grey")


def test_self_correction_aims_at_what_remains(tokenizer_folder: Path) -> None:
    tokenizer = MultiscaleVQ.from_pretrained(tokenizer_folder).requires_grad_(False)
    batch = open_source("scenes", resolution=16).load(np.arange(8))
    images = {"images": batch.images}
    f = tokenizer.latents(to_float(batch.images))
    tokens = tokenizer.encode(to_float(batch.images))

    targets, inputs = self_corrected(images, tokenizer, 0.0)
    assert torch.equal(targets, tokens)  # no errors: nothing to mend
    torch.testing.assert_close(inputs, tokenizer.teacher_inputs(tokens))

    torch.manual_seed(0)
    targets, inputs = self_corrected(images, tokenizer, 0.9)
    assert torch.equal(targets[:, 0], tokens[:, 0])
    # The inputs of the last scale are what is drawn so far; the targets come closer to f.
    where, grid = tokenizer.schedule.slices[-1], tokenizer.schedule.grid
    drawn = inputs[:, -grid[0] * grid[1] :].transpose(1, 2).view_as(f)
    rest = (f - drawn).permute(0, 2, 3, 1).flatten(1, 2)
    errors = [
        (rest - tokenizer.quantizer.lookup(t[:, where])).square().mean() for t in (targets, tokens)
    ]
    assert errors[0] < errors[1]


def test_self_correction_trains_on_images_only(tmp_path: Path, tokenizer_folder: Path) -> None:
    train_transformer(
        settings(tmp_path / "a", tokenizer_folder, self_correction=0.3), progress=False
    )
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0]
    tokenizer = MultiscaleVQ.from_pretrained(tokenizer_folder)
    source = open_source("scenes", resolution=16, num_images=8)
    write_token_maps(tmp_path / "maps", tokenizer, {"train": source, "validation": source})
    maps = {"dataset": str(tmp_path / "maps"), "self_correction": 0.3}
    with pytest.raises(UserError, match="self_correction needs images"):
        train_transformer(settings(tmp_path / "b", tokenizer_folder, **maps), progress=False)
    assert not (tmp_path / "b").exists()


def test_two_processes_train_like_one(
    tmp_path: Path,
    tokenizer_folder: Path,
    repeat_with_two_processes: Callable[[str, Path, Path], None],
) -> None:
    # Adam divides by the gradient: without an epsilon it would blow rounding up where that is 0.
    changes = {"adam_epsilon": 1e-3, "max_train_steps": 3}
    train_transformer(settings(tmp_path / "one", tokenizer_folder, **changes), progress=False)
    repeat_with_two_processes("train var", tmp_path / "one", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (losses(tmp_path / f, "grad_norm") for f in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3)
    NextScalePipeline.from_pretrained(tmp_path / "two" / "model")


def test_captions_train_a_model_that_the_pipeline_loads(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    result = train_transformer(
        settings(tmp_path, tokenizer_folder, max_train_steps=60), progress=False
    )
    assert sum(losses(tmp_path)[-10:]) < sum(losses(tmp_path)[:10])
    assert result.metrics["val/loss"] < np.log(32)
    pipe = NextScalePipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert isinstance(pipe.transformer.conditioner, WordConditioner)
    assert pipe.generation.guidance_scale == 2.0
    assert pipe("a red circle left of a blue square", seed=0).tokens.shape == (1, 21)
    assert list((tmp_path / "samples").glob("*.png"))


def test_class_labels_train_a_class_conditional_model(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    train_transformer(settings(tmp_path, tokenizer_folder, conditioning="class"), progress=False)
    pipe = NextScalePipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert isinstance(pipe.transformer.conditioner, ClassConditioner)
    by_name = pipe(class_labels="red circle", seed=0).tokens
    assert torch.equal(by_name, pipe(class_labels=0, seed=0).tokens)


def test_a_resumed_run_repeats_the_losses(tmp_path: Path, tokenizer_folder: Path) -> None:
    train_transformer(settings(tmp_path / "whole", tokenizer_folder), progress=False)
    train_transformer(
        settings(tmp_path / "parts", tokenizer_folder, max_train_steps=6), progress=False
    )
    train_transformer(
        settings(tmp_path / "parts", tokenizer_folder, resume_from_checkpoint="latest"),
        progress=False,
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_evaluate_is_called_with_the_model_and_its_values_are_logged(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    def evaluate(model: NextScaleTransformer, tokenizer: MultiscaleVQ, step: int) -> dict:
        assert not model.training
        return {"answer": 42.0 + step}

    config = settings(tmp_path, tokenizer_folder, max_train_steps=2)
    result = train_transformer(config, evaluate=evaluate, progress=False)
    assert result.metrics["val/answer"] == 44.0


def test_fine_tuning_with_another_class_count_warns_and_works(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = settings(tmp_path / "base", tokenizer_folder, conditioning="class", max_train_steps=2)
    train_transformer(base, progress=False)
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", arr_0=pictures, arr_1=np.arange(12) % 3)
    config = settings(
        tmp_path / "tuned",
        tokenizer_folder,
        model=str(tmp_path / "base" / "model"),
        dataset=str(tmp_path / "own.npz"),
        num_images=None,
        max_train_steps=2,
    )
    with caplog.at_level(logging.WARNING):
        train_transformer(config, progress=False)
    assert "class table starts anew" in caplog.text
    pipe = NextScalePipeline.from_pretrained(tmp_path / "tuned" / "model", device="cpu")
    assert isinstance(pipe.transformer.conditioner, ClassConditioner)
    assert pipe.transformer.conditioner.num_classes == 3


def test_lora_changes_the_model_until_it_is_unloaded_and_refuses_another_base(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    pytest.importorskip("peft", reason="LoRA comes with the extra [train]")
    train_transformer(
        settings(tmp_path / "base", tokenizer_folder, max_train_steps=2), progress=False
    )
    base = tmp_path / "base" / "model"
    config = settings(
        tmp_path / "lora", tokenizer_folder, model=str(base), lora_rank=2, learning_rate=0.05
    )
    train_transformer(config, progress=False)
    pipe = NextScalePipeline.from_pretrained(base, device="cpu", dtype="float32")
    prompt = "a red circle"

    def tokens() -> torch.Tensor:
        return pipe(prompt, seed=0, num_images_per_prompt=8).tokens

    plain, fingerprint = tokens(), base_fingerprint(pipe.transformer)
    with pytest.raises(UserError, match=r"folder of a run; its LoRA is .*model"):
        pipe.load_lora(tmp_path / "lora")
    pipe.load_lora(tmp_path / "lora" / "model")
    assert base_fingerprint(pipe.transformer) == fingerprint
    tuned = tokens()
    assert not torch.equal(tuned, plain)
    pipe.unload_lora()
    assert torch.equal(tokens(), plain)
    pipe.load_lora(tmp_path / "lora" / "model", scale=0.0)
    assert torch.equal(tokens(), plain)
    pipe.unload_lora()
    pipe.load_lora(tmp_path / "lora" / "model")
    pipe.fuse_lora()
    assert torch.equal(tokens(), tuned)
    assert not any("lora" in name for name in pipe.transformer.state_dict())
    with pytest.raises(UserError, match="other weights"):
        pipe.load_lora(tmp_path / "lora" / "model")


def test_progressive_training_adds_scales_and_ramps_the_newest() -> None:
    config = TransformerTrainingConfig(
        output_dir="x",
        max_train_steps=100,
        progressive_fraction=0.6,
        progressive_start=3,
        progressive_warmup=10,
    )
    schedule = [_progress_at(config, step, num_scales=6) for step in range(100)]
    scales = [s for s, _ in schedule]
    assert scales == sorted(scales)
    assert schedule[0] == (4, 1.0)
    assert schedule[20] == (5, pytest.approx(0.01))
    assert schedule[25] == (5, pytest.approx(0.01 + 0.99 * 0.5))
    assert schedule[40] == (6, pytest.approx(0.01))
    assert schedule[-1] == (6, 1.0)


def test_progressive_training_runs(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = settings(
        tmp_path,
        tokenizer_folder,
        progressive_fraction=0.8,
        progressive_start=0,
        progressive_warmup=2,
    )
    train_transformer(config, progress=False)
    values = losses(tmp_path)
    assert values[0] < values[-1]  # one token of 21, then all of them, both over L


def test_settings_that_do_not_fit_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match="resolution 32"):
        train_transformer(settings(tmp_path, tokenizer_folder, resolution=32), progress=False)
    with pytest.raises(UserError, match="needs a base"):
        settings(tmp_path, tokenizer_folder, lora_rank=4)
    with pytest.raises(UserError, match="label_dropout"):
        settings(tmp_path, tokenizer_folder, label_dropout=1.0)
