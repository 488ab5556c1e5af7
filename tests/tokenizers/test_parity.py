"""The tokenizer against the published implementation (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule, phi_index
from nextscale.tokenizers.quantizer import QuantizerOutput

Golden = Callable[[str], dict[str, Tensor]]
FEATURES = {"atol": 1e-4, "rtol": 0}
PIXELS = {"atol": 5e-4, "rtol": 0}


@pytest.fixture(scope="module")
def tokenizer(golden: Golden, golden_config: dict[str, Any]) -> MultiscaleVQ:
    scales = golden_config["config"]["patch_nums"]
    return MultiscaleVQ.from_official(golden("vqvae_state"), scales=scales)


@pytest.fixture(scope="module")
def expected(golden: Golden) -> dict[str, Tensor]:
    return golden("vqvae_golden")


@pytest.fixture(scope="module")
def tokens(expected: dict[str, Tensor]) -> Tensor:
    return torch.cat([expected[f"idx.{k}"] for k in range(4)], dim=1)


def test_sizes_follow_from_the_shapes(
    tokenizer: MultiscaleVQ, golden_config: dict[str, Any]
) -> None:
    reference, config = golden_config["config"], tokenizer.config
    assert (config.codebook_size, config.codebook_dim) == (reference["V"], reference["Z"])
    assert config.channels == reference["ch"]
    assert config.channel_multipliers == (1, 1, 2, 2, 4)
    assert (config.num_res_blocks, config.num_phi, config.stride) == (2, 4, 16)
    assert tokenizer.resolution == (golden_config["image_size"],) * 2
    assert phi_index(4) == golden_config["phi_index_per_scale"]
    assert sum(p.numel() for p in tokenizer.parameters()) == golden_config["vqvae_params"]


@torch.no_grad()
def test_encoder_features(tokenizer: MultiscaleVQ, expected: dict[str, Tensor]) -> None:
    images = expected["input_image"]
    torch.testing.assert_close(tokenizer.encoder(images), expected["encoder_out"], **FEATURES)
    torch.testing.assert_close(tokenizer.latents(images), expected["f"], **FEATURES)


def test_tokens(tokenizer: MultiscaleVQ, expected: dict[str, Tensor], tokens: Tensor) -> None:
    assert torch.equal(tokenizer.encode(expected["input_image"]), tokens)


def test_tokens_of_a_non_square_schedule(
    tokenizer: MultiscaleVQ, expected: dict[str, Tensor], golden_config: dict[str, Any]
) -> None:
    schedule = ScaleSchedule(golden_config["config"]["nonsquare"])
    found = tokenizer.encode(expected["input_image"][:1], schedule)
    for k, part in enumerate(schedule.split(found)):
        assert torch.equal(part, expected[f"alt_scales.idx.{k}"])


def test_accumulated_reconstruction_of_every_scale(
    tokenizer: MultiscaleVQ, expected: dict[str, Tensor], tokens: Tensor
) -> None:
    steps = list(tokenizer.quantizer.accumulate(tokens, tokenizer.schedule))
    assert len(steps) == 4
    for k, (f_hat, _) in enumerate(steps):
        torch.testing.assert_close(f_hat, expected[f"f_hat.{k}"], **FEATURES)


def test_reconstructed_images(
    tokenizer: MultiscaleVQ, expected: dict[str, Tensor], tokens: Tensor
) -> None:
    torch.testing.assert_close(tokenizer.decode(tokens), expected["recon_image"], **PIXELS)


def test_transformer_inputs(
    tokenizer: MultiscaleVQ, expected: dict[str, Tensor], tokens: Tensor
) -> None:
    torch.testing.assert_close(tokenizer.teacher_inputs(tokens), expected["var_input"], **FEATURES)


@pytest.fixture(scope="module")
def training(
    tokenizer: MultiscaleVQ, expected: dict[str, Tensor]
) -> tuple[QuantizerOutput, dict[str, Tensor]]:
    """The quantizer's training forward on f, and the gradients of the README's objective."""
    f = expected["f"].clone().requires_grad_()
    quantizer = tokenizer.quantizer
    out = quantizer(f, tokenizer.schedule)
    objective = out.loss + 1e-3 * (out.f_hat * expected["quant_train.probe_weight"]).sum()
    inputs = {
        "grad_f": f,
        "grad_codebook": quantizer.codebook.weight,
        "grad_phi0_weight": quantizer.phi.get_parameter("0.weight"),
    }
    gradients = torch.autograd.grad(objective, list(inputs.values()))
    return out, dict(zip(inputs, gradients, strict=True))


def test_training_loss_and_straight_through_output(
    training: tuple[QuantizerOutput, dict[str, Tensor]],
    expected: dict[str, Tensor],
    golden_config: dict[str, Any],
    tokens: Tensor,
) -> None:
    out, _ = training
    loss = golden_config["scalars"]["quant_train.vq_loss"]
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert torch.equal(out.tokens, tokens)
    torch.testing.assert_close(out.f_hat, expected["quant_train.f_hat"], **FEATURES)


@pytest.mark.parametrize("name", ["grad_f", "grad_codebook", "grad_phi0_weight"])
def test_training_gradients(
    name: str, training: tuple[QuantizerOutput, dict[str, Tensor]], expected: dict[str, Tensor]
) -> None:
    reference = expected[f"quant_train.{name}"]
    difference = (training[1][name] - reference).norm() / reference.norm()
    assert difference < 1e-3
