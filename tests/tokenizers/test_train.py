"""The tokenizer's trainer and its remedies against collapse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.errors import UserError
from nextscale.storage import read_tensors
from nextscale.streams import stream
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.tokenizers.adversarial import LPIPS, PatchDiscriminator, adaptive_weight
from nextscale.tokenizers.codebook import (
    codebook_perplexity,
    ema_update,
    entropy_loss,
    kmeans_start,
    record_usage,
    refit,
    revive,
    usage_metrics,
)
from nextscale.tokenizers.train import (
    TokenizerTrainingConfig,
    initialize,
    measure,
    train_tokenizer,
)


def settings(folder: Path, **changes: Any) -> TokenizerTrainingConfig:
    tokenizer = TokenizerConfig(
        scales=(1, 2, 4) if changes.get("resolution") != 32 else (1, 2, 8),
        codebook_size=32,
        codebook_dim=4,
        channels=8,
        channel_multipliers=(1, 1, 2),
        num_res_blocks=1,
        norm_groups=4,
    )
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "dataset": "scenes",
        "resolution": 16,
        "num_images": 64,
        "tokenizer": tokenizer,
        "max_train_steps": 12,
        "train_batch_size": 8,
        "learning_rate": 2e-3,
        "quantizer_start": 4,
        "revival_steps": 2,
        "num_validation_images": 32,
        "mixed_precision": "no",
        "report_to": "none",
        "logging_steps": 1,
    }
    return TokenizerTrainingConfig(**{**values, **changes})


def losses(folder: Path) -> list[float]:
    lines = log_of(folder)
    found = [line.get("loss", line.get("loss/tokenizer")) for line in lines]
    return [value for value in found if value is not None]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_leaves_a_tokenizer(tmp_path: Path) -> None:
    result = train_tokenizer(settings(tmp_path, max_train_steps=80), progress=False)
    # The quantizer sets in at step 4, so compare within the quantized part.
    values = losses(tmp_path)
    assert sum(values[-5:]) < sum(values[5:10])
    assert result.metrics["val/usage"] > 0.5
    assert result.metrics["val/psnr"] > 8
    again = MultiscaleVQ.from_pretrained(tmp_path / "tokenizer")
    assert again.config.codebook_size == 32
    assert list((tmp_path / "samples").glob("*.png"))


DISCRIMINATOR = {  # its patches need 32 pixels
    "resolution": 32,
    "discriminator_weight": 0.1,
    "discriminator_start": 6,
    "discriminator_channels": 8,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"codebook_update": "ema"}, DISCRIMINATOR],
    ids=["gradient", "ema", "discriminator"],
)
def test_a_resumed_run_repeats_the_losses(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_tokenizer(settings(whole, checkpointing_steps=7, **changes), progress=False)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000012")  # as if killed after step 7
    again = settings(parts, resume_from_checkpoint="latest", **changes)
    train_tokenizer(again, progress=False)
    assert json.loads((parts / "run.json").read_text())["resumed_from_step"] == 7
    assert len(losses(parts)) == 12
    assert losses(parts) == pytest.approx(losses(whole), abs=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_update": "ema"},
        {"entropy_weight": 0.1},
        {"scale_dropout": 0.5},
        {"kmeans_start": False, "quantizer_start": 0},
        {"kmeans_start": True, "quantizer_start": 0, "revival_steps": 0},
        DISCRIMINATOR,
    ],
)
def test_every_option_trains(tmp_path: Path, changes: dict[str, Any]) -> None:
    train_tokenizer(settings(tmp_path, **changes), progress=False)
    last = log_of(tmp_path)[-2]
    assert last["step"] == 12
    assert all(value is not None for value in last.values())  # what is not finite is logged as null
    assert 0 < last["usage_0"] <= 1
    assert 1 <= last["perplexity_2"] <= 32


@pytest.mark.parametrize("update", ["gradient", pytest.param("ema", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(
    tmp_path: Path, update: str, repeat_with_two_processes: Callable[[str, Path, Path], None]
) -> None:
    # Adam divides by the gradient: without an epsilon it would blow rounding up where that is 0.
    # Revival draws from the main process's images, so only the losses up to it agree.
    changes = {"adam_epsilon": 1e-3, "max_train_steps": 6, "quantizer_start": 2, "revival_steps": 5}
    one = settings(tmp_path / "one", codebook_update=update, **changes)
    train_tokenizer(one, progress=False)
    repeat_with_two_processes("train tokenizer", tmp_path / "one", tmp_path / "two")
    assert losses(tmp_path / "two")[:5] == pytest.approx(losses(tmp_path / "one")[:5], rel=1e-3)
    assert len(losses(tmp_path / "two")) == 6
    MultiscaleVQ.from_pretrained(tmp_path / "two" / "tokenizer")


def test_only_the_main_process_writes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextscale.processes.is_main", lambda: False)
    train_tokenizer(settings(tmp_path, max_train_steps=1), progress=False)
    assert not (tmp_path / "tokenizer").exists()
    assert not (tmp_path / "samples").exists()


def test_the_averaged_tokenizer_is_saved(tmp_path: Path) -> None:
    train_tokenizer(settings(tmp_path, use_ema=True, max_train_steps=6), progress=False)
    saved = read_tensors(tmp_path / "tokenizer" / "model.safetensors")
    folder = tmp_path / "checkpoints" / "step_00000006"
    average = read_tensors(folder / "ema_tokenizer.safetensors")
    trained = read_tensors(folder / "tokenizer.safetensors")
    assert all(torch.equal(saved[key], average[key]) for key in average)
    assert not torch.equal(saved["quant_conv.weight"], trained["quant_conv.weight"])


def test_accumulation_counts_all_micro_batches(tmp_path: Path) -> None:
    changes = {"max_train_steps": 1, "quantizer_start": 0, "kmeans_start": False}
    changes |= {"codebook_update": "ema", "revival_steps": 1, "revival_end": 1.0}
    big = train_tokenizer(settings(tmp_path / "big", **changes), progress=False)
    changes |= {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    split = train_tokenizer(settings(tmp_path / "split", **changes), progress=False)
    a, b = (r.modules["tokenizer"].quantizer for r in (big, split))
    torch.testing.assert_close(a.usage, b.usage)
    torch.testing.assert_close(a.codebook.weight, b.codebook.weight)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("l1_weight", -1.0, "be 0 or more"),
        ("entropy_weight", -0.1, "be 0 or more"),
        ("quantizer_start", -1, "be 0 or more"),
        ("scale_dropout", 1.5, r"lie in \[0, 1\]"),
        ("revival_end", 2.0, r"lie in \[0, 1\]"),
        ("discriminator_channels", 12, "be a multiple of 8"),
        ("codebook_update", "both", "be gradient or ema"),
        ("learning_rate", 0.0, "be above 0"),
    ],
)
def test_bad_settings_are_named(name: str, value: Any, rule: str) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}, but must {rule}"):
        settings(Path(), **{name: value})


def test_a_resolution_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use resolution 16"):
        train_tokenizer(settings(tmp_path, resolution=24), progress=False)


def test_kmeans_start_uses_the_whole_codebook() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = tokenizer.latents(images)
    kmeans_start(tokenizer.quantizer, tokenizer.schedule, latents, stream(0))
    assert tokenizer.encode(images).unique().numel() >= 28  # of 32


def test_kmeans_sees_a_limited_number_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    seen: list[int] = []
    nearest = tokenizer.quantizer.nearest
    monkeypatch.setattr(
        tokenizer.quantizer, "nearest", lambda v: (seen.append(len(v)), nearest(v))[1]
    )
    monkeypatch.setattr("nextscale.tokenizers.codebook.KMEANS_VECTORS", 64)
    kmeans_start(tokenizer.quantizer, tokenizer.schedule, torch.randn(64, 4, 4, 4), stream(0))
    assert max(seen) == 64  # and not 64 * 16


def test_kmeans_draws_its_images_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextscale.data.sources import ScenesSource

    asked: list[np.ndarray] = []
    load = ScenesSource.load

    def spy(self: Any, indices: np.ndarray, **named: Any) -> Any:
        asked.append(np.asarray(indices))
        return load(self, indices, **named)

    monkeypatch.setattr(ScenesSource, "load", spy)
    config = settings(tmp_path, quantizer_start=0, max_train_steps=1)
    train_tokenizer(config, progress=False)
    assert sorted(asked[0]) == list(range(64))
    assert list(asked[0]) != list(range(64))


@pytest.mark.parametrize("cosine", [False, True])
def test_search_in_parts_finds_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, cosine: bool
) -> None:
    quantizer = MultiscaleVQ(settings(Path()).tokenizer).quantizer
    quantizer.cosine = cosine
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # few small integers: exact distances, and many ties
        quantizer.codebook.weight.copy_(torch.randint(-1, 2, (32, 4), generator=generator))
    vectors = torch.randint(-2, 3, (101, 4), generator=generator).float()
    whole = quantizer.nearest(vectors)
    monkeypatch.setattr("nextscale.tokenizers.quantizer.MAX_DISTANCES", 32 * 7)
    assert torch.equal(quantizer.nearest(vectors), whole)
    monkeypatch.setattr("nextscale.tokenizers.quantizer.MAX_DISTANCES", 1)
    assert torch.equal(quantizer.nearest(vectors), whole)


def test_decoding_stays_in_float32_under_autocast() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    tokens = torch.randint(0, 32, (4, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight.normal_(generator=torch.Generator().manual_seed(1))
        plain = list(tokenizer.quantizer.accumulate(tokens, tokenizer.schedule))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = list(tokenizer.quantizer.accumulate(tokens, tokenizer.schedule))
    for left, right in zip(plain, mixed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.gpu
def test_inputs_follow_the_weights_to_the_device() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer).eval().cuda()
    tokens = tokenizer.encode(torch.zeros(2, 3, 16, 16))
    assert tokens.is_cuda
    assert tokenizer.decode(tokens.cpu()).is_cuda
    assert tokenizer.teacher_inputs(tokens.cpu()).is_cuda
    assert tokenizer.decode_latents(torch.zeros(2, 4, 4, 4)).is_cuda


def test_measure_can_show_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from nextscale.data.config import open_dataset

    config = settings(Path())
    tokenizer = MultiscaleVQ(config.tokenizer).eval()
    source = open_dataset(config, "validation")
    quiet = measure(tokenizer, source, 8, 4)
    assert capsys.readouterr().err == ""
    assert measure(tokenizer, source, 8, 4, progress=True) == quiet
    assert "8/8" in capsys.readouterr().err


def test_usage_metrics_count_codes_and_weigh_them() -> None:
    quantizer = MultiscaleVQ(settings(Path()).tokenizer).quantizer
    assert usage_metrics(quantizer) == {}
    quantizer.usage[:, :8] = 4.0
    quantizer.usage[0, 1:] = 0.0
    found = usage_metrics(quantizer)
    assert found == pytest.approx(
        {"usage_0": 1 / 32, "perplexity_0": 1}
        | {f"{name}_{k}": v for k in (1, 2) for name, v in (("usage", 0.25), ("perplexity", 8))},
        rel=1e-5,
    )


def test_revival_moves_only_unused_codes() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    quantizer = tokenizer.quantizer
    tokens = torch.randint(0, 8, (16, 21), generator=torch.Generator().manual_seed(0))
    record_usage(quantizer, tokenizer.schedule, tokens)
    before = quantizer.codebook.weight.detach().clone()
    residuals = [torch.randn(16 * n, 4) for n in (1, 4, 16)]
    assert revive(quantizer, residuals, 0.05, stream(1)) == 24
    after = quantizer.codebook.weight.detach()
    assert torch.equal(before[:8], after[:8])
    pool = torch.cat(residuals)
    assert all((pool == code).all(dim=1).any() for code in after[8:])
    assert (quantizer.usage.amax(dim=0) >= 0.05).all()  # a grace period


@pytest.mark.parametrize("gain", [1.0, 12.0])
def test_refit_feeds_a_starving_scale_unless_its_phi_amplifies(gain: float) -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    initialize(tokenizer)
    quantizer, schedule = tokenizer.quantizer, tokenizer.schedule
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(256, 4, 1, 1, generator=generator)
    latents = means + 0.1 * torch.randn(256, 4, 4, 4, generator=generator)
    with torch.no_grad():
        # Scale 0 gets along with two codes; a phi may have learnt to make up for their length.
        quantizer.codebook.weight.fill_(100.0)
        quantizer.codebook.weight[:2] = torch.tensor([[1.0], [-1.0]]) / gain
        for parameter in quantizer.phi[0].parameters():
            parameter.mul_(2 * gain - 1)  # phi(h) = h / 2 + conv(h) / 2 = gain h
    codes = quantizer.codebook.weight.detach().clone()
    changed = refit(quantizer, schedule, latents, 0.5, generator)
    used = schedule.split(quantizer.encode(latents, schedule))[0].unique()
    if gain == 1:
        assert 0 in changed
        assert len(used) >= 12  # of the 16 asked for: centres for other scales may serve as well
    else:
        assert 0 not in changed
        assert len(used) <= 2
        assert torch.equal(quantizer.codebook.weight[:2], codes[:2])


def test_revived_codes_lose_their_moments() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    weight = tokenizer.quantizer.codebook.weight
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    tokens = torch.zeros(4, 21, dtype=torch.long)
    record_usage(tokenizer.quantizer, tokenizer.schedule, tokens)
    revive(tokenizer.quantizer, [torch.randn(8, 4)] * 3, 0.05, stream(1), optimizer)
    assert optimizer.state[weight]["exp_avg"][0].abs().sum() > 0
    assert optimizer.state[weight]["exp_avg"][1:].abs().sum() == 0


def test_ema_update_moves_codes_to_the_mean_of_their_vectors() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    f = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    quantized = tokenizer.quantizer(f, tokenizer.schedule)
    by_scale = torch.cat([t.flatten() for t in tokenizer.schedule.split(quantized.tokens)])
    vectors = torch.cat(quantized.residuals)
    code = int(by_scale.mode().values)
    ema_update(tokenizer.quantizer, quantized.tokens, quantized.residuals, decay=0.0)
    expected = vectors[by_scale == code].mean(dim=0)
    torch.testing.assert_close(tokenizer.quantizer.codebook.weight[code].detach(), expected)


def test_entropy_loss_prefers_even_usage() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight.normal_(generator=torch.Generator().manual_seed(0))
    codes = tokenizer.quantizer.codebook.weight.detach()
    schedule = tokenizer.schedule

    def term(f: torch.Tensor) -> float:
        with torch.no_grad():
            return entropy_loss(
                tokenizer.quantizer, tokenizer.quantizer(f, schedule), schedule
            ).item()

    collapsed = codes[0].view(1, 4, 1, 1).expand(8, 4, 4, 4)
    varied = codes[torch.arange(128) % 32].view(8, 4, 4, 4).permute(0, 3, 1, 2)
    assert term(varied) < term(collapsed)


def test_perplexity_of_even_and_collapsed_histograms() -> None:
    assert codebook_perplexity(torch.full((16,), 3)) == pytest.approx(16, rel=1e-5)
    assert codebook_perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1, rel=1e-5)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((6 * layer).sum(), (2 * layer).sum(), layer)
    assert weight.item() == pytest.approx(3, rel=1e-4)


def test_discriminator_scores_do_not_depend_on_the_batch() -> None:
    judge = PatchDiscriminator(8)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]))


def test_lpips_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="LPIPS comes with the extra [eval]")
    from urllib.error import URLError

    def refuse(*arguments: Any, **named: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="--lpips_weights PATH") as caught:
        LPIPS()
    assert caught.value.exit_code == 1


def test_lpips_from_a_file_keeps_the_bundled_heads(tmp_path: Path) -> None:
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"]).state_dict()
    torch.save({f"features.{k}": torch.zeros_like(v) for k, v in features.items()}, tmp_path / "v")
    distance = LPIPS(str(tmp_path / "v"))
    folder = Path(lpips.__file__).parent / "lpips_models"
    bundled = torch.load(folder / "vgg.pth", map_location="cpu", weights_only=True)
    assert len(bundled) == 5
    found = distance.net.state_dict()
    assert all(torch.equal(found[name], head) for name, head in bundled.items())
    assert all(not p.any() for p in distance.net.net.parameters())


def test_fewer_codes_than_scales_is_no_obstacle() -> None:
    from dataclasses import replace

    tokenizer = MultiscaleVQ(replace(settings(Path()).tokenizer, codebook_size=2))
    kmeans_start(tokenizer.quantizer, tokenizer.schedule, torch.randn(8, 4, 4, 4), stream(0))
    assert tokenizer.quantizer.codebook.weight.isfinite().all()
