"""Denoising steps as Gaussians."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.objectives.kl import gaussian_kl
from nextscale.align.policies.gaussian import (
    MIN_STD,
    DDIMTransitions,
    FlowTransitions,
    ddim_mean,
    ddim_std,
    flow_diffusion,
    flow_mean,
    flow_std,
    gaussian_log_prob,
)
from nextscale.errors import UserError

diffusers: Any = pytest.importorskip("diffusers")
GOLDEN = Path(__file__).parents[1] / "golden" / "align"
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
}


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", cases("ddim_logprob"))
def test_ddim_equals_the_reference(case: dict[str, Any]) -> None:
    alphas = (case["alpha_t"], case["alpha_prev"])
    std = ddim_std(*alphas, case["eta"])
    assert std == pytest.approx(case["sigma"], rel=1e-9)
    sample, output = exact(case["sample"]), exact(case["model_output"])
    mean = ddim_mean(sample, output, *alphas, std, prediction_type=case["prediction_type"])
    torch.testing.assert_close(mean, exact(case["mean"]), **CLOSE)
    if "degenerate" in case:
        assert std < MIN_STD
        return
    drawn = exact(case["prev_sample"])
    torch.testing.assert_close(mean + std * exact(case["noise"]), drawn, **CLOSE)
    for reduction in ("mean", "sum"):
        wanted = exact(case[f"logprob_elements_{reduction}"])
        torch.testing.assert_close(gaussian_log_prob(drawn, mean, std, reduction), wanted, **CLOSE)
    kl = gaussian_kl(mean, exact(case["ref_mean"]), exact(std)) * mean[0].numel()
    torch.testing.assert_close(kl, exact(case["gaussian_kl_sum"]), **CLOSE)


@pytest.mark.parametrize("case", cases("flow_sde_logprob"))
def test_flow_equals_the_reference(case: dict[str, Any]) -> None:
    sigmas = (case["sigma"], case["sigma_next"])
    g = flow_diffusion(case["sigma"], case["noise_level"], case["sigma_max_substitute"])
    assert g == pytest.approx(case["diffusion_coef"], rel=1e-9)
    std = flow_std(*sigmas, g)
    assert std == pytest.approx(case["step_std"], rel=1e-9)
    mean = flow_mean(exact(case["sample"]), exact(case["velocity"]), *sigmas, g)
    torch.testing.assert_close(mean, exact(case["mean"]), **CLOSE)
    drawn = exact(case["prev_sample"])
    for reduction in ("mean", "sum"):
        wanted = exact(case[f"logprob_{reduction}"])
        torch.testing.assert_close(gaussian_log_prob(drawn, mean, std, reduction), wanted, **CLOSE)


@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [{"clip_sample": False}, {"clip_sample": True}])
def test_ddim_equals_diffusers(
    prediction: str, eta: float, spacing: str, clip: dict[str, bool]
) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **clip, **SPACINGS[spacing])
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(10)
    transitions = DDIMTransitions.of(scheduler, eta)
    sample, output, z = (normal(2, 4, 3, 3, seed=seed).double() for seed in range(3))
    for step, timestep in enumerate(scheduler.timesteps):
        for noise in (torch.zeros_like(z), z):
            given = {"eta": eta, "variance_noise": noise}
            theirs = scheduler.step(output, timestep, sample, **given).prev_sample
            ours = transitions.mean(step, sample, output, True) + transitions.std(step) * noise
            torch.testing.assert_close(ours, theirs, **CLOSE)
        theirs = scheduler.step(output, timestep, sample, eta=0.0).prev_sample
        ours = transitions.mean(step, sample, output, False)
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_ddim_thresholds_as_diffusers_does() -> None:
    scheduler = diffusers.DDIMScheduler(thresholding=True, prediction_type="sample")
    scheduler.set_timesteps(4)
    sample, output = normal(2, 4, 3, 3), 3 * normal(2, 4, 3, 3, seed=1)
    theirs = scheduler.step(output, scheduler.timesteps[1], sample).prev_sample
    ours = DDIMTransitions.of(scheduler, 1.0).mean(1, sample, output, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_without_noise_equals_diffusers(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    transitions = FlowTransitions.of(scheduler, 0.7)
    sample, output = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, timestep, sample).prev_sample
        torch.testing.assert_close(transitions.mean(step, sample, output, False), theirs)


def test_flow_sde_keeps_the_distribution_of_the_ode() -> None:
    # Pictures from N(2, 0.5^2): the velocity is known, and the SDE must end in the same place.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(400)
    transitions = FlowTransitions.of(scheduler, 0.7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    for step in range(400):
        s = transitions.sigmas[step]
        variance = (1 - s) ** 2 * 0.25 + s**2
        velocity = (s - (1 - s) * 0.25) / variance * (x - (1 - s) * 2) - 2
        mean = transitions.mean(step, x, velocity, True)
        x = mean + transitions.std(step) * torch.randn(x.shape, generator=generator)
    assert float(x.mean()) == pytest.approx(2, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_that_of_torch(reduction: str) -> None:
    mean, std = normal(3, 2, 4), 0.3
    value = mean + std * normal(3, 2, 4, seed=1)
    wanted = torch.distributions.Normal(mean, std).log_prob(value).flatten(1)
    found = gaussian_log_prob(value, mean, std, reduction)
    torch.testing.assert_close(found, wanted.sum(1) if reduction == "sum" else wanted.mean(1))


def test_log_prob_has_its_gradient_in_the_mean_only() -> None:
    mean = normal(2, 3).requires_grad_()
    value = (mean + 0.5 * normal(2, 3, seed=1)).clone()
    gaussian_log_prob(value, mean, 0.5, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, ((value - mean) / 0.25).detach())


def test_low_precision_is_computed_in_float32() -> None:
    sample, output = normal(2, 3).bfloat16(), normal(2, 3, seed=1).bfloat16()
    assert ddim_mean(sample, output, 0.5, 0.6, 0.1).dtype == torch.float32
    wanted = flow_mean(sample.float(), output.float(), 0.6, 0.5, 0.7)
    assert torch.equal(flow_mean(sample, output, 0.6, 0.5, 0.7), wanted)


def test_gaussian_kl_equals_its_expectation() -> None:
    mean, other, std = exact([[0.3, -0.2]]), exact([[0.0, 0.1]]), 0.5
    generator = torch.Generator().manual_seed(0)
    drawn = mean + std * torch.randn(400_000, 2, generator=generator, dtype=torch.float64)
    here, there = (gaussian_log_prob(drawn, m.expand_as(drawn), std) for m in (mean, other))
    h = here - there
    error = 4 * float(h.std()) / math.sqrt(len(h))
    assert float(gaussian_kl(mean, other, exact(std))) == pytest.approx(float(h.mean()), abs=error)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_only_a_last_step_to_the_clean_picture_has_no_noise(eta: float) -> None:
    for spacing, last in (("leading", False), ("trailing", True)):
        scheduler = diffusers.DDIMScheduler(**SPACINGS[spacing])
        scheduler.set_timesteps(8)
        stds = [DDIMTransitions.of(scheduler, eta).std(step) for step in range(8)]
        assert [std < MIN_STD for std in stds] == [False] * 7 + [last]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_right_answer_to_noised_latents_gives_the_latents(prediction: str) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(5)
    transitions = DDIMTransitions.of(scheduler, 1.0)
    clean, noise = normal(3, 4), normal(3, 4, seed=1)
    place = torch.tensor([0.0, 0.4, 0.7])
    noised = transitions.noised(clean, noise, place)
    assert noised.timesteps.tolist() == [0, 400, 700]
    alphas = torch.tensor([transitions.alphas[int(t)] for t in noised.timesteps])
    expected = (1 - alphas).sqrt() if prediction != "sample" else torch.ones(3)
    torch.testing.assert_close(noised.weight.flatten(), expected)
    for row in range(3):
        alpha = transitions.alphas[int(noised.timesteps[row])]
        one = (noised.latents[row : row + 1], noised.target[row : row + 1], alpha, 1.0, 0.0)
        found = ddim_mean(*one, prediction_type=prediction)
        torch.testing.assert_close(found[0], clean[row], rtol=1e-3, atol=1e-4)


def test_a_right_answer_to_a_noised_flow_gives_the_latents() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    transitions = FlowTransitions.of(scheduler, 0.7)
    clean, noise = normal(2, 4), normal(2, 4, seed=1)
    noised = transitions.noised(clean, noise, torch.tensor([0.25, 0.25]))
    assert noised.timesteps.tolist() == [250, 250]
    torch.testing.assert_close(flow_mean(noised.latents, noised.target, 0.25, 0.0, 0.0), clean)
    assert noised.weight.flatten().tolist() == [0.25, 0.25]


def test_sigmas_must_fall() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    with pytest.raises(UserError, match="invert_sigmas"):
        FlowTransitions.of(scheduler, 0.7)
