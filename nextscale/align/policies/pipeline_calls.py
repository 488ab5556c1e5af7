"""A diffusers pipeline called for its parts: encoding, start, guidance, decoding.

The pipeline runs itself. For the time of a call, its denoiser and its scheduler's step are
replaced, so that everything around them is its own, whatever its class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from nextscale.align.policies.call_plan import (
    Block,
    CallPlan,
    DenoiserCall,
    Listener,
    StopPipelineError,
    flatten,
    refuse,
    split_arguments,
    unflatten,
)
from nextscale.errors import UserError

Denoise = Callable[[DenoiserCall], Tensor]
Advance = Callable[[Tensor, Tensor], Tensor]
"""What the scheduler gets and the latents before the step -> the latents after it."""


class PipelineCalls:
    """A pipeline called for its parts.

    Args:
        pipe: A text-to-image or class-conditional pipeline.
        settings: Arguments of every call: num_inference_steps, guidance_scale, height ...

    Raises:
        UserError: If it takes neither prompts nor class labels, or not these arguments.
    """

    def __init__(self, pipe: Any, settings: Mapping[str, Any]) -> None:
        self.pipe, self.settings, self.name = pipe, dict(settings), type(pipe).__name__
        accepted = inspect.signature(pipe.__call__).parameters
        if "class_labels" not in accepted and "num_images_per_prompt" not in accepted:
            refuse(self.name, "takes neither prompts nor class labels")
        self.by_class = "class_labels" in accepted
        for name in self.settings:
            if name not in accepted:
                refuse(self.name, f"has no argument {name}")
        self.sample_name = next(iter(inspect.signature(self.network.forward).parameters))

    @property
    def network(self) -> Any:
        """The denoiser."""
        for name in ("transformer", "unet"):
            if isinstance(module := getattr(self.pipe, name, None), nn.Module):
                return module
        refuse(self.name, "has neither a transformer nor a unet")

    def plan(self) -> CallPlan:
        """Find out how the denoiser is called, by two runs; only one sample goes through it.

        Raises:
            UserError: If what the scheduler gets is no weighted sum of the network's outputs at the
                scheduler's own latents.
        """
        alone, shape = self._first_calls()
        listener = Listener(self.name, shape)

        def advance(handed: Tensor, sample: Tensor) -> Tensor:
            return listener.advance(handed, sample, len(self.pipe.scheduler.timesteps))

        self._run(self._placeholders(2), listener.denoise, advance)
        rows, statics = [], []
        for call, pair in zip(alone, listener.steps[0], strict=True):
            names, rest = split_arguments(call, pair, self.name)
            rows.extend([names] * len(call.sample))
            statics.extend([rest] * len(call.sample))
        return CallPlan(
            sample_name=self.sample_name,
            joint=len(alone) == 1,
            weights=tuple(listener.weights),
            rows=tuple(rows),
            statics=tuple(statics),
            times=tuple(calls[0].timestep.flatten()[0].item() for calls in listener.steps),
            time_dtype=alone[0].timestep.dtype,
            output_shape=shape,
            latent_shape=tuple(alone[0].sample.shape[1:]),
        )

    def encode(self, plan: CallPlan, conditions: Sequence[Any]) -> tuple[Block, ...]:
        """Prompts or class labels as the pipeline hands them to its denoiser, block by block."""
        calls: list[DenoiserCall] = []
        self._run(self._conditions(conditions), _recorder(plan, calls), _stop)
        count = len(conditions)
        blocks: list[Block] = []
        for call in calls:
            for first in range(0, len(call.sample), count):
                part = slice(first, first + count)
                given = {name: call.arguments[name][part] for name in plan.rows[len(blocks)]}
                # Flux gives one row for a single negative prompt, and lets the network repeat it.
                repeats = {name: count if len(value) == 1 else 1 for name, value in given.items()}
                blocks.append({n: v.repeat_interleave(repeats[n], 0) for n, v in given.items()})
        return tuple(blocks)

    def start(
        self, plan: CallPlan, generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "b ..."]:
        """Latents before step 0, one sample per generator, float32."""
        calls: list[DenoiserCall] = []
        self._run(self._placeholders(len(generators), generators), _recorder(plan, calls), _stop)
        return calls[0].sample[: len(generators)].float()

    def decode(self, plan: CallPlan, latents: Float[Tensor, "b ..."]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1], float32; a safety checker of the pipeline stays on."""
        call = self._placeholders(len(latents)) | {"output_type": "pt"}
        result = self._run(call, _recorder(plan, []), lambda _output, sample: latents.to(sample))
        images = result.images
        if isinstance(images, np.ndarray):  # DiTPipeline knows no "pt"
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return images.to(latents.device, torch.float32)

    def latents(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b ..."]:
        """Pictures in [0, 1] as clean latents, float32: the mode of the VAE's posterior.

        diffusers has no function for it; this covers autoencoders that scale and shift or normalise
        their latents, Flux's packing, and pipelines without autoencoder.
        """
        pixels, vae = images * 2 - 1, getattr(self.pipe, "vae", None)
        if vae is None:
            return pixels
        encoded = vae.encode(pixels.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:  # of autoencoders without a distribution, which name it differently
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        latents, config = latents.float(), vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            latents = latents - latents.new_tensor(mean).reshape(shape)
            latents = latents / latents.new_tensor(std).reshape(shape)
        else:
            latents = latents - (config.get("shift_factor") or 0.0)
        latents = latents * config.get("scaling_factor", 1.0)
        pack = getattr(self.pipe, "_pack_latents", None)
        return latents if pack is None else pack(latents, *latents.shape)

    def pixels(self, latents: Float[Tensor, "b ..."]) -> Float[Tensor, "b 3 H W"]:
        """Clean latents as pictures in [0, 1], float32, with gradient: the inverse of `latents`.

        The pipeline's own decoding, `decode`, has none.

        Raises:
            UserError: For latents that the pipeline packs (Flux).
        """
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return (latents.float() / 2 + 0.5).clamp(0, 1)
        if hasattr(self.pipe, "_unpack_latents"):
            name = type(self.pipe).__name__
            raise UserError(f"{name} packs its latents, and there is no decoding with gradient")
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        scaled = latents.float() / config.get("scaling_factor", 1.0)
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            scaled = scaled * latents.new_tensor(std).reshape(shape)
            scaled = scaled + latents.new_tensor(mean).reshape(shape)
        else:
            scaled = scaled + (config.get("shift_factor") or 0.0)
        decoded = vae.decode(scaled.to(vae.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    # ---- parts -------------------------------------------------------------------------------

    def _placeholders(
        self, count: int, generators: Sequence[torch.Generator] | None = None
    ) -> dict[str, Any]:
        """Arguments of a call for `count` samples whose condition does not matter."""
        if generators is None:  # without any, the pipeline would use the global random state
            generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        call: dict[str, Any] = {"generator": list(generators)}
        if self.by_class:
            return call | {"class_labels": [0] * count}
        return call | {"prompt": "", "num_images_per_prompt": count}

    def _conditions(self, conditions: Sequence[Any]) -> dict[str, Any]:
        call = self._placeholders(len(conditions))
        if not self.by_class:
            return call | {"prompt": list(conditions), "num_images_per_prompt": 1}
        if any(isinstance(condition, str) for condition in conditions):
            return call | {"class_labels": self.pipe.get_label_ids(list(conditions))}
        return call | {"class_labels": [int(condition) for condition in conditions]}

    def _first_calls(self) -> tuple[list[DenoiserCall], tuple[int, ...]]:
        """The network calls of the first step of one sample, and the shape of a true output."""
        calls: list[DenoiserCall] = []
        shapes: list[tuple[int, ...]] = []
        network, forward = self.network, self.network.forward

        def denoise(call: DenoiserCall) -> Tensor:
            calls.append(call)
            given = {self.sample_name: call.sample, **call.arguments}
            # Frozen parts of a pipeline may be kept in fewer bits than a trained network.
            cast = {name: _cast(value, network.dtype) for name, value in given.items()}
            output = forward(**unflatten(cast), timestep=call.timestep, return_dict=False)[0]
            shapes.append(tuple(output.shape[1:]))
            return output

        self._run(self._placeholders(1), denoise, _stop)
        return calls, shapes[0]

    def _run(self, arguments: Mapping[str, Any], denoise: Denoise, advance: Advance) -> Any:
        """Call the pipeline with these in place of its denoiser and its scheduler's step."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        network, scheduler = self.network, self.pipe.scheduler
        signature = inspect.signature(network.forward)

        # Pipelines look at the signatures of both, to see which arguments are known.
        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(*args, **kwargs).arguments)
            as_dict = given.pop("return_dict", True)
            sample, timestep = given.pop(self.sample_name), given.pop("timestep")
            output = denoise(DenoiserCall(sample, torch.as_tensor(timestep), flatten(given)))
            return Transformer2DModelOutput(sample=output) if as_dict else (output,)

        @functools.wraps(scheduler.step)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            latents = advance(model_output, sample)
            # DiTPipeline keeps its latents twice when it guides.
            latents = latents.repeat(len(sample) // len(latents), *[1] * (latents.ndim - 1))
            pair = (latents, latents)  # PixArt takes the second if there is one step only
            return DDIMSchedulerOutput(*pair) if kwargs.get("return_dict", True) else pair

        with (
            _shadowed(network, "forward", forward),
            _shadowed(scheduler, "step", step),
            _shadowed(self.pipe, "progress_bar", functools.partial(tqdm, disable=True)),
            contextlib.suppress(StopPipelineError),
        ):
            return self.pipe(**self.settings | dict(arguments))


def _recorder(plan: CallPlan, calls: list[DenoiserCall]) -> Denoise:
    """A denoiser that notes how it is called and says nothing."""

    def denoise(call: DenoiserCall) -> Tensor:
        calls.append(call)
        return call.sample.new_zeros(len(call.sample), *plan.output_shape)

    return denoise


def _stop(_output: Tensor, _sample: Tensor) -> NoReturn:
    raise StopPipelineError


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


@contextlib.contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An object's own attribute in place of its class's, or of its former one."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
