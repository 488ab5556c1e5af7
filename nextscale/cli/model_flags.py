"""Flags that the commands with a model share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are drawn; None: the model's own setting."""

    guidance_scale: tuple[float, ...] | None = None
    """Guidance g in u + g (c - u): one number, or one per scale; 1.0 is off. The official
    cfg=1.5 is 2.5."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """linear ramps from 1 at the first scale to guidance_scale at the last."""
    guidance_end: int | None = None
    """Guidance is off from this scale on (0 is the first)."""
    guidance_threshold: float | None = None
    """Adaptive guidance: a picture goes on without it once it moves the distributions by no more
    than this, total variation in [0, 1]; of diffusers pipelines 1 - cosine of the predictions."""
    top_k: int | None = None
    """Keep this many most likely codes; 0 is off."""
    top_p: float | None = None
    """Keep this probability mass, in (0, 1]; 1.0 is off."""
    temperature: tuple[float, ...] | None = None
    """Divides the logits: one number, or one per scale."""
    temperature_end: float | None = None
    """Temperature of the last scale; it changes from `temperature` at the first."""
    temperature_power: float | None = None
    """How: linearly (1), later (above 1) or sooner (below 1)."""
    more_smooth: bool | None = None
    """Mix codes by Gumbel-softmax: smoother pictures, never for FID."""
    num_candidates: int | None = None
    """Draw so many pictures per image and keep the one that the model finds most likely; 1 is off,
    and the only value for FID."""

    def sampling(self) -> dict[str, Any]:
        """The settings that are given, as the pipeline takes them."""
        names = (*SamplingFlags.__dataclass_fields__, *ControlGuidanceFlags.__dataclass_fields__)
        given: dict[str, Any] = {name: getattr(self, name, None) for name in names}
        for name in ("guidance_scale", "control_guidance_scale", "temperature"):
            if given[name] is not None and len(given[name]) == 1:
                given[name] = given[name][0]
        return {k: v for k, v in given.items() if v not in (None, ())}


@dataclass(frozen=True, kw_only=True)
class ControlGuidanceFlags:
    """Guidance of control; None: the model's own setting."""

    control_guidance_scale: tuple[float, ...] | None = None
    """Guidance of control apart from that of the prompt: one number, or one per scale."""
    control_in_negative: bool | None = None
    """Control on both sides of guidance, so that guidance strengthens the prompt alone."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and where it runs."""

    model: str = "scenes"
    """A bundled model, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    local_files_only: bool = False
    """Do not go to the network."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; None: a GPU if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto: bfloat16 on GPUs and CPUs that multiply in it."""
