"""How a diffusers pipeline calls its denoiser, and the same calls without the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.errors import UserError
from nextscale.training.kernels import trained_attention

Block = dict[str, Tensor]
"""Network arguments with one row per sample, such as the embeddings of the prompts, by name."""


class StopPipelineError(Exception):
    """Ends a pipeline's run where everything wanted is known."""


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser.

    Attributes:
        sample: Latents, of one block or of both.
        timestep: As given.
        arguments: The others; nested ones carry dotted names.
    """

    sample: Tensor
    timestep: Tensor
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallPlan:
    """How a pipeline calls its denoiser; the same for every sample.

    A block is one row per sample: conditional, or unconditional if there is guidance.

    Attributes:
        sample_name: The network's name for its latents.
        joint: All blocks go through the network in one call.
        weights: Per step, those of the blocks' outputs in what the scheduler gets.
        rows: Per block, names of the arguments that have rows.
        statics: Per block, the other arguments.
        times: What the network gets as timestep, per step.
        time_dtype: Its type.
        output_shape: Of one row of the network's output.
        latent_shape: Of one sample.
    """

    sample_name: str
    joint: bool
    weights: tuple[tuple[float, ...], ...]
    rows: tuple[tuple[str, ...], ...]
    statics: tuple[dict[str, Any], ...]
    times: tuple[float, ...]
    time_dtype: torch.dtype
    output_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]

    @property
    def conditional(self) -> int:
        """Which block is the conditional one: guidance gives it the largest weight."""
        first = [abs(weight) for weight in self.weights[0]]
        return first.index(max(first))

    def guided(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        latents: Float[Tensor, "b ..."],
        step: int,
        conditions: Sequence[Block],
    ) -> Float[Tensor, "b ..."]:
        """What the pipeline's scheduler would get at a step, float32."""
        times = torch.full((len(latents),), self.times[step], dtype=self.time_dtype)
        weights = self.weights[step]
        blocks = list(range(len(weights)))
        outputs = self.outputs(network, dtype, latents, times, conditions, blocks)
        return torch.stack([w * o for w, o in zip(weights, outputs, strict=True)]).sum(0)

    def adaptive(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        latents: Float[Tensor, "b ..."],
        step: int,
        conditions: Sequence[Block],
        guided: Bool[Tensor, " b"],
        threshold: float,
    ) -> tuple[Float[Tensor, "b ..."], Bool[Tensor, " b"]]:
        """`guided` for some samples alone: adaptive guidance (arXiv 2312.12487).

        Args:
            network: See `outputs`.
            dtype: See `outputs`.
            latents: One row per sample.
            step: Which.
            conditions: All blocks.
            guided: Samples with guidance; the others get the conditional output.
            threshold: Of 1 - cosine of the two outputs.

        Returns:
            What the scheduler would get, and the samples whose outputs differ by more than the
            threshold: those that are guided at the next step.
        """
        weights, found, stay = self.weights[step], torch.empty_like(latents).float(), guided.clone()
        for rows, blocks in ((guided, list(range(len(weights)))), (~guided, [self.conditional])):
            if not bool(rows.any()):
                continue
            few = [{name: value[rows] for name, value in c.items()} for c in conditions]
            times = torch.full((int(rows.sum()),), self.times[step], dtype=self.time_dtype)
            outputs = self.outputs(network, dtype, latents[rows], times, few, blocks)
            used = weights if len(outputs) == len(weights) else (sum(weights),)
            found[rows] = torch.stack([w * o for w, o in zip(used, outputs, strict=True)]).sum(0)
            if len(outputs) == 2:
                one, other = (output.flatten(1) for output in outputs)
                stay[rows] = 1 - F.cosine_similarity(one, other) > threshold
        return found, stay

    def outputs(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        latents: Float[Tensor, "b ..."],
        times: Tensor,
        conditions: Sequence[Block],
        blocks: Sequence[int],
    ) -> list[Tensor]:
        """The network's outputs for some blocks, float32, in as many calls as the pipeline's.

        Args:
            network: The denoiser, or what a training loop wrapped it in.
            dtype: Of its weights; latents and conditions are cast to it.
            latents: One row per sample.
            times: The network's timesteps, one per sample.
            conditions: All blocks.
            blocks: Those that are wanted.
        """
        outputs: list[Tensor] = []
        for group in [blocks] if self.joint else [[block] for block in blocks]:
            arguments = dict(self.statics[group[0]])
            for name, value in arguments.items():
                if isinstance(value, Tensor):  # the network may have moved since the plan
                    arguments[name] = value.to(latents.device)
            for name in self.rows[group[0]]:
                value = torch.cat([conditions[block][name] for block in group])
                arguments[name] = value.to(dtype) if value.is_floating_point() else value
            size = len(group)
            arguments[self.sample_name] = torch.cat([latents.to(dtype)] * size)
            arguments["timestep"] = times.to(latents.device).repeat(size)
            # Draws, judgements and references alike: they are compared with each other.
            with trained_attention(latents.device, network):
                output = network(**unflatten(arguments), return_dict=False)[0]
            outputs += _without_variance(output.float(), latents.shape[1]).chunk(size)
        return outputs

    def network_times(self, timesteps: Tensor, given: Sequence[float]) -> Tensor:
        """Any of the scheduler's timesteps as the network wants them: by an affine function.

        Args:
            timesteps: The scheduler's.
            given: The scheduler's at the plan's steps.
        """
        if given[0] == given[-1]:
            slope = self.times[0] / given[0] if given[0] else 1.0
        else:
            slope = (self.times[0] - self.times[-1]) / (given[0] - given[-1])
        times = self.times[0] + slope * (timesteps - given[0])
        floating = self.time_dtype.is_floating_point
        return (times if floating else times.round()).to(self.time_dtype)


class Listener:
    """Plays the denoiser and the scheduler for two samples, with random numbers.

    Args:
        name: Of the pipeline's class.
        output_shape: Of one row of the denoiser's output.

    Attributes:
        steps: The calls of each step so far.
        weights: Those of the blocks' outputs, per step.
    """

    def __init__(self, name: str, output_shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, output_shape
        self.generator = torch.Generator().manual_seed(0)
        self.steps: list[list[DenoiserCall]] = []
        self.weights: list[tuple[float, ...]] = []
        self._calls: list[DenoiserCall] = []
        self._outputs: list[Tensor] = []
        self._latents: Tensor | None = None

    def denoise(self, call: DenoiserCall) -> Tensor:
        """Random output, so that the weights of guidance can be told from the result."""
        if len(call.sample) % 2:
            refuse(self.name, "gives its network a batch that is no multiple of the samples")
        self._calls.append(call)
        output = torch.randn(len(call.sample), *self.shape, generator=self.generator)
        self._outputs.extend(output.split(2))
        return output.to(call.sample.device)

    def advance(self, handed: Tensor, sample: Tensor, num_steps: int) -> Tensor:
        """Random latents; the last step ends the run."""
        self._check_latents(sample)
        self.weights.append(self._solve(handed[:2].cpu(), sample.shape[1]))
        self.steps.append(self._calls)
        if len(self.weights[-1]) != len(self.weights[0]):
            refuse(self.name, "switches guidance on or off between steps")
        self._calls, self._outputs = [], []
        if len(self.steps) == num_steps:
            raise StopPipelineError
        self._latents = torch.randn(sample[:2].shape, generator=self.generator).to(sample)
        return self._latents

    def _check_latents(self, sample: Tensor) -> None:
        """Nothing may happen to the latents between the scheduler and the network."""
        expected = sample[:2] if self._latents is None else self._latents
        seen = [sample[:2], *(part for call in self._calls for part in call.sample.split(2))]
        for part in seen:
            if part.shape != expected.shape or not torch.equal(part.to(expected), expected):
                refuse(self.name, "changes the latents between its scheduler and its network")

    def _solve(self, handed: Tensor, channels: int) -> tuple[float, ...]:
        """Weights of the blocks in what the scheduler got."""
        blocks = [_without_variance(output, channels) for output in self._outputs]
        matrix = torch.stack([block.flatten() for block in blocks], 1).double()
        target = handed.double().flatten()[:, None]
        weights = torch.linalg.lstsq(matrix, target).solution
        error = (matrix @ weights - target).norm() / target.norm()
        if len(blocks) > 2 or not error < 1e-3:
            raise UserError(
                f"{self.name} does not guide by a weighted sum of a conditional and an "
                "unconditional output, so its steps cannot be evaluated again. Switch guidance off "
                "(guidance_scale 1), or use it plain (guidance_rescale 0, no normalisation)"
            )
        return tuple(round(weight, 6) for weight in weights[:, 0].tolist())


def split_arguments(
    one: DenoiserCall, two: DenoiserCall, name: str
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments that grow with the number of samples, and the other arguments.

    Args:
        one: A call for one sample.
        two: The same call for two.
        name: Of the pipeline's class.
    """
    rows, statics = [], {}
    for key, value in one.arguments.items():
        other = two.arguments.get(key)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            same = value == other
        elif value.ndim and len(value) == len(one.sample) and len(other) == len(two.sample):
            rows.append(key)
            continue
        else:
            same = torch.equal(value, other)
        if not same:
            refuse(name, f"gives its network an argument {key} that is no tensor of rows")
        statics[key] = value
    return tuple(rows), statics


def flatten(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; dicts without entries are gone."""
    arguments: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = arguments
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return arguments


def refuse(name: str, reason: str) -> NoReturn:
    """Say why pipelines of a class cannot be used."""
    raise UserError(f"{name} {reason}, so it cannot be used as a policy")


def _without_variance(output: Tensor, channels: int) -> Tensor:
    """Some networks learn a variance in a second half of their channels; it is not used."""
    return output[:, :channels] if output.shape[1] == 2 * channels else output
