"""`MultiscaleVQ`: images to tokens and back, its files, and the released format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule, TokenizerConfig
from nextscale.tokenizers.autoencoder import Downsample, Upsample
from nextscale.tokenizers.official import to_official
from nextscale.tokenizers.tokenizer import psnr

Golden = Callable[[str], dict[str, Tensor]]
SCALES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def official(tiny_tokenizer: MultiscaleVQ) -> dict[str, Tensor]:
    return to_official(tiny_tokenizer)


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- images and tokens -----------------------------------------------------------------------


def test_encode_gives_one_long_sequence_and_decode_gives_images(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    tokens = tiny_tokenizer.encode(images)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (4, 30)
    assert len(tokens.unique()) > 10
    decoded = tiny_tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert not decoded.requires_grad
    assert tiny_tokenizer.teacher_inputs(tokens).shape == (4, 29, 8)


def test_a_batch_of_four_encodes_as_four_single_images(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    tokens = tiny_tokenizer.encode(images)
    for i in range(4):
        assert torch.equal(tiny_tokenizer.encode(images[i : i + 1]), tokens[i : i + 1])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(tiny_tokenizer.encode(images[order]), tokens[order])


def test_steps_of_sampling_give_the_teacher_inputs(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    tokens = tiny_tokenizer.encode(images)
    quantizer, schedule = tiny_tokenizer.quantizer, tiny_tokenizer.schedule
    f_hat, inputs = torch.zeros(4, 8, 4, 4), []
    with torch.no_grad():
        for k, part in enumerate(schedule.split(tokens)):
            codes = quantizer.code_map(part, k, schedule)
            f_hat, following = quantizer.step(f_hat, codes, k, schedule)
            inputs.append(following.flatten(2).transpose(1, 2))
    assert torch.equal(torch.cat(inputs[:-1], dim=1), tiny_tokenizer.teacher_inputs(tokens))
    assert torch.equal(tiny_tokenizer.decode_latents(f_hat), tiny_tokenizer.decode(tokens))


def test_another_schedule_serves_for_one_call(tiny_tokenizer: MultiscaleVQ) -> None:
    image = torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scales = [1, (3, 2), (6, 4)]
    tokens = tiny_tokenizer.encode(image, scales)
    assert tokens.shape == (1, 1 + 6 + 24)
    assert tiny_tokenizer.decode(tokens, scales).shape == image.shape
    assert tiny_tokenizer.teacher_inputs(tokens, scales).shape == (1, 30, 8)
    assert torch.equal(tiny_tokenizer.encode(image, ScaleSchedule(scales)), tokens)


def test_a_single_scale_has_no_transformer_inputs(tiny_tokenizer: MultiscaleVQ) -> None:
    tokens = torch.zeros(2, 16, dtype=torch.long)
    assert tiny_tokenizer.teacher_inputs(tokens, [4]).shape == (2, 0, 8)


@torch.no_grad()
def test_decoded_images_are_clamped_and_the_training_forward_is_not(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    raw, quantized = tiny_tokenizer(images)
    assert raw.abs().max() > 1
    assert quantized is not None
    decoded = tiny_tokenizer.decode(quantized.tokens)
    assert decoded.abs().max() == 1
    torch.testing.assert_close(decoded, raw.clamp(-1, 1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_quantization_the_forward_is_the_plain_autoencoder(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    raw, quantized = tiny_tokenizer(images, quantize=False)
    assert quantized is None
    latents = tiny_tokenizer.latents(images)
    torch.testing.assert_close(
        raw.clamp(-1, 1), tiny_tokenizer.decode_latents(latents), atol=1e-4, rtol=0
    )


def test_images_of_any_float_type_are_taken(tiny_tokenizer: MultiscaleVQ, images: Tensor) -> None:
    assert torch.equal(tiny_tokenizer.encode(images.double()), tiny_tokenizer.encode(images))


def test_a_cast_tokenizer_keeps_its_quantizer_and_its_output_in_float32(
    tiny_tokenizer: MultiscaleVQ, images: Tensor
) -> None:
    cast = MultiscaleVQ(tiny_tokenizer.config).to_dtype(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert {p.dtype for p in cast.quantizer.parameters()} == {torch.float32}
    assert cast.latents(images).dtype == torch.float32
    tokens = cast.encode(images)
    assert cast.decode(tokens).dtype == cast.teacher_inputs(tokens).dtype == torch.float32


def test_downsampling_pads_the_bottom_and_the_right_only() -> None:
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)  # type: ignore[arg-type]
    out = layer(torch.ones(1, 1, 4, 4))
    assert out[0, 0].tolist() == [[9, 6], [6, 4]]  # symmetric padding: [[4, 6], [6, 9]]


def test_upsampling_repeats_the_nearest_pixel() -> None:
    layer = Upsample(1)
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)  # type: ignore[arg-type]
    out = layer(torch.tensor([[[[1.0, 2.0]]]]))
    assert out[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_psnr_is_in_decibels_per_image_with_a_peak_of_two() -> None:
    images = torch.zeros(2, 3, 4, 4)
    others = torch.stack([images[0] + 0.2, images[1] + 0.02])
    assert psnr(images, others).tolist() == pytest.approx([20, 40], abs=1e-4)


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"must be \[b, 3, H, W\]"),
        ((1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
        ((1, 3, 8, 7), "divisible by 2"),
        ((1, 3, 16, 16), r"latent grid \(8, 8\) does not match the last scale \(4, 4\)"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_images_of_a_wrong_shape_are_refused_and_never_resized(
    tiny_tokenizer: MultiscaleVQ, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_tokenizer.encode(torch.zeros(shape))


@pytest.mark.usefixtures("without_shape_checks")
def test_raw_bytes_are_refused(tiny_tokenizer: MultiscaleVQ) -> None:
    with pytest.raises(UserError, match=r"floats in \[-1, 1\], got torch.uint8"):
        tiny_tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("method", ["decode", "teacher_inputs"])
def test_a_wrong_token_count_is_refused(tiny_tokenizer: MultiscaleVQ, method: str) -> None:
    with pytest.raises(UserError, match="expected 30 tokens for the scales 1 2 3 4, got 29"):
        getattr(tiny_tokenizer, method)(torch.zeros(1, 29, dtype=torch.long))


def test_widths_that_the_norms_cannot_group_are_refused() -> None:
    with pytest.raises(UserError, match="norm_groups 32 does not divide the width 48"):
        TokenizerConfig(channels=48)


# ---- our files -------------------------------------------------------------------------------


def test_saved_and_loaded_tokenizers_are_equal(
    tiny_tokenizer: MultiscaleVQ, images: Tensor, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    again = MultiscaleVQ.from_pretrained(tmp_path)
    assert again.config == tiny_tokenizer.config
    assert not again.training
    assert equal_states(again.state_dict(), tiny_tokenizer.state_dict())
    assert torch.equal(again.encode(images), tiny_tokenizer.encode(images))
    assert torch.equal(
        again.decode_latents(torch.ones(1, 8, 4, 4)),
        tiny_tokenizer.decode_latents(torch.ones(1, 8, 4, 4)),
    )


def test_non_square_scales_survive_the_file(tmp_path: Path) -> None:
    config = TokenizerConfig(
        scales=(1, (2, 3)),
        codebook_size=4,
        codebook_dim=2,
        channels=4,
        channel_multipliers=(1,),
        norm_groups=2,
        num_phi=0,
        cosine=True,
    )
    MultiscaleVQ(config).save_pretrained(tmp_path)
    again = MultiscaleVQ.from_pretrained(tmp_path)
    assert again.config == config
    assert again.resolution == (2, 3)


def test_a_file_in_half_precision_keeps_the_codebook_exact(
    tiny_tokenizer: MultiscaleVQ, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = MultiscaleVQ.from_pretrained(tmp_path).state_dict()
    for name, tensor in tiny_tokenizer.state_dict().items():
        stored = tensor if name.startswith("quantizer.") else tensor.bfloat16().float()
        assert torch.equal(again[name], stored), name


def test_a_folder_of_another_class_or_format_is_refused(
    tiny_tokenizer: MultiscaleVQ, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "class": "NextScaleTransformer"}))
    with pytest.raises(UserError, match="describes a NextScaleTransformer, not a MultiscaleVQ"):
        MultiscaleVQ.from_pretrained(tmp_path)
    path.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UserError, match="diffusers' UNet2DConditionModel, which this does not"):
        MultiscaleVQ.from_pretrained(tmp_path)
    path.write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        MultiscaleVQ.from_pretrained(tmp_path)
    path.write_text(json.dumps({**config, "codebook_size": 33}))
    with pytest.raises(UserError, match="does not fit the model"):
        MultiscaleVQ.from_pretrained(tmp_path)


# ---- the released format ---------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "flat": lambda state: state,
    "training checkpoint": lambda state: {"epoch": 3, "trainer": {"vae_local": state}},
    "state_dict": lambda state: {"state_dict": state},
    "DDP prefix": lambda state: {f"module.{k}": v for k, v in state.items()},
    "inside another model": lambda state: {
        **{f"vae.{k}": v for k, v in state.items()},
        "var.pos_1LC": torch.zeros(1),
    },
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_released_weights_load_however_they_are_wrapped(
    tiny_tokenizer: MultiscaleVQ, official: dict[str, Tensor], tmp_path: Path, name: str, where: str
) -> None:
    source: Any = WRAPPERS[name](official)
    if where == "file":
        torch.save(source, tmp_path / "vae.pth")
        source = tmp_path / "vae.pth"
    loaded = MultiscaleVQ.from_official(source, SCALES)
    assert loaded.config == tiny_tokenizer.config
    assert not loaded.training
    assert equal_states(loaded.state_dict(), tiny_tokenizer.state_dict())


def test_released_weights_load_from_safetensors(
    tiny_tokenizer: MultiscaleVQ, official: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({k: v.contiguous() for k, v in official.items()}, path)
    loaded = MultiscaleVQ.from_official(str(path), SCALES)
    assert equal_states(loaded.state_dict(), tiny_tokenizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_released_weights_of_any_float_type_become_float32(
    official: dict[str, Tensor], dtype: torch.dtype
) -> None:
    cast = {k: v.to(dtype) for k, v in official.items()}
    loaded = MultiscaleVQ.from_official(cast, SCALES)
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32}
    assert equal_states(to_official(loaded), {k: v.float() for k, v in cast.items()})


def test_the_published_file_survives_the_way_there_and_back(golden: Golden) -> None:
    state = {k: v.float() for k, v in golden("vqvae_state").items()}
    assert equal_states(to_official(MultiscaleVQ.from_official(state, SCALES)), state)


def test_usage_statistics_of_another_schedule_are_left_out(official: dict[str, Tensor]) -> None:
    state = {**official, "quantize.ema_vocab_hit_SV": torch.ones(10, 32)}
    loaded = MultiscaleVQ.from_official(state, SCALES)
    assert torch.equal(loaded.quantizer.usage, torch.zeros(4, 32))
    state["quantize.ema_vocab_hit_SV"] = torch.ones(4, 32)
    assert MultiscaleVQ.from_official(state, SCALES).quantizer.usage.sum() == 128
    del state["quantize.ema_vocab_hit_SV"]
    assert MultiscaleVQ.from_official(state, SCALES).quantizer.usage.shape == (4, 32)


def test_a_transformer_in_place_of_the_tokenizer_is_named(golden: Golden) -> None:
    with pytest.raises(UserError, match="tokenizer and transformer swapped"):
        MultiscaleVQ.from_official(golden("var_state"), SCALES)


@pytest.mark.parametrize("missing", ["encoder.conv_in.weight", "quant_conv.weight"])
def test_a_state_dict_without_a_part_is_refused(official: dict[str, Tensor], missing: str) -> None:
    state = {k: v for k, v in official.items() if k != missing}
    with pytest.raises(UserError, match=f'no complete VAR tokenizer: "{missing}" is missing'):
        MultiscaleVQ.from_official(state, SCALES)


def test_a_tokenizer_of_another_kind_with_the_same_codebook_name_is_refused() -> None:
    state = {
        "quantize.embedding.weight": torch.zeros(16, 8),
        "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
        "encoder.conv_blocks.0.res.0.conv1.weight": torch.zeros(32, 32, 3, 3),
    }
    with pytest.raises(UserError, match="no complete VAR tokenizer"):
        MultiscaleVQ.from_official(state, SCALES)


def test_missing_and_foreign_tensors_are_named(official: dict[str, Tensor]) -> None:
    state = {k: v for k, v in official.items() if k != "decoder.conv_out.bias"}
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias is missing"):
        MultiscaleVQ.from_official(state, SCALES)
    with pytest.raises(UserError, match="extra is unexpected"):
        MultiscaleVQ.from_official({**official, "extra": torch.zeros(1)}, SCALES)


def test_a_truncated_file_and_one_with_code_in_it_are_refused(
    official: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "vae.pth"
    torch.save(official, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is not a whole PyTorch file"):
        MultiscaleVQ.from_official(path, SCALES)
    torch.save({"quantize.embedding.weight": nn.Linear(1, 1)}, path)
    with pytest.raises(UserError, match="could run code"):
        MultiscaleVQ.from_official(path, SCALES)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no state dict but list"):
        MultiscaleVQ.from_official(path, SCALES)
    with pytest.raises(UserError, match="There is no file"):
        MultiscaleVQ.from_official(tmp_path / "absent.pth", SCALES)


def test_the_scales_must_be_given_because_the_file_does_not_tell_them(
    official: dict[str, Tensor],
) -> None:
    with pytest.raises(UserError, match="does not tell its scales"):
        MultiscaleVQ.from_official(official, None)


@pytest.mark.parametrize("change", [{"norm_groups": 16}, {"phi_ratio": 0.2}, {"cosine": True}])
def test_settings_that_the_released_format_cannot_tell_are_not_written(
    tiny_tokenizer: MultiscaleVQ, change: dict[str, Any]
) -> None:
    other = MultiscaleVQ(replace(tiny_tokenizer.config, **change))
    with pytest.raises(UserError, match=f"the released format has {next(iter(change))}"):
        to_official(other)
