"""The transformer and its sampler against the published implementation (tests/golden/README.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig, ScaleStep, sample
from nextscale.var.editing import box_mask, keep_tokens
from nextscale.var.filtering import filter_logits
from nextscale.var.official import official_name, to_official

Golden = Callable[[str], dict[str, Tensor]]
VARIANTS = ["var", "var_shared_aln", "var_no_l2norm"]
FEATURES = {"atol": 1e-4, "rtol": 0}
PIXELS = {"atol": 5e-4, "rtol": 0}
TEACHER_FORCED = {"atol": 1e-4, "rtol": 0}
GUIDED = {"atol": 5e-4, "rtol": 0}


@dataclass(frozen=True)
class Case:
    """One transformer of the reference data, loaded into our model."""

    name: str
    model: NextScaleTransformer
    state: dict[str, Tensor]
    expected: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class StoredDraws:
    """The exponential variables of the reference's own draws."""

    expected: dict[str, Tensor]
    name: str

    def tokens(self, scale: int, logits: Tensor) -> Tensor:
        exponential = self.expected[f"{self.name}.exp_draw.{scale}"]
        return (logits.softmax(dim=-1) / exponential).argmax(dim=-1)

    def gumbel(self, scale: int, logits: Tensor) -> Tensor:
        del logits
        return -self.expected[f"{self.name}.gumbel_exp_draw.{scale}"].log()


def load(name: str, golden: Golden, config: dict[str, Any]) -> Case:
    sizes = next(v for v in config["config"]["variants"] if v["name"] == name)
    model = NextScaleTransformer.from_official(
        golden(f"{name}_state"), config["config"]["patch_nums"], sizes["num_heads"]
    )
    return Case(name, model, golden(f"{name}_state"), golden(f"{name}_golden"), config)


@pytest.fixture(scope="module")
def tokenizer(golden: Golden, golden_config: dict[str, Any]) -> MultiscaleVQ:
    scales = golden_config["config"]["patch_nums"]
    return MultiscaleVQ.from_official(golden("vqvae_state"), scales)


@pytest.fixture(scope="module")
def images(golden: Golden) -> dict[str, Tensor]:
    return golden("vqvae_golden")


@pytest.fixture(scope="module")
def tokens(images: dict[str, Tensor]) -> Tensor:
    return torch.cat([images[f"idx.{k}"] for k in range(4)], dim=1)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, golden: Golden, golden_config: dict[str, Any]) -> Case:
    return load(request.param, golden, golden_config)


@pytest.fixture(scope="module")
def main(golden: Golden, golden_config: dict[str, Any]) -> Case:
    return load("var", golden, golden_config)


def pixels(tokenizer: MultiscaleVQ, f_hat: Tensor) -> Tensor:
    return (tokenizer.decode_latents(f_hat) + 1) / 2


# ---- weights ---------------------------------------------------------------------------------


def test_sizes_follow_from_the_shapes(case: Case) -> None:
    variant = next(v for v in case.config["config"]["variants"] if v["name"] == case.name)
    config = case.model.config
    assert config.depth == variant["depth"]
    assert config.resolved_width == variant["embed_dim"]
    assert config.resolved_heads == variant["num_heads"]
    assert config.shared_modulation == variant["shared_aln"]
    assert config.normalize_attention == variant["attn_l2_norm"]
    assert sum(p.numel() for p in case.model.parameters()) == case.config[f"{case.name}.params"]


def test_the_released_state_survives_the_way_there_and_back(case: Case) -> None:
    again = to_official(case.model)
    assert again.keys() == case.state.keys()
    for name, tensor in case.state.items():
        plain = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(again[name], plain), name


# ---- teacher forcing -------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Losses of the teacher-forced pass, and gradients of the mean cross-entropy by our names."""

    loss: float
    smoothed: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def trained(case: Case, images: dict[str, Tensor], tokens: Tensor) -> Trained:
    logits = case.model(images["var_input"], class_labels=case.expected["labels"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    smoothed = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1)
    names, parameters = zip(*case.model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return Trained(loss.item(), smoothed.item(), dict(zip(names, gradients, strict=True)))


@torch.no_grad()
def test_teacher_forced_logits(case: Case, images: dict[str, Tensor]) -> None:
    logits = case.model(images["var_input"], class_labels=case.expected["labels"])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, case.expected["tf.logits"], **TEACHER_FORCED)


@torch.no_grad()
def test_teacher_forced_logits_of_the_null_class(main: Case, images: dict[str, Tensor]) -> None:
    condition = main.model.null_condition(1)
    logits = main.model(images["var_input"][:1], condition)
    torch.testing.assert_close(logits, main.expected["tf.logits_uncond"], **TEACHER_FORCED)


def test_losses_plain_and_with_label_smoothing(case: Case, trained: Trained) -> None:
    scalars = case.config["scalars"]
    name = f"{case.name}.tf.ce_mean"
    assert trained.loss == pytest.approx(scalars[name], rel=1e-5)
    assert trained.smoothed == pytest.approx(scalars[f"{name}_label_smoothing_0.1"], rel=1e-5)


def test_gradient_norms_of_every_parameter(case: Case, trained: Trained) -> None:
    expected = case.config[f"{case.name}.grad_norms"]
    found = {official_name(name): g.norm().item() for name, g in trained.gradients.items()}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-3)


def test_stored_gradients(case: Case, trained: Trained) -> None:
    ours = {official_name(name): gradient for name, gradient in trained.gradients.items()}
    stored = [key for key in case.expected if key.startswith("tf.grad.")]
    assert stored
    for key in stored:
        reference = case.expected[key]
        difference = ours[key.removeprefix("tf.grad.")] - reference
        assert difference.norm() < 1e-3 * reference.norm(), key


def test_head_scales_beyond_the_clamp_get_no_gradient(case: Case, trained: Trained) -> None:
    name = "blocks.0.attention.log_scale"
    if not case.model.config.normalize_attention:
        assert name not in trained.gradients
        return
    # One head of block 0 exceeds ln 100 on purpose.
    beyond = case.model.get_parameter(name) > math.log(100)
    assert beyond.sum() == 1
    assert torch.equal(trained.gradients[name] == 0, beyond)


# ---- sampling --------------------------------------------------------------------------------


def test_greedy_tokens(case: Case, tokenizer: MultiscaleVQ) -> None:
    condition = case.model.condition(case.expected["labels"])
    settings = SamplingConfig(guidance_scale=2.5, top_k=1)  # the official cfg=1.5
    for step in sample(case.model, tokenizer, condition, settings, seeds=[0, 1]):
        assert torch.equal(step.tokens, case.expected[f"greedy.idx.{step.scale}"])


def test_greedy_logits_maps_and_picture(main: Case, tokenizer: MultiscaleVQ) -> None:
    condition = main.model.condition(main.expected["labels"])
    settings = SamplingConfig(guidance_scale=2.5, top_k=1)
    steps = list(sample(main.model, tokenizer, condition, settings, seeds=[0, 1]))
    for step in steps:
        reference = main.expected[f"greedy.cfg_logits.{step.scale}"]
        torch.testing.assert_close(step.logits, reference, **GUIDED)
        reference = main.expected[f"greedy.f_hat.{step.scale}"]
        torch.testing.assert_close(step.f_hat, reference, **FEATURES)
    picture = pixels(tokenizer, steps[-1].f_hat)
    torch.testing.assert_close(picture, main.expected["greedy.image"], **PIXELS)


def stochastic(
    main: Case, tokenizer: MultiscaleVQ, name: str
) -> Iterator[tuple[ScaleStep, SamplingConfig]]:
    cfg, top_k, top_p, _, smooth = main.config["config"]["samples"][name]
    settings = SamplingConfig(
        guidance_scale=1 + cfg, top_k=top_k, top_p=top_p or 1.0, more_smooth=smooth
    )
    labels = main.expected["labels"][: main.config["config"]["sample_B"]]
    draws = StoredDraws(main.expected, name)
    condition = main.model.condition(labels)
    for step in sample(main.model, tokenizer, condition, settings, draw=draws):
        yield step, settings


@pytest.mark.parametrize(("name", "tolerance"), [("sample", 5e-4), ("smooth", 5e-3)])
def test_stochastic_sampling_with_the_stored_draws(
    main: Case, tokenizer: MultiscaleVQ, name: str, tolerance: float
) -> None:
    steps = []
    for step, settings in stochastic(main, tokenizer, name):
        k = step.scale
        torch.testing.assert_close(
            step.logits, main.expected[f"{name}.cfg_logits.{k}"], atol=tolerance, rtol=0
        )
        kept = filter_logits(step.logits, settings.top_k, settings.top_p).isfinite().sum(dim=-1)
        assert torch.equal(kept.int(), main.expected[f"{name}.kept_count.{k}"])
        assert torch.equal(step.tokens, main.expected[f"{name}.idx.{k}"])
        steps.append(step)
    f_hat = steps[-1].f_hat
    torch.testing.assert_close(f_hat, main.expected[f"{name}.f_hat_last"], **FEATURES)
    torch.testing.assert_close(pixels(tokenizer, f_hat), main.expected[f"{name}.image"], **PIXELS)


# ---- editing ---------------------------------------------------------------------------------


def test_edit_mask(main: Case, tokenizer: MultiscaleVQ) -> None:
    mask = box_mask(tokenizer.schedule, tuple(main.config["config"]["edit_box"]), "inpaint")
    assert torch.equal(mask, main.expected["edit.mask"])


@pytest.mark.parametrize("name", ["edit_class", "edit_inpaint"])
def test_editing(main: Case, tokenizer: MultiscaleVQ, tokens: Tensor, name: str) -> None:
    forcing = keep_tokens(tokenizer.schedule, tokens[:1], main.expected["edit.mask"])
    condition = main.model.condition(main.expected[f"{name}.label"])
    settings = SamplingConfig(guidance_scale=4.0, top_k=1)  # the official cfg=3
    steps = list(sample(main.model, tokenizer, condition, settings, seeds=[0], forcing=forcing))
    for step in steps:
        assert torch.equal(step.predicted, main.expected[f"{name}.pred_idx.{step.scale}"])
    f_hat = steps[-1].f_hat
    torch.testing.assert_close(f_hat, main.expected[f"{name}.f_hat_last"], **FEATURES)
    if f"{name}.image" in main.expected:
        picture = pixels(tokenizer, f_hat)
        torch.testing.assert_close(picture, main.expected[f"{name}.image"], **PIXELS)
