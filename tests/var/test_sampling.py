"""The sampler: draws that belong to the image, filters, guidance, prefixes and hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import stats
from torch import Tensor

from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import (
    Condition,
    NextScaleTransformer,
    SamplingConfig,
    ScaleStep,
    WordConditioner,
    sample,
)
from nextscale.var.block import Prepared
from nextscale.var.cache import KeyValueCache
from nextscale.var.filtering import ImageDraws, filter_logits, inverse_cdf

BuildModel = Callable[..., NextScaleTransformer]
LENGTHS = (1, 4, 9, 16)
LABELS, SEEDS = (0, 3, 1, 4), (5, 17, 17, 2**32 - 1)
PLAIN = SamplingConfig()
USUAL = SamplingConfig(guidance_scale=2.5, top_k=20, top_p=0.9, temperature=0.9)
SMOOTH = SamplingConfig(guidance_scale=2.5, top_k=20, more_smooth=True)


def run(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    settings: SamplingConfig,
    *,
    images: Sequence[int] = range(4),
    **options: Any,
) -> list[ScaleStep]:
    """All steps for the chosen of four images, each with its label and its seed."""
    condition = model.condition([LABELS[i] for i in images])
    if "draw" not in options:
        options["seeds"] = [SEEDS[i] for i in images]
    return list(sample(model, tokenizer, condition, settings, **options))


def tokens_of(steps: Sequence[ScaleStep]) -> Tensor:
    return torch.cat([step.tokens for step in steps], dim=1)


@contextmanager
def counted_rows(model: NextScaleTransformer) -> Iterator[list[int]]:
    """How many rows went through the first block at each scale."""
    rows: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


# ---- what a step yields ----------------------------------------------------------------------


def test_steps_carry_tokens_logits_and_the_map_so_far(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    steps = run(tiny_model, tiny_tokenizer, USUAL)
    assert [step.scale for step in steps] == [0, 1, 2, 3]
    tokens = tokens_of(steps)
    assert tokens.shape == (4, 30)
    assert len(tokens.unique()) > 10
    maps = [f for f, _ in tiny_tokenizer.quantizer.accumulate(tokens, tiny_tokenizer.schedule)]
    for step, length, f_hat in zip(steps, LENGTHS, maps, strict=True):
        assert step.logits.shape == (4, length, 32)
        assert step.logits.dtype == torch.float32
        assert not step.logits.requires_grad
        assert torch.equal(step.predicted, step.tokens)
        assert torch.equal(step.f_hat, f_hat)


def test_sampling_is_lazy(tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ) -> None:
    with counted_rows(tiny_model) as rows:
        steps = sample(tiny_model, tiny_tokenizer, tiny_model.condition([1]), PLAIN, seeds=[0])
        next(steps)
        next(steps)
        assert len(rows) == 2


def test_tokens_can_be_redrawn_with_torch_alone(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    steps = run(tiny_model, tiny_tokenizer, PLAIN)
    for i, seed in enumerate(SEEDS):
        uniforms = torch.rand(30, generator=torch.Generator().manual_seed(seed)).split(LENGTHS)
        for step, u in zip(steps, uniforms, strict=True):
            cumulated = step.logits[i].double().softmax(dim=-1).cumsum(dim=-1)
            expected = torch.searchsorted(cumulated, u[:, None].double(), right=True)
            assert torch.equal(step.tokens[i], expected[:, 0])


def test_a_low_precision_model_keeps_logits_and_map_in_float32(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ
) -> None:
    model = build_model().to(torch.bfloat16)
    for step in run(model, tiny_tokenizer, USUAL):
        assert step.logits.dtype == step.f_hat.dtype == torch.float32
        assert step.logits.isfinite().all()


# ---- randomness belongs to the image ---------------------------------------------------------


@pytest.mark.parametrize("settings", [PLAIN, USUAL, SMOOTH], ids=["plain", "usual", "smooth"])
def test_a_batch_of_four_is_four_batches_of_one(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, settings: SamplingConfig
) -> None:
    together = run(tiny_model, tiny_tokenizer, settings)
    for i in range(4):
        alone = run(tiny_model, tiny_tokenizer, settings, images=[i])
        assert torch.equal(tokens_of(alone), tokens_of(together)[i : i + 1])
        torch.testing.assert_close(
            alone[-1].f_hat, together[-1].f_hat[i : i + 1], atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("settings", [USUAL, SMOOTH], ids=["usual", "smooth"])
def test_permuting_the_batch_permutes_the_result(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, settings: SamplingConfig
) -> None:
    order = [2, 0, 3, 1]
    plain = tokens_of(run(tiny_model, tiny_tokenizer, settings))
    permuted = tokens_of(run(tiny_model, tiny_tokenizer, settings, images=order))
    assert torch.equal(permuted, plain[order])


def test_equal_seeds_draw_equally_and_others_do_not() -> None:
    logits = torch.zeros(4, 9, 32)
    drawn = ImageDraws(SEEDS, LENGTHS).tokens(2, logits)
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_sampling_leaves_the_global_random_state_alone(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    before = torch.get_rng_state()
    run(tiny_model, tiny_tokenizer, SMOOTH)
    assert torch.equal(torch.get_rng_state(), before)


def test_smooth_noise_follows_the_uniforms_in_the_images_own_stream() -> None:
    draws = ImageDraws([3, 8], LENGTHS)
    noise = [draws.gumbel(k, torch.zeros(2, n, 32)) for k, n in enumerate(LENGTHS)]
    for i, seed in enumerate((3, 8)):
        generator = torch.Generator().manual_seed(seed)
        torch.rand(30, generator=generator)
        for k, n in enumerate(LENGTHS):
            exponential = torch.empty(n, 32).exponential_(generator=generator)
            assert torch.equal(noise[k][i], -exponential.log())


def test_smooth_mode_mixes_only_codes_that_the_filters_leave(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    # With one code left, the mixture is that code.
    settings = SamplingConfig(top_k=1, more_smooth=True)
    smooth = run(tiny_model, tiny_tokenizer, settings)
    greedy = run(tiny_model, tiny_tokenizer, SamplingConfig(top_k=1))
    assert torch.equal(tokens_of(smooth), tokens_of(greedy))
    torch.testing.assert_close(smooth[-1].f_hat, greedy[-1].f_hat)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, seed: int
) -> None:
    condition = tiny_model.condition([0])
    with pytest.raises(UserError, match=rf"seed must be in \[0, 4294967295\].* got {seed}"):
        next(sample(tiny_model, tiny_tokenizer, condition, PLAIN, seeds=[seed]))


@pytest.mark.parametrize("seeds", [None, [], [1], [1, 2, 3]])
def test_every_image_needs_its_seed(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, seeds: list[int] | None
) -> None:
    condition = tiny_model.condition([0, 1])
    with pytest.raises(UserError, match="one seed for each of the 2 images"):
        next(sample(tiny_model, tiny_tokenizer, condition, PLAIN, seeds=seeds))


def test_a_tokenizer_of_other_scales_is_refused(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ
) -> None:
    model = build_model(scales=(1, 2, 4))
    with pytest.raises(UserError, match=r"\(1 2 4\) are not the tokenizer's \(1 2 3 4\)"):
        next(sample(model, tiny_tokenizer, model.condition([0]), PLAIN, seeds=[0]))


# ---- guidance --------------------------------------------------------------------------------


def test_guidance_one_runs_the_conditional_rows_alone(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    with counted_rows(tiny_model) as rows:
        off = run(tiny_model, tiny_tokenizer, PLAIN)
    assert rows == [4, 4, 4, 4]
    # The same scales with both halves computed, because a later scale is guided.
    with counted_rows(tiny_model) as rows:
        late = run(tiny_model, tiny_tokenizer, SamplingConfig(guidance_scale=(1, 1, 1, 3)))
    assert rows == [8, 8, 8, 8]
    for one, other in zip(off[:3], late[:3], strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.unconditional is None
        assert other.unconditional is None
        assert one.conditional is one.logits
    assert not torch.equal(off[3].logits, late[3].logits)


def test_guided_logits_lie_on_the_line_from_unconditional_through_conditional(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    settings = SamplingConfig(guidance_scale=4.0)
    for step, g in zip(run(tiny_model, tiny_tokenizer, settings), (1, 2, 3, 4), strict=True):
        if g == 1:
            assert step.unconditional is None
            continue
        assert step.unconditional is not None
        expected = step.unconditional + g * (step.conditional - step.unconditional)
        torch.testing.assert_close(step.logits, expected, atol=1e-4, rtol=0)


def test_guidance_zero_is_the_unconditional_model(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    settings = SamplingConfig(guidance_scale=0.0, guidance_schedule="constant")
    zero = tokens_of(run(tiny_model, tiny_tokenizer, settings))
    null = sample(tiny_model, tiny_tokenizer, tiny_model.null_condition(4), PLAIN, seeds=SEEDS)
    assert torch.equal(zero, tokens_of(list(null)))


def test_a_negative_condition_takes_the_place_of_the_null_condition(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    plain = run(tiny_model, tiny_tokenizer, USUAL)
    null = run(tiny_model, tiny_tokenizer, USUAL, negative=tiny_model.null_condition(4))
    other = run(tiny_model, tiny_tokenizer, USUAL, negative=tiny_model.condition([2] * 4))
    assert torch.equal(tokens_of(plain), tokens_of(null))
    assert not torch.equal(plain[1].logits, other[1].logits)
    same = run(tiny_model, tiny_tokenizer, USUAL, negative=tiny_model.condition(LABELS))
    torch.testing.assert_close(same[1].logits, same[1].conditional, atol=1e-4, rtol=0)


def test_guidance_values_of_every_schedule() -> None:
    official = 1.5
    expected = [1 + official * k / 9 for k in range(10)]
    linear = SamplingConfig(guidance_scale=1 + official)
    assert linear.guidance(10) == pytest.approx(expected)
    assert linear.guidance(10)[0] == 1
    constant = SamplingConfig(guidance_scale=2.5, guidance_schedule="constant")
    assert constant.guidance(3) == [2.5, 2.5, 2.5]
    assert SamplingConfig(guidance_scale=(1.0, 3.0, 2.0)).guidance(3) == [1, 3, 2]
    ended = SamplingConfig(guidance_scale=4.0, guidance_end=2)
    assert ended.guidance(4) == pytest.approx([1, 2, 1, 1])
    assert linear.guidance(1) == [2.5]


def test_guidance_end_drops_the_unconditional_rows_and_equals_ones_in_the_list(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    settings = SamplingConfig(guidance_scale=4.0, guidance_end=2)
    with counted_rows(tiny_model) as rows:
        ended = run(tiny_model, tiny_tokenizer, settings)
    assert rows == [8, 8, 4, 4]
    with counted_rows(tiny_model) as rows:
        listed = run(
            tiny_model, tiny_tokenizer, SamplingConfig(guidance_scale=(1.0, 2.0, 1.0, 1.0))
        )
    assert rows == [8, 8, 4, 4]
    assert torch.equal(tokens_of(ended), tokens_of(listed))
    full = run(tiny_model, tiny_tokenizer, SamplingConfig(guidance_scale=(1.0, 2.0, 1.0, 9.0)))
    assert torch.equal(tokens_of(full[:3]), tokens_of(ended[:3]))


def test_adaptive_guidance_ends_where_it_moves_nothing(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    plain = SamplingConfig(guidance_scale=4.0)
    full = run(tiny_model, tiny_tokenizer, plain)
    never = run(tiny_model, tiny_tokenizer, replace(plain, guidance_threshold=0.0))
    assert torch.equal(tokens_of(never), tokens_of(full))
    with counted_rows(tiny_model) as rows:
        at_once = run(tiny_model, tiny_tokenizer, replace(plain, guidance_threshold=1.0))
    assert rows == [8, 8, 4, 4]  # scale 1 is the first that is guided
    assert [step.rows for step in at_once] == rows
    ended = run(
        tiny_model, tiny_tokenizer, replace(plain, guidance_end=2, guidance_scale=(1, 2, 1, 1))
    )
    assert torch.equal(tokens_of(at_once), tokens_of(ended))


def test_adaptive_guidance_is_each_pictures_own(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    pipe = NextScalePipeline(tiny_tokenizer, tiny_model, SamplingConfig(guidance_scale=4.0))
    labels = list(range(5)) * 3
    moved = []
    for step in pipe.stream(
        tiny_model.conditioner.tokenize(labels), pipe.generation, seeds=list(range(15))
    ):
        if step.scale == 1:
            sides = [x.softmax(-1) for x in (step.conditional, step.logits)]
            moved = (sides[0] - sides[1]).abs().sum(-1).mean(-1) / 2
    ordered = torch.as_tensor(moved).sort().values  # half of the pictures go on guided; none is on
    threshold = float(ordered[7:9].mean())  # the threshold itself, where rounding would decide
    given: dict[str, Any] = {"class_labels": labels, "guidance_threshold": threshold}
    whole = pipe(seed=0, **given).tokens
    assert torch.equal(pipe(seed=0, batch_size=4, **given).tokens, whole)
    alone = [
        pipe(class_labels=[label], seed=i, guidance_threshold=threshold).tokens
        for i, label in enumerate(labels)
    ]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(pipe(class_labels=labels, seed=0).tokens, whole)


def test_temperatures_apply_per_scale(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    cold = SamplingConfig(temperature=(1e-4, 1e-4, 1.0, 1.0))
    for step in run(tiny_model, tiny_tokenizer, cold):
        greedy = step.logits.argmax(dim=-1)
        assert torch.equal(step.tokens, greedy) == (step.scale < 2)


@pytest.mark.parametrize("name", ["guidance_scale", "temperature"])
def test_a_list_needs_one_value_per_scale(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ, name: str
) -> None:
    settings = SamplingConfig(**{name: [1.0, 2.0]})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{name} needs one value for each of the 4 scales"):
        run(tiny_model, tiny_tokenizer, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, "top_p must be in .* got 0.0. Use 1.0"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0. Use top_k=1"),
        ({"temperature": (1.0, -1.0)}, "temperature must be positive"),
        ({"guidance_scale": -0.5}, "guidance_scale must be 0 or more"),
        ({"guidance_scale": math.nan}, "guidance_scale must be 0 or more"),
        ({"guidance_end": -1}, "guidance_end must be a scale, 0 or more, got -1"),
        ({"guidance_threshold": 2.0}, r"guidance_threshold must be in \[0, 1\], got 2.0"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule must be linear or constant"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)


# ---- prefix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["causal", "diagonal", "markov"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_resuming_from_a_prefix_equals_the_full_run(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ, policy: str, count: int
) -> None:
    model = build_model(mask_policy=policy)
    full = run(model, tiny_tokenizer, USUAL)
    rest = run(model, tiny_tokenizer, USUAL, prefix=tokens_of(full[:count]))
    assert [step.scale for step in rest] == list(range(count, 4))
    assert torch.equal(tokens_of(rest), tokens_of(full[count:]))
    for one, other in zip(rest, full[count:], strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.f_hat, other.f_hat, atol=1e-5, rtol=0)


def test_resuming_after_the_end_of_guidance_runs_the_conditional_rows_alone(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    settings = SamplingConfig(guidance_scale=4.0, guidance_end=2)
    full = run(tiny_model, tiny_tokenizer, settings)
    with counted_rows(tiny_model) as rows:
        rest = run(tiny_model, tiny_tokenizer, settings, prefix=tokens_of(full[:3]))
    assert rows[1:] == [4]  # after the pass over the prefix
    assert torch.equal(tokens_of(rest), tokens_of(full[3:]))


def test_a_prefix_of_all_scales_leaves_nothing_to_draw(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    full = tokens_of(run(tiny_model, tiny_tokenizer, USUAL))
    assert run(tiny_model, tiny_tokenizer, USUAL, prefix=full) == []


def test_a_prefix_holds_whole_scales(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    prefix = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(UserError, match=r"whole scales, \[1, 5, 14, 30\].* got 7"):
        run(tiny_model, tiny_tokenizer, USUAL, prefix=prefix)


def test_temperature_falls_over_the_scales() -> None:
    fall = SamplingConfig(temperature=1.0, temperature_end=0.8)
    assert fall.temperatures(5) == pytest.approx((1.0, 0.95, 0.9, 0.85, 0.8))
    late = replace(fall, temperature_power=2.0)
    assert late.temperatures(5) == pytest.approx((1.0, 0.9875, 0.95, 0.8875, 0.8))
    same = SamplingConfig(temperature=0.9, temperature_end=0.9)
    assert same.temperatures(7) == SamplingConfig(temperature=0.9).temperatures(7)
    for changes in (
        {"temperature_end": 0.0},
        {"temperature_power": 0.0},
        {"temperature": (1.0, 0.9), "temperature_end": 0.8},
    ):
        with pytest.raises(UserError, match="temperature"):
            SamplingConfig(**changes)


# ---- hooks -----------------------------------------------------------------------------------


class RecordingHooks:
    """Notes its calls and adds a ramp over the channels after one block."""

    def __init__(self, added: float = 0.0) -> None:
        self.added = added
        self.calls: list[tuple[str, int, int, int]] = []

    def before_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        self.calls.append(("before", block, where.start, where.stop))
        assert x.shape[1] == where.stop - where.start
        return x

    def after_block(self, block: int, where: slice, x: Tensor, prepared: Prepared) -> Tensor:
        self.calls.append(("after", block, where.start, where.stop))
        if block != 0 or not self.added:
            return x
        return x + self.added * torch.linspace(-1, 1, x.shape[-1])

    def select(self, rows: Tensor | slice) -> None:
        assert self.calls


def test_hooks_run_around_every_block_of_every_scale(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    hooks = RecordingHooks()
    hooked = run(tiny_model, tiny_tokenizer, USUAL, hooks=hooks)
    assert hooks.calls == [
        (name, block, where.start, where.stop)
        for where in tiny_model.schedule.slices
        for block in range(2)
        for name in ("before", "after")
    ]
    for one, other in zip(hooked, run(tiny_model, tiny_tokenizer, USUAL), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_hooks_act_alike_in_both_modes_and_on_a_prefix(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    plain = run(tiny_model, tiny_tokenizer, PLAIN)
    hooked = run(tiny_model, tiny_tokenizer, PLAIN, hooks=RecordingHooks(2.0))
    assert (hooked[0].logits - plain[0].logits).abs().max() > 0.1
    tokens = tokens_of(hooked)
    inputs = tiny_tokenizer.teacher_inputs(tokens)
    with torch.no_grad():
        logits = tiny_model(inputs, class_labels=LABELS, hooks=RecordingHooks(2.0))
    for step, part in zip(hooked, tiny_model.schedule.split(logits), strict=True):
        torch.testing.assert_close(step.logits, part, atol=2e-5, rtol=0)
    rest = run(tiny_model, tiny_tokenizer, PLAIN, prefix=tokens[:, :5], hooks=RecordingHooks(2.0))
    assert torch.equal(tokens_of(rest), tokens[:, 5:])
    torch.testing.assert_close(rest[0].logits, hooked[2].logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_identity_hooks_leave_teacher_forced_logits_bit_equal(
    tiny_model: NextScaleTransformer,
) -> None:
    inputs = torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(0))
    plain = tiny_model(inputs, class_labels=[1, 2])
    hooks = RecordingHooks()
    assert torch.equal(tiny_model(inputs, class_labels=[1, 2], hooks=hooks), plain)
    assert [call[:2] for call in hooks.calls] == [
        ("before", 0),
        ("after", 0),
        ("before", 1),
        ("after", 1),
    ]


# ---- cache and condition rows ----------------------------------------------------------------


def test_cache_rows_can_be_dropped_reordered_and_repeated() -> None:
    cache = KeyValueCache(
        depth=2,
        batch=4,
        heads=1,
        num_tokens=5,
        head_size=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    keys = torch.arange(4 * 2 * 3).view(4, 1, 2, 3).float()
    cache.update(1, slice(1, 3), keys, -keys)
    memory = cache.keys.data_ptr()
    cache.select(slice(0, 3))
    assert cache.keys.data_ptr() == memory  # a slice copies nothing
    cache.select(torch.tensor([2, 0, 0]))
    found, values = cache.read(1, slice(1, 3))
    assert torch.equal(found, keys[[2, 0, 0]])
    assert torch.equal(values, -keys[[2, 0, 0]])


def test_conditions_are_stacked_repeated_and_sliced_row_by_row() -> None:
    condition = Condition(
        torch.arange(2.0)[:, None], torch.arange(2.0).view(2, 1, 1), torch.tensor([[True], [False]])
    )
    twice = Condition.cat([condition, condition])
    assert twice.pooled[:, 0].tolist() == [0, 1, 0, 1]
    repeated = condition.repeat_interleave(2)
    assert repeated.pooled[:, 0].tolist() == [0, 0, 1, 1]
    assert repeated.context is not None
    assert repeated.context[:, 0, 0].tolist() == [0, 0, 1, 1]
    row = repeated[2:3]
    assert row.mask is not None
    assert row.mask.tolist() == [[False]]
    plain = Condition(torch.zeros(2, 1)).repeat_interleave(3)
    assert plain.context is None
    assert len(plain.pooled) == 6


def test_captions_of_different_length_sample_as_they_do_alone(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ
) -> None:
    conditioner = WordConditioner(
        width=32, words=("red", "circle"), max_words=4, encoder_width=16, encoder_heads=2
    )
    model = build_model(conditioner)
    prompts = ["red", "red circle red circle", ""]
    together = list(sample(model, tiny_tokenizer, model.condition(prompts), USUAL, seeds=[1, 2, 3]))
    for i, prompt in enumerate(prompts):
        condition = model.condition([prompt])
        alone = list(sample(model, tiny_tokenizer, condition, USUAL, seeds=[i + 1]))
        assert torch.equal(tokens_of(alone), tokens_of(together)[i : i + 1])


# ---- filters ---------------------------------------------------------------------------------

# Multiples of 1/8 make exact ties common; sums of probabilities stay off the borders of top_p.
logit_rows = st_numpy.arrays(
    np.float32, st.integers(2, 12), elements=st.integers(-32, 32).map(lambda n: n / 8)
)


def naive_filter(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Codes that survive, by sorting: those tied with the last survivor survive too."""
    kept = list(range(len(logits)))
    if 0 < top_k < len(logits):
        least = sorted(logits, reverse=True)[top_k - 1]
        kept = [i for i in kept if logits[i] >= least]
    if top_p < 1:
        weights = {i: math.exp(logits[i]) for i in kept}
        total, mass, least = sum(weights.values()), 0.0, math.inf
        for i in sorted(kept, key=lambda i: -logits[i]):
            if mass / total >= top_p:
                break
            mass += weights[i]
            least = logits[i]
        kept = [i for i in kept if logits[i] >= least]
    return set(kept)


@given(logit_rows, st.integers(0, 14), st.sampled_from([0.0137, 0.3139, 0.5171, 0.9631, 1.0]))
def test_filters_equal_a_sort(logits: np.ndarray, top_k: int, top_p: float) -> None:
    filtered = filter_logits(torch.from_numpy(logits)[None, None], top_k, top_p)[0, 0]
    kept = set(torch.nonzero(filtered.isfinite()).flatten().tolist())
    assert kept == naive_filter(logits, top_k, top_p)
    assert int(logits.argmax()) in kept
    assert torch.equal(filtered[list(kept)], torch.from_numpy(logits)[list(kept)])
    assert torch.all(filtered[[i for i in range(len(logits)) if i not in kept]] == -torch.inf)


def test_top_p_keeps_the_best_code_when_it_alone_exceeds_p() -> None:
    logits = torch.tensor([[[0.0, 9.0, 1.0]]])
    assert filter_logits(logits, 0, 0.01).isfinite().tolist() == [[[False, True, False]]]


def test_top_p_acts_on_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None, None]
    # Of all codes the first two hold 0.7; of the best two alone the first holds 4/7.
    assert filter_logits(logits, 0, 0.6).isfinite().sum() == 2
    assert filter_logits(logits, 2, 0.56).isfinite().sum() == 1


def test_every_code_tied_with_the_last_kept_one_survives() -> None:
    logits = torch.tensor([[[1.0, 3.0, 1.0, 0.0, 1.0]]])
    assert filter_logits(logits, 2, 1.0).isfinite().tolist()[0][0] == [
        True,
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("top_k", [0, 5, 9])
def test_filters_that_are_off_return_the_logits(top_k: int) -> None:
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filter_logits(logits, top_k, 1.0), logits)


# ---- the draw --------------------------------------------------------------------------------

LAST_UNIFORM = 1 - 2**-24  # the largest that torch.rand can return


@given(
    st_numpy.arrays(np.float32, 8, elements=st.floats(-20, 20, width=32)),
    st.sets(st.integers(0, 7), max_size=7),
    st.one_of(st.floats(0, LAST_UNIFORM, width=32), st.sampled_from([0.0, LAST_UNIFORM])),
)
def test_inverse_cdf_equals_a_loop(logits: np.ndarray, removed: set[int], uniform: float) -> None:
    logits = logits.copy()
    logits[list(removed)] = -np.inf
    drawn = int(inverse_cdf(torch.from_numpy(logits)[None, None], torch.tensor([[uniform]])))
    assert drawn not in removed
    weights = np.exp(logits.astype(np.float64) - logits.max())
    upper = np.cumsum(weights) / weights.sum()
    # Within the interval of the drawn code, up to float32 rounding of the cumulated sum.
    assert uniform < upper[drawn] + 1e-6
    assert uniform >= upper[drawn] - weights[drawn] / weights.sum() - 1e-6


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST_UNIFORM, 1.0])
def test_a_single_code_is_drawn_by_every_uniform(uniform: float) -> None:
    for code in (0, 3, 6):
        logits = torch.full((1, 1, 7), -torch.inf)
        logits[..., code] = 2.0
        assert inverse_cdf(logits, torch.tensor([[uniform]])).item() == code


def test_the_largest_uniform_draws_the_last_kept_code_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 64, 4096, generator=generator)
    logits[..., 4000:] = -torch.inf
    drawn = inverse_cdf(logits, torch.full((1, 64), LAST_UNIFORM))
    assert drawn.max() < 4000
    assert drawn.min() > 3980
    assert inverse_cdf(logits, torch.zeros(1, 64)).max() == 0


def test_uniforms_on_the_borders_belong_to_the_upper_code() -> None:
    logits = torch.zeros(1, 4, 4)
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.75]])
    assert inverse_cdf(logits, uniforms).tolist() == [[0, 1, 2, 3]]


def test_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.4, 0.0, 0.05, 0.25, 0.1, 0.2])
    count = 20_000
    draws = ImageDraws([7], [count])
    drawn = draws.tokens(0, probabilities.log().expand(1, count, 6))
    observed = torch.bincount(drawn[0], minlength=6)
    assert observed[1] == 0
    kept = probabilities > 0
    expected = probabilities[kept].double() / probabilities.double().sum() * count
    assert stats.chisquare(observed[kept].numpy(), expected.numpy()).pvalue > 1e-3
