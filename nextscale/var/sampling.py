"""The sampler: a generator that yields every scale.

Progress bars, previews, editing, control and rollouts all consume the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var.cache import KeyValueCache
from nextscale.var.conditioning import Condition
from nextscale.var.filtering import Draws, ImageDraws, filter_logits
from nextscale.var.transformer import BlockHooks, NextScaleTransformer, Prepared

GuidanceSchedule = Literal["linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn; also what `generation_config.json` stores."""

    guidance_scale: float | tuple[float, ...] = 1.0
    """g in logits = u + g (c - u); 1.0 is off. One number, or one per scale. The official VAR
    "cfg" is another number: cfg=1.5 is guidance_scale=2.5."""
    guidance_schedule: GuidanceSchedule = "linear"
    """linear ramps g from 1 at the first scale to guidance_scale at the last; constant does not."""
    control_guidance_scale: float | tuple[float, ...] | None = None
    """v in logits = u + g (c - u) + v (c' - c), with c' under control and c without, for three rows
    per image; scheduled as guidance_scale is. None: c' takes c's place, so g strengthens prompt
    and control together (ControlAR)."""
    control_in_negative: bool = False
    """The other side of guidance is under control too, so that g strengthens the prompt alone
    (CAR); not with control_guidance_scale."""
    guidance_end: int | None = None
    """Guidance is off from this scale on and the unconditional rows are dropped; None: never."""
    guidance_threshold: float | None = None
    """Adaptive guidance (arXiv 2312.12487): once guidance moves an image's distributions by no more
    than this, mean total variation in [0, 1] over the tokens of a scale, the image is drawn without
    it from the next scale on. The paper compares cosines of noise predictions. None: off."""
    top_k: int = 0
    """Keep the top_k most likely codes; 0 is off."""
    top_p: float = 1.0
    """Keep the most likely codes up to this probability mass; 1.0 is off."""
    temperature: float | tuple[float, ...] = 1.0
    """Divides the logits; one number, or one per scale."""
    temperature_end: float | None = None
    """Temperature of the last scale: T - (T - T_end) u^q at u = k / (K - 1), from `temperature` at
    the first. None: the same at all scales. ECM (arXiv 2510.05610) takes 1.0 to 0.8 after
    early-centric training."""
    temperature_power: float = 1.0
    """q of temperature_end."""
    more_smooth: bool = False
    """Mix code vectors by Gumbel-softmax instead of drawing one: prettier, never for FID."""
    num_candidates: int = 1
    """Pictures that the pipeline draws per image; it keeps the one whose tokens the model finds
    most likely, sum log p(token | condition) without guidance. `sample` itself draws one. Ours; 1
    is off, and the only value for FID."""

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "control_guidance_scale", "temperature"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.guidance_schedule not in ("linear", "constant"):
            raise UserError(
                f'guidance_schedule must be linear or constant, got "{self.guidance_schedule}"'
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p must be in (0, 1], got {self.top_p}. Use 1.0 to switch nucleus sampling "
                "off (the official VAR code uses 0.0)"
            )
        if self.num_candidates < 1:
            raise UserError(f"num_candidates must be 1 (off) or more, got {self.num_candidates}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if self.guidance_end is not None and self.guidance_end < 0:
            raise UserError(f"guidance_end must be a scale, 0 or more, got {self.guidance_end}")
        threshold = self.guidance_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"guidance_threshold must be in [0, 1], got {threshold}")
        if threshold is not None and self.control_guidance_scale is not None:
            raise UserError("guidance_threshold excludes control_guidance_scale; choose one")
        if self.temperature_end is not None and isinstance(self.temperature, tuple):
            raise UserError("temperature_end needs one temperature, got one per scale; choose one")
        if not 0 < self.temperature_power < float("inf"):
            raise UserError(
                f"temperature_power must be positive and finite, got {self.temperature_power}"
            )
        end = () if self.temperature_end is None else (self.temperature_end,)
        for value in (*_numbers(self.temperature), *end):
            if not 0 < value < float("inf"):
                raise UserError(
                    f"temperature must be positive and finite, got {value}. Use top_k=1 for the "
                    "most likely tokens"
                )
        for name in ("guidance_scale", "control_guidance_scale"):
            for value in _numbers(getattr(self, name) or 0.0):
                if not 0 <= value < float("inf"):
                    raise UserError(f"{name} must be 0 or more, got {value}; 1.0 is off")
        if self.control_in_negative and self.control_guidance_scale is not None:
            raise UserError("control_in_negative excludes control_guidance_scale; choose one")

    def guidance(self, num_scales: int) -> list[float]:
        """The factor g of every scale."""
        return self._scheduled("guidance_scale", num_scales)

    def control_guidance(self, num_scales: int) -> list[float] | None:
        """The factor v of every scale; None: control is not guided by itself."""
        if self.control_guidance_scale is None:
            return None
        return self._scheduled("control_guidance_scale", num_scales)

    def _scheduled(self, name: str, num_scales: int) -> list[float]:
        value = getattr(self, name)
        if isinstance(value, tuple):
            scales = list(_per_scale(name, value, num_scales))
        elif self.guidance_schedule == "linear":
            scales = [1 + (value - 1) * ratio(k, num_scales) for k in range(num_scales)]
        else:
            scales = [value] * num_scales
        end = num_scales if self.guidance_end is None else self.guidance_end
        return [g if k < end else 1.0 for k, g in enumerate(scales)]

    def temperatures(self, num_scales: int) -> tuple[float, ...]:
        """Temperature of every scale."""
        value = self.temperature
        if isinstance(value, tuple):
            return _per_scale("temperature", value, num_scales)
        fall = 0.0 if self.temperature_end is None else value - self.temperature_end
        power = self.temperature_power
        return tuple(value - fall * ratio(k, num_scales) ** power for k in range(num_scales))


@dataclass(frozen=True)
class Forcing:
    """Tokens that replace the drawn ones: the mechanism of editing.

    Attributes:
        tokens: [b, L], of the source picture.
        mask: [b, L], True where the source's token is taken.
    """

    tokens: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]

    def repeat_interleave(self, count: int) -> Forcing:
        """Each row `count` times in a row."""
        return Forcing(*(f.repeat_interleave(count, 0) for f in (self.tokens, self.mask)))


@dataclass
class ScaleStep:
    """What one scale yields.

    Attributes:
        scale: 0..K-1.
        predicted: [b, n_k^2], the drawn tokens.
        tokens: [b, n_k^2], after forcing; what the picture is made of.
        logits: [b, n_k^2, V], guided, before temperature and filters.
        conditional: Logits of the conditional rows; `logits` itself without guidance.
        unconditional: Logits of the unconditional rows, None where some were not needed.
        hidden: [b, n_k^2, d], last hidden states of the conditional rows.
        f_hat: [b, Z, h, w], F_k: decode it for a preview.
        rows: Rows that the transformer computed for it, those of guidance included.
    """

    scale: int
    predicted: Int[Tensor, "b l"]
    tokens: Int[Tensor, "b l"]
    logits: Float[Tensor, "b l v"]
    conditional: Float[Tensor, "b l v"]
    unconditional: Float[Tensor, "b l v"] | None
    hidden: Float[Tensor, "b l d"]
    f_hat: Float[Tensor, "b c h w"]
    rows: int


@torch.no_grad()
def sample(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    condition: Condition,
    config: SamplingConfig,
    *,
    seeds: Sequence[int] | None = None,
    draw: Draws | None = None,
    negative: Condition | None = None,
    forcing: Forcing | None = None,
    prefix: Int[Tensor, "b p"] | None = None,
    offset: Float[Tensor, "b d"] | None = None,
    branches: int = 1,
    hooks: BlockHooks | None = None,
) -> Iterator[ScaleStep]:
    """Decode scale by scale (VAR, arXiv 2404.02905, section 3).

    Differences from the released sampler: the AdaLN projections run once per picture, the cache is
    preallocated, the unconditional rows are skipped where they have no effect, and tokens are drawn
    by inverse CDF from one uniform per position of the image's own stream.

    Args:
        model: Transformer.
        tokenizer: Its tokenizer.
        condition: b rows.
        config: Guidance and filters.
        seeds: One per image; or
        draw: another source of randomness.
        negative: Condition of the guidance's other side; None: the null condition.
        forcing: Tokens that replace drawn ones.
        prefix: Tokens of the first scales; decoding starts after them, from one masked pass.
        offset: Added to the start token of each conditional row (learned starts).
        branches: Continue each row so many times, siblings one after the other: the prefix is
            computed once per row and its cache repeated. Seeds, draw and forcing have
            b * branches rows, and so have the steps.
        hooks: Control.

    Yields:
        One `ScaleStep` per decoded scale.
    """
    schedule, quantizer = model.schedule, tokenizer.quantizer
    if schedule != tokenizer.schedule:
        raise UserError(
            f"the transformer's scales ({schedule}) are not the tokenizer's ({tokenizer.schedule})"
        )
    batch, scales = len(condition.pooled), schedule.num_scales
    if draw is None:
        if seeds is None or len(seeds) != batch * branches:
            raise UserError(f"pass draw, or one seed for each of the {batch * branches} images")
        draw = ImageDraws(seeds, schedule.lengths)
    guidance, temperatures = config.guidance(scales), config.temperatures(scales)
    control_guidance = config.control_guidance(scales)
    if control_guidance is not None and hooks is None:
        raise UserError("control_guidance_scale needs a control; pass one, or leave it at None")
    # Unconditional rows are computed up to the last scale whose guidance needs them.
    factors = zip(guidance, control_guidance or guidance, strict=True)
    last_guided = max((k for k, both in enumerate(factors) if both != (1, 1)), default=-1)
    # Rows: under control, then (with control_guidance) of the same condition without, then the null
    # condition. Hooks see where control is absent by the order of rows.
    groups = [condition]
    if last_guided >= 0:
        groups += [condition] * (control_guidance is not None)
        groups += [negative or model.null_condition(batch)]
    prepared = model.prepare(Condition.cat(groups))
    if offset is not None:
        prepared = _moved(prepared, offset.repeat(max(len(groups) - 1, 1), 1))
    cache = model.new_cache(len(prepared.start))
    weight = quantizer.codebook.weight
    f_hat = weight.new_zeros(batch, weight.shape[1], *schedule.grid)
    inputs: Tensor | None = None
    begin = 0
    if prefix is not None:
        state = _run_prefix(model, tokenizer, prepared, cache, prefix, f_hat, hooks)
        begin, f_hat, inputs = state
    if branches > 1:
        batch *= branches
        rows = torch.arange(len(prepared.start), device=model.device).repeat_interleave(branches)
        prepared = prepared[rows]  # conditional rows first, then unconditional ones, as before
        cache.select(rows)
        if hooks is not None:
            hooks.select(rows)
        f_hat = f_hat.repeat_interleave(branches, 0)
        inputs = None if inputs is None else inputs.repeat_interleave(branches, 0)
    guided = torch.arange(batch, device=model.device)  # images whose guidance still matters
    for k in range(begin, scales):
        if k > last_guided and len(prepared.start) > batch:
            prepared = prepared[slice(0, batch)]
            cache.select(slice(0, batch))
            if hooks is not None:
                hooks.select(slice(0, batch))
        where = schedule.slices[k]
        rows = inputs
        if rows is not None and len(guided) < batch:
            rows = torch.cat([rows, rows[guided]]) if len(prepared.start) > batch else rows
        elif rows is not None and len(prepared.start) > batch:
            rows = rows.repeat(len(prepared.start) // batch, 1, 1)
        hidden = model.run(
            model.embed(rows, prepared, where),
            prepared,
            where=where,
            cache=cache,
            visible=slice(schedule.slices[model.first_visible(k)].start, where.stop),
            hooks=hooks,
        )
        computed = len(prepared.start)
        v = guidance[k] if control_guidance is None else control_guidance[k]
        if guidance[k] == v == 1 or not len(guided):
            hidden = hidden[:batch]
            conditional = logits = model.logits(hidden, prepared[slice(0, batch)])
            unconditional = None
        elif len(guided) < batch:
            conditional, other = model.logits(hidden, prepared).split([batch, len(guided)])
            logits, unconditional = conditional.clone(), None
            logits[guided] = torch.lerp(other, conditional[guided], guidance[k])
            hidden = hidden[:batch]
        else:
            conditional, *plain, unconditional = model.logits(hidden, prepared).split(batch)
            logits = torch.lerp(unconditional, plain[0] if plain else conditional, guidance[k])
            if plain:
                logits = logits + v * (conditional - plain[0])
            hidden = hidden[:batch]
        if config.guidance_threshold is not None and k < last_guided and guidance[k] != 1:
            moved = _variation(conditional[guided], logits[guided], temperatures[k])
            stay = moved > config.guidance_threshold
            guided, left = guided[stay], batch + stay.nonzero()[:, 0]
            chosen = torch.cat([torch.arange(batch, device=left.device), left])
            prepared = prepared[chosen]
            cache.select(chosen)
            if hooks is not None:
                hooks.select(chosen)
        kept = filter_logits(logits / temperatures[k], config.top_k, config.top_p)
        predicted = draw.tokens(k, kept)
        if config.more_smooth:
            codes = _smooth(kept, draw.gumbel(k, kept), ratio(k, scales)) @ weight
        else:
            codes = quantizer.lookup(predicted)
        tokens = predicted
        if forcing is not None:
            mask = forcing.mask[:, where]
            tokens = torch.where(mask, forcing.tokens[:, where], predicted)
            codes = torch.where(mask[..., None], quantizer.lookup(tokens), codes)
        code_map = codes.transpose(1, 2).reshape(batch, -1, *schedule.sides[k])
        f_hat, following = quantizer.step(f_hat, code_map, k, schedule)
        inputs = following.flatten(2).transpose(1, 2)
        yield ScaleStep(
            *(k, predicted, tokens, logits, conditional, unconditional, hidden, f_hat, computed)
        )


def _variation(
    plain: Float[Tensor, "b l v"], guided: Float[Tensor, "b l v"], temperature: float
) -> Float[Tensor, " b"]:
    """Total variation between what is drawn without and with guidance, mean over tokens."""
    sides = [(logits / temperature).softmax(-1) for logits in (plain, guided)]
    return (sides[0] - sides[1]).abs().sum(-1).mean(-1) / 2


def _moved(prepared: Prepared, offset: Tensor) -> Prepared:
    """With an offset on the start tokens of the first rows, the conditional ones."""
    if offset.shape != (len(offset), prepared.start.shape[-1]):
        raise UserError(
            f"an offset of the start token is [b, {prepared.start.shape[-1]}], "
            f"got {list(offset.shape)}"
        )
    start = prepared.start.clone()
    start[: len(offset), 0] += offset.to(start)
    return replace(prepared, start=start)


def _run_prefix(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    prepared: Prepared,
    cache: KeyValueCache,
    prefix: Tensor,
    f_hat: Tensor,
    hooks: BlockHooks | None,
) -> tuple[int, Tensor, Tensor | None]:
    """Fill the cache with the given first scales; returns (next scale, F, its inputs)."""
    schedule = model.schedule
    ends = [where.stop for where in schedule.slices]
    if prefix.shape[1] not in ends:
        raise UserError(
            f"a prefix holds whole scales, {ends} tokens for the scales {schedule}; "
            f"got {prefix.shape[1]}"
        )
    prefix = prefix.to(model.device)
    count = ends.index(prefix.shape[1]) + 1
    inputs: list[Tensor] = []
    for k in range(count):
        codes = tokenizer.quantizer.code_map(prefix[:, schedule.slices[k]], k, schedule)
        f_hat, following = tokenizer.quantizer.step(f_hat, codes, k, schedule)
        inputs.append(following.flatten(2).transpose(1, 2))
    where = slice(0, ends[count - 1])
    rows = torch.cat(inputs[:-1], dim=1) if count > 1 else None
    if rows is not None:
        rows = rows.repeat(len(prepared.start) // len(rows), 1, 1)
    mask = model.attention_mask()[where, where].to(model.device)
    x = model.embed(rows, prepared, where)
    model.run(x, prepared, where=where, mask=mask, cache=cache, visible=where, hooks=hooks)
    return count, f_hat, inputs[-1]


def _smooth(kept: Tensor, gumbel: Tensor, progress: float) -> Tensor:
    """softmax(((1 + u) l + gumbel) / tau), tau = max(0.27 (1 - 0.95 u), 0.005); -inf stays 0."""
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((kept * (1 + progress) + gumbel) / tau).softmax(dim=-1)


def ratio(scale: int, num_scales: int) -> float:
    """The place of a scale in [0, 1], u = k / (K - 1); 1 if there is one scale."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _per_scale(name: str, value: tuple[float, ...], num_scales: int) -> tuple[float, ...]:
    if len(value) != num_scales:
        raise UserError(f"{name} needs one value for each of the {num_scales} scales, got {value}")
    return value
