"""A generator of which only the start is tuned (FIND): opening, drawing, saving, and using it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.align.config import AlignConfig
from nextscale.align.models import AlignModel
from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.policies.start import StartPolicy, prompt_features
from nextscale.align.prompts import Condition, open_prompts
from nextscale.align.starts import TOKENS, StartDistribution, StartShape, read_starts, save_starts
from nextscale.errors import UserError, require
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import candidate_seeds, image_stream, stream
from nextscale.training import bare
from nextscale.var import SamplingConfig
from nextscale.var.lora import base_fingerprint

_MOST = 1000  # prompts of a table
_START = 13  # keeps the streams of starts apart from those of the pictures behind them


class StartModel:
    """A frozen generator behind learned starts; see `AlignModel`."""

    def __init__(self, inner: AlignModel, policy: StartPolicy) -> None:
        self.inner, self.start_policy = inner, policy
        self.policy: Any = policy
        self.num_classes, self.grammar = inner.num_classes, inner.grammar
        self.pipe = getattr(inner, "pipe", None)

    @property
    def resolution(self) -> tuple[int, int]:
        """See `AlignModel`."""
        return self.inner.resolution

    def check(self, conditions: Sequence[Condition]) -> None:
        """See `AlignModel`."""
        self.inner.check(conditions)
        self.start_policy.rows(conditions)

    def add_reference(self) -> nn.Module | None:
        """The distribution before training is known; see `AlignModel`."""
        return None

    def fingerprint(self) -> str:
        """See `AlignModel`."""
        return self.inner.fingerprint()

    def draw(
        self,
        network: nn.Module | None,
        conditions: Sequence[Condition],
        seeds: Sequence[int],
        start: Tensor | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """From starts that `network` draws; see `AlignModel`."""
        if network is None:
            return self.inner.draw(None, conditions, seeds, start)
        generation = getattr(self.pipe, "generation", None)
        start = draw_starts(
            self.start_policy, conditions, seeds, network=bare(network), generation=generation
        )
        return self.inner.draw(None, conditions, seeds, start)

    def save(self, network: nn.Module, folder: Path) -> None:
        """The start file; see `AlignModel`."""
        trained: Any = bare(network)
        save_starts(trained, folder, self.fingerprint())


def open_starts(config: AlignConfig, inner: AlignModel) -> StartModel:
    """Freeze a generator and put a new start distribution before it.

    Raises:
        UserError: For settings that do not fit the generator or the prompts.
    """
    base: Any = inner.policy
    base.network.requires_grad_(False).eval()
    settings = config.find
    diffusion = isinstance(base, DiffusionPolicy)
    of_tokens = "sharpness" if settings.amortised else "prefix_table"
    space = settings.space or ("noise" if diffusion else of_tokens)
    if diffusion and settings.deterministic and settings.suffixes > 1:
        raise UserError(
            f"find.suffixes is {settings.suffixes}, but without noise behind the start all of them "
            "are one picture: set find.suffixes 1, or find.no_deterministic"
        )
    asked, prompts = open_prompts(config.prompts, num_classes=inner.num_classes), None
    if not settings.amortised:
        prompts = tuple(dict.fromkeys(prompt.condition for prompt in asked))
        if len(prompts) > _MOST:
            raise UserError(
                f"a table for {len(prompts)} prompts would be too large (at most {_MOST}); leave "
                "find.amortised on, or give fewer prompts"
            )
    features = prompt_features(base, base.encode([asked[0].condition]))
    shape, std = _shape_of(base, space, settings.prefix_scales, features)
    with torch.random.fork_rng():
        torch.manual_seed(stream(config.seed).initial_seed())
        starts = StartDistribution(
            StartShape(
                space=space,
                shape=shape,
                initial_std=std if settings.initial_std is None else settings.initial_std,
                features=features.shape[1],
                prompts=prompts,
                hidden=settings.hidden,
                min_std=settings.min_std,
                lengths=base.units[: settings.prefix_scales] if space in TOKENS else (),
            ),
            value=settings.baseline == "value",
        ).to(features.device)
    policy = StartPolicy(
        base,
        starts,
        deterministic=settings.deterministic,
        logp_reduction=settings.logp_reduction,
    )
    return StartModel(inner, policy)


def draw_starts(
    policy: StartPolicy,
    conditions: Sequence[Any],
    seeds: Sequence[int],
    *,
    network: nn.Module | None = None,
    generation: SamplingConfig | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Starts of pictures by their seeds: latents, offsets [n, d], or tokens [n, p].

    A prefix is drawn from the uniforms that the stream of the picture, or of each of its
    candidates, begins with: an untrained distribution gives the picture that the generator draws
    without it.

    Args:
        policy: The start distribution and its generator.
        conditions: One per picture.
        seeds: Of the pictures.
        network: Another start distribution than the policy's own.
        generation: How a next-scale model draws: filters, and the number n / len(seeds) of
            candidates.
        batch_size: Starts at once.
    """
    prefix = policy.kind == "categorical"
    filters, parts = (0, 1.0), []
    if generation is not None:
        filters, each = (generation.top_k, generation.top_p), generation.num_candidates
        seeds = candidate_seeds(seeds, each)
        conditions = [condition for condition in conditions for _ in range(each)]
    for first in range(0, len(seeds), batch_size):
        rows = slice(first, first + batch_size)
        generators = [image_stream(s) if prefix else stream(s, _START) for s in seeds[rows]]
        encoded = policy.encode(list(conditions[rows]))
        with torch.no_grad():
            found = policy.draw(encoded, generators, network=network, filters=filters)
        parts.append(torch.cat(found, dim=1) if prefix else found[0])
    return torch.cat(parts)


class Start:
    """A start file together with the generator that it was trained for.

    Args:
        path: The file, or its folder.
        pipe: A NextScalePipeline, or a diffusers pipeline.
        settings: How a next-scale pipeline draws; None: its defaults.

    Raises:
        UserError: If there is no such file, or it is of other weights.
    """

    def __init__(self, path: str | Path, pipe: Any, settings: SamplingConfig | None = None) -> None:
        self.generation: SamplingConfig | None = None
        if isinstance(pipe, NextScalePipeline):
            self.generation = settings = settings or pipe.generation
            starts = read_starts(path, base_fingerprint(pipe.transformer)).to(pipe.device)
            base: Any = NextScalePolicy(pipe, replace(settings, top_k=0, top_p=1.0))
        else:
            base = DiffusionPolicy(pipe, num_inference_steps=2)
            starts = read_starts(path, base_fingerprint(base.network)).to(pipe.device)
        self.policy = StartPolicy(base, starts)

    def check(self, conditions: Sequence[str | int]) -> None:
        """Refuse prompts that there is no start for.

        Raises:
            UserError: For a prompt that a table does not hold.
        """
        self.policy.rows(conditions)

    def __call__(self, conditions: Sequence[str | int], seeds: Sequence[int]) -> Tensor:
        """What `pipe(..., start=)` takes, or diffusers' `latents=`: a row per picture or candidate.

        Args:
            conditions: Prompts or class labels, one per picture.
            seeds: Of the pictures, as many.

        Returns:
            As many rows, times the candidates of the settings.

        Raises:
            UserError: For a prompt that a table does not hold, or other than lists of one length.
        """
        if isinstance(conditions, str) or isinstance(seeds, int) or len(conditions) != len(seeds):
            raise UserError(
                "a start is drawn for a list of prompts and a list of as many seeds, got "
                f"{conditions!r} and {seeds!r}"
            )
        return draw_starts(self.policy, conditions, seeds, generation=self.generation)


def _shape_of(
    base: Any, space: str, scales: int, features: Tensor
) -> tuple[tuple[int, ...], float]:
    """Shape of one start, and the deviation before training."""
    if isinstance(base, DiffusionPolicy):
        return tuple(base.plan.latent_shape), 1.0
    if space == "embedding":
        return (features.shape[1],), 0.1 * float(features.square().mean().sqrt())
    most = base.num_steps - 1
    require("find.prefix_scales", scales, 0 < scales <= most, f"lie in [1, {most}]")
    return (sum(base.units[:scales]), base.model.config.codebook_size), 1.0
