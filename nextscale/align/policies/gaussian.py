"""Denoising steps as Gaussians: mean, deviation and log-probability, without any network."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import UserError, require

MIN_STD = 1e-8
"""A step with less noise than this has no density and counts in no loss."""
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def gaussian_log_prob(
    value: Float[Tensor, "b ..."], mean: Float[Tensor, "b ..."], std: float, reduction: str = "mean"
) -> Float[Tensor, " b"]:
    """Log-density of given latents, nats: the mean over their D dimensions, or the sum.

    The value takes no gradient: it was drawn. Computed in float32, or float64 if the mean is.

    Args:
        value: Drawn latents.
        mean: Of the step.
        std: The same in all dimensions, above 0.
        reduction: mean (per dimension) or sum (the joint density).
    """
    value = value.detach().to(mean.dtype)
    terms = -(value - mean).square() / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    terms = terms.flatten(1)
    return terms.sum(1) if reduction == "sum" else terms.mean(1)


def ddim_std(alpha: float, alpha_prev: float, eta: float) -> float:
    """Deviation of a DDIM step (Song et al. 2020, arXiv 2010.02502, equation 16).

    Args:
        alpha: Cumulative alpha at this step's timestep, in [0, 1].
        alpha_prev: The same at the next, less noisy one; 1 is the clean picture.
        eta: 0: deterministic; 1: as noisy as DDPM.
    """
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev) if alpha < 1 else 0.0
    return eta * math.sqrt(max(variance, 0.0))


def ddim_mean(
    sample: Float[Tensor, "b ..."],
    output: Float[Tensor, "b ..."],
    alpha: float,
    alpha_prev: float,
    std: float,
    *,
    prediction_type: str = "epsilon",
    clip: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "b ..."]:
    """Mean of a DDIM step (arXiv 2010.02502, equation 12), in float32 or better.

    As in diffusers, the noise is not derived again from a clipped picture.

    Args:
        sample: Latents before the step.
        output: Of the network, with guidance.
        alpha: Cumulative alpha at this step's timestep.
        alpha_prev: The same at the next one.
        std: From `ddim_std`.
        prediction_type: What the output is: epsilon, sample or v_prediction.
        clip: Applied to the predicted clean latents.
    """
    sample, output = _exact(sample), _exact(output)
    signal, noise = math.sqrt(alpha), math.sqrt(max(1 - alpha, 0.0))
    if prediction_type == "epsilon":
        clean, epsilon = (sample - noise * output) / signal, output
    elif prediction_type == "sample":
        clean, epsilon = output, (sample - signal * output) / noise
    else:
        clean, epsilon = signal * sample - noise * output, signal * output + noise * sample
    if clip is not None:
        clean = clip(clean)
    direction = math.sqrt(max(1 - alpha_prev - std**2, 0.0))
    return math.sqrt(alpha_prev) * clean + direction * epsilon


def flow_diffusion(sigma: float, noise_level: float, second_sigma: float) -> float:
    """Diffusion coefficient g of the flow SDE (Flow-GRPO, arXiv 2505.05470).

    g = a sqrt(s / (1 - s)), with the second sigma of the schedule in the denominator where s = 1.

    Args:
        sigma: Noise share s of this step, in (0, 1].
        noise_level: a.
        second_sigma: Sigma after the first step.
    """
    return noise_level * math.sqrt(sigma / (1 - (second_sigma if sigma >= 1 else sigma)))


def flow_std(sigma: float, sigma_next: float, diffusion: float) -> float:
    """Deviation of a flow SDE step, g sqrt(s - s')."""
    return diffusion * math.sqrt(max(sigma - sigma_next, 0.0))


def flow_mean(
    sample: Float[Tensor, "b ..."],
    velocity: Float[Tensor, "b ..."],
    sigma: float,
    sigma_next: float,
    diffusion: float,
) -> Float[Tensor, "b ..."]:
    """Mean of a flow SDE step (arXiv 2505.05470), in float32 or better; g = 0 is the Euler step.

    Args:
        sample: Latents before the step.
        velocity: Of the network, with guidance: noise - picture.
        sigma: Noise share s before the step.
        sigma_next: The same after it, smaller.
        diffusion: g, from `flow_diffusion`.
    """
    sample, velocity = _exact(sample), _exact(velocity)
    dt, half = sigma_next - sigma, diffusion**2 / (2 * sigma)
    return sample * (1 + half * dt) + velocity * ((1 + half * (1 - sigma)) * dt)


@dataclass(frozen=True)
class Noised:
    """Final latents, noised to places in [0, 1) of training time.

    Attributes:
        latents: [B, ...].
        timesteps: [B], of the scheduler.
        target: What the network should say there.
        weight: [B, 1, ...], makes errors of the network such of the final latents: the share of
            noise, or 1 where the network predicts these.
    """

    latents: Tensor
    timesteps: Float[Tensor, " b"]
    target: Tensor
    weight: Tensor


class Transitions(Protocol):
    """The steps of a sampler with a fixed number of them, as Gaussians."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the scheduler, falling."""
        ...

    def std(self, step: int) -> float:
        """Deviation of a step when it is stochastic."""
        ...

    def mean(self, step: int, sample: Tensor, output: Tensor, stochastic: bool) -> Tensor:
        """Mean of a step, stochastic or deterministic."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, place: Float[Tensor, " b"]) -> Noised:
        """Noisy latents at places in [0, 1) of training time."""
        ...


@dataclass(frozen=True)
class DDIMTransitions:
    """The steps of diffusers' `DDIMScheduler`.

    Attributes:
        timesteps: Of the network's training, falling.
        alphas: Cumulative alphas at all training timesteps.
        stride: Training timesteps per step.
        final_alpha: Beyond timestep 0.
        eta: Of stochastic steps.
        prediction_type: epsilon, sample or v_prediction.
        clip: Applied to the predicted clean latents; None: nothing.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    stride: int
    final_alpha: float
    eta: float
    prediction_type: str
    clip: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, scheduler: Any, eta: float) -> DDIMTransitions:
        """Of a scheduler whose timesteps are set."""
        config = scheduler.config
        known = config.prediction_type in PREDICTIONS
        require("prediction_type", config.prediction_type, known, f"be one of {PREDICTIONS}")
        clip: Callable[[Tensor], Tensor] | None = None
        if config.thresholding:
            clip = scheduler._threshold_sample
        elif config.clip_sample:
            limit = config.clip_sample_range
            clip = functools.partial(torch.clamp, min=-limit, max=limit)
        return cls(
            timesteps=tuple(scheduler.timesteps.tolist()),
            alphas=tuple(scheduler.alphas_cumprod.tolist()),
            stride=config.num_train_timesteps // scheduler.num_inference_steps,
            final_alpha=float(scheduler.final_alpha_cumprod),
            eta=eta,
            prediction_type=config.prediction_type,
            clip=clip,
        )

    def _alphas(self, step: int) -> tuple[float, float]:
        timestep = int(self.timesteps[step])
        following = timestep - self.stride
        return self.alphas[timestep], self.alphas[following] if following >= 0 else self.final_alpha

    def std(self, step: int) -> float:
        """Deviation of a step when it is stochastic; 0 where the next one is the clean picture."""
        return ddim_std(*self._alphas(step), self.eta)

    def mean(self, step: int, sample: Tensor, output: Tensor, stochastic: bool) -> Tensor:
        """Mean of a step, stochastic or with eta 0."""
        std = self.std(step) if stochastic else 0.0
        kind, clip = self.prediction_type, self.clip
        alphas = self._alphas(step)
        return ddim_mean(sample, output, *alphas, std, prediction_type=kind, clip=clip)

    def noised(self, clean: Tensor, noise: Tensor, place: Float[Tensor, " b"]) -> Noised:
        """x_t at timesteps floor(place N), and what the network should say there."""
        timesteps = (place * len(self.alphas)).floor()
        alphas = torch.tensor(self.alphas, device=clean.device)[timesteps.long()]
        signal, spread = _columns(alphas.sqrt(), clean), _columns((1 - alphas).sqrt(), clean)
        targets = {"epsilon": noise, "sample": clean}
        velocity = signal * noise - spread * clean
        target = targets.get(self.prediction_type, velocity)
        weight = torch.ones_like(spread) if self.prediction_type == "sample" else spread
        return Noised(signal * clean + spread * noise, timesteps, target, weight)


@dataclass(frozen=True)
class FlowTransitions:
    """The steps of diffusers' `FlowMatchEulerDiscreteScheduler`, as Flow-GRPO's SDE.

    Attributes:
        timesteps: Falling.
        sigmas: Noise shares, one more than there are steps; the last is 0.
        train_timesteps: Timestep at noise share 1.
        noise_level: a of stochastic steps.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    train_timesteps: int
    noise_level: float

    @classmethod
    def of(cls, scheduler: Any, noise_level: float) -> FlowTransitions:
        """Of a scheduler whose timesteps are set."""
        sigmas = tuple(scheduler.sigmas.tolist())
        if any(later >= sigma for sigma, later in itertools.pairwise(sigmas)):
            raise UserError(
                "the scheduler's sigmas do not fall from noise to picture; set invert_sigmas=False"
            )
        if noise_level and sigmas[0] >= 1 and len(sigmas) == 2:
            raise UserError("one flow step from pure noise has no noise level; use two or more")
        timesteps = tuple(scheduler.timesteps.tolist())
        return cls(timesteps, sigmas, scheduler.config.num_train_timesteps, noise_level)

    def _diffusion(self, step: int) -> float:
        # With noise_level 0 a single step from s = 1 would divide by nothing.
        if not self.noise_level:
            return 0.0
        return flow_diffusion(self.sigmas[step], self.noise_level, self.sigmas[1])

    def std(self, step: int) -> float:
        """Deviation of a step when it is stochastic; not 0 at the last one."""
        return flow_std(self.sigmas[step], self.sigmas[step + 1], self._diffusion(step))

    def mean(self, step: int, sample: Tensor, output: Tensor, stochastic: bool) -> Tensor:
        """Mean of a step, of the SDE or of the ODE."""
        diffusion = self._diffusion(step) if stochastic else 0.0
        return flow_mean(sample, output, self.sigmas[step], self.sigmas[step + 1], diffusion)

    def noised(self, clean: Tensor, noise: Tensor, place: Float[Tensor, " b"]) -> Noised:
        """(1 - s) x_0 + s noise at s = place, uniform and not shifted, and the velocity."""
        share = _columns(place, clean)
        timesteps, latents = place * self.train_timesteps, torch.lerp(clean, noise, share)
        return Noised(latents, timesteps, noise - clean, share)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _columns(values: Float[Tensor, " b"], like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
