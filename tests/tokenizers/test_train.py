"""The tokenizer's trainer and its remedies against collapse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.errors import UserError
from nextscale.streams import stream
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.tokenizers.adversarial import LPIPS, PatchDiscriminator, adaptive_weight
from nextscale.tokenizers.codebook import (
    codebook_perplexity,
    ema_update,
    entropy_loss,
    kmeans_start,
    record_usage,
    revive,
)
from nextscale.tokenizers.train import TokenizerTrainingConfig, train_tokenizer


def settings(folder: Path, **changes: Any) -> TokenizerTrainingConfig:
    tokenizer = TokenizerConfig(
        scales=(1, 2, 4),
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
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_training_lowers_the_loss_and_leaves_a_tokenizer(tmp_path: Path) -> None:
    result = train_tokenizer(settings(tmp_path, max_train_steps=40), progress=False)
    # The quantizer sets in at step 4, so compare within the quantized part.
    values = losses(tmp_path)
    assert sum(values[-5:]) < sum(values[5:10])
    assert result.metrics["val/usage"] > 0.5
    assert result.metrics["val/psnr"] > 8
    again = MultiscaleVQ.from_pretrained(tmp_path / "tokenizer")
    assert again.config.codebook_size == 32
    assert list((tmp_path / "samples").glob("*.png"))


def test_a_resumed_run_repeats_the_losses(tmp_path: Path) -> None:
    train_tokenizer(settings(tmp_path / "whole"), progress=False)
    first = settings(tmp_path / "parts", max_train_steps=7)
    train_tokenizer(first, progress=False)
    second = settings(tmp_path / "parts", resume_from_checkpoint="latest")
    train_tokenizer(second, progress=False)
    # The revival's end depends on the length of the run, so both parts lie before it.
    assert losses(tmp_path / "parts")[7:10] == pytest.approx(
        losses(tmp_path / "whole")[7:10], abs=0
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook_update": "ema"},
        {"entropy_weight": 0.1},
        {"scale_dropout": 0.5},
        {"kmeans_start": False, "quantizer_start": 0},
        {"kmeans_start": True, "quantizer_start": 0, "revival_steps": 0},
        {"discriminator_weight": 0.1, "discriminator_start": 6, "discriminator_channels": 8},
    ],
)
def test_every_option_trains(tmp_path: Path, changes: dict[str, Any]) -> None:
    train_tokenizer(settings(tmp_path, **changes), progress=False)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 12
    assert all(value == value for value in last.values())  # no NaN


def test_a_resolution_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use resolution 16"):
        train_tokenizer(settings(tmp_path, resolution=32), progress=False)


def test_kmeans_start_uses_the_whole_codebook() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kmeans_start(tokenizer, images, stream(0))
    assert tokenizer.encode(images).unique().numel() >= 28  # of 32


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


def test_the_poorest_scale_gets_the_least_used_code_when_none_is_dead() -> None:
    tokenizer = MultiscaleVQ(settings(Path()).tokenizer)
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        quantizer.usage.fill_(1.0)
        quantizer.usage[0] = 0.0  # scale 0 uses nothing
        quantizer.usage[1:, 5] = 0.5
    residuals = [torch.full((8, 4), float(k)) for k in range(3)]
    assert revive(quantizer, residuals, 0.05, stream(1)) == 1
    assert (quantizer.codebook.weight[5] == 0.0).all()  # a vector of scale 0
    quantizer.usage.fill_(1.0)
    assert revive(quantizer, residuals, 0.05, stream(1)) == 0


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
    ema_update(tokenizer.quantizer, quantized, decay=0.0)
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
