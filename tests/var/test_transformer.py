"""The transformer: one forward in two modes, what sees what, sizes and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule
from nextscale.var import (
    ClassConditioner,
    Condition,
    Conditioner,
    NextScaleTransformer,
    SamplingConfig,
    TransformerConfig,
    WordConditioner,
    sample,
)
from nextscale.var.official import to_official
from nextscale.var.transformer import initialize

BuildModel = Callable[..., NextScaleTransformer]
Golden = Callable[[str], dict[str, Tensor]]
SCALES, LENGTHS, TOKENS, WIDTH = (1, 2, 3, 4), (1, 4, 9, 16), 30, 32
POLICIES = ["causal", "diagonal", "markov"]
CLOSE = {"atol": 2e-5, "rtol": 0}


def words() -> WordConditioner:
    return WordConditioner(
        width=WIDTH,
        words=("a", "red", "green", "circle", "square"),
        max_words=6,
        encoder_width=16,
        encoder_depth=1,
        encoder_heads=2,
    )


def random_inputs(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS - 1, 8, generator=generator)


# ---- one forward, two modes ------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["class", "words", "shared"])
@torch.no_grad()
def test_cached_logits_equal_teacher_forced_logits_of_the_sampled_tokens(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ, policy: str, kind: str
) -> None:
    conditioner = words() if kind == "words" else None
    model = build_model(conditioner, mask_policy=policy, shared_modulation=kind == "shared")
    conditions = ["a red circle", "green square"] if kind == "words" else [1, 4]
    condition = model.condition(conditions)
    settings = SamplingConfig(guidance_scale=2.0, guidance_schedule="constant")
    steps = list(sample(model, tiny_tokenizer, condition, settings, seeds=[0, 1]))
    inputs = tiny_tokenizer.teacher_inputs(torch.cat([s.tokens for s in steps], dim=1))
    conditional = model(inputs, condition)
    unconditional = model(inputs, model.null_condition(2))
    assert (conditional - unconditional).abs().max() > 0.1
    for step, where in zip(steps, model.schedule.slices, strict=True):
        torch.testing.assert_close(step.conditional, conditional[:, where], **CLOSE)
        assert step.unconditional is not None
        torch.testing.assert_close(step.unconditional, unconditional[:, where], **CLOSE)


@pytest.mark.parametrize("scales", [(4,), ((1, 2), (2, 3), (4, 4)), (2, 4, 4)], ids=str)
@torch.no_grad()
def test_other_schedules_decode_as_they_are_teacher_forced(
    build_model: BuildModel, tiny_tokenizer: MultiscaleVQ, scales: tuple[Any, ...]
) -> None:
    tokenizer = MultiscaleVQ(replace(tiny_tokenizer.config, scales=scales)).eval()
    model = build_model(scales=scales)
    condition = model.condition([1, 4])
    settings = SamplingConfig(guidance_scale=3.0)
    steps = list(sample(model, tokenizer, condition, settings, seeds=[0, 1]))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    logits = model(tokenizer.teacher_inputs(tokens), condition)
    assert logits.shape[1] == ScaleSchedule(scales).num_tokens
    for step, part in zip(steps, model.schedule.split(logits), strict=True):
        torch.testing.assert_close(step.conditional, part, **CLOSE)


@torch.no_grad()
def test_hidden_states_of_a_step_give_its_conditional_logits(
    tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    condition = tiny_model.condition([0, 3])
    prepared = tiny_model.prepare(condition)
    settings = SamplingConfig(guidance_scale=3.0)
    for step in sample(tiny_model, tiny_tokenizer, condition, settings, seeds=[0, 1]):
        assert step.hidden.shape == (2, LENGTHS[step.scale], WIDTH)
        torch.testing.assert_close(tiny_model.logits(step.hidden, prepared), step.conditional)


@torch.no_grad()
def test_fewer_scales_give_the_first_logits_of_all(tiny_model: NextScaleTransformer) -> None:
    inputs, labels = random_inputs(), torch.tensor([1, 2])
    full = tiny_model(inputs, class_labels=labels)
    assert full.shape == (2, TOKENS, 32)
    for count in range(1, 5):
        length = sum(LENGTHS[:count])
        part = tiny_model(inputs[:, : length - 1], class_labels=labels, num_scales=count)
        torch.testing.assert_close(part, full[:, :length], **CLOSE)


@torch.no_grad()
def test_labels_ids_and_conditions_say_the_same(tiny_model: NextScaleTransformer) -> None:
    inputs = random_inputs()
    expected = tiny_model(inputs, tiny_model.condition([1, 2]))
    assert torch.equal(tiny_model(inputs, class_labels=[1, 2]), expected)
    assert torch.equal(tiny_model(inputs, class_labels=torch.tensor([1, 2])), expected)
    assert torch.equal(tiny_model(inputs, ids=torch.tensor([1, 2])), expected)


@torch.no_grad()
def test_a_batch_is_computed_image_by_image(tiny_model: NextScaleTransformer) -> None:
    inputs, labels = random_inputs(4), torch.tensor([1, 2, 0, 4])
    together = tiny_model(inputs, class_labels=labels)
    for i in range(4):
        alone = tiny_model(inputs[i : i + 1], class_labels=labels[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], **CLOSE)


# ---- what sees what --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "seers"),
    [
        ("causal", {1: {1, 2, 3}, 2: {2, 3}, 3: {3}}),
        ("diagonal", {1: {1}, 2: {2}, 3: {3}}),
        ("markov", {1: {1, 2}, 2: {2, 3}, 3: {3}}),
    ],
)
@torch.no_grad()
def test_a_change_of_one_scale_reaches_exactly_the_scales_that_may_see_it(
    build_model: BuildModel, policy: str, seers: dict[int, set[int]]
) -> None:
    model = build_model(depth=1, mask_policy=policy)
    inputs, labels = random_inputs(), torch.tensor([1, 2])
    before = model.schedule.split(model(inputs, class_labels=labels))
    for changed, expected in seers.items():
        where = model.schedule.slices[changed]
        other = inputs.clone()
        other[:, where.start - 1 : where.stop - 1] += 1
        after = model.schedule.split(model(other, class_labels=labels))
        moved = {k for k in range(4) if (after[k] - before[k]).abs().max() > 1e-3}
        assert moved == expected
        for k in set(range(4)) - expected:
            torch.testing.assert_close(after[k], before[k], **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mask_equals_a_loop_over_scales(build_model: BuildModel, policy: str) -> None:
    model = build_model(mask_policy=policy)
    owner = model.schedule.scale_index().tolist()
    oldest = {"causal": lambda k: 0, "diagonal": lambda k: k, "markov": lambda k: max(k - 1, 0)}
    expected = [[oldest[policy](i) <= j <= i for j in owner] for i in owner]
    assert model.attention_mask().tolist() == expected
    if policy == "causal":
        assert torch.equal(model.attention_mask(), model.schedule.causal_mask())


@torch.no_grad()
def test_padding_of_a_caption_has_no_influence(build_model: BuildModel) -> None:
    model = build_model(words())
    inputs = random_inputs(1)
    condition = model.condition(["red circle"])
    assert condition.context is not None
    assert condition.mask is not None
    noisy = torch.where(condition.mask[..., None], condition.context, 100.0)
    other = Condition(condition.pooled, noisy, condition.mask)
    torch.testing.assert_close(model(inputs, other), model(inputs, condition), **CLOSE)
    moved = Condition(condition.pooled, condition.context + 1, condition.mask)
    assert (model(inputs, moved) - model(inputs, condition)).abs().max() > 1e-3


@torch.no_grad()
def test_eval_mode_is_deterministic_and_drops_neither_paths_nor_labels(
    build_model: BuildModel,
) -> None:
    model = build_model(depth=3, drop_path=0.9)
    inputs, labels = random_inputs(64), torch.arange(64) % 5
    first = model(inputs, class_labels=labels)
    # With the released label dropout, some of 64 labels would be replaced.
    assert torch.equal(model(inputs, class_labels=labels), first)
    model.train()
    assert not torch.equal(model(inputs, class_labels=labels), first)
    plain = build_model(depth=3, drop_path=0.0).train()
    assert torch.equal(plain(inputs, class_labels=labels), first)


def test_drop_path_grows_linearly_with_depth_and_keeps_the_mean(build_model: BuildModel) -> None:
    model = build_model(depth=3, drop_path=0.5).train()
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    block = model.blocks[2]
    x, y, gate = torch.zeros(4000, 1, 2), torch.ones(4000, 1, 2), torch.ones(4000, 1, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = block._add(x, gate, y)  # type: ignore[operator]
    assert set(out.unique().tolist()) == {0, 2}  # dropped, or rescaled by 1 / keep
    assert torch.equal(out[..., 0], out[..., 1])
    assert out.mean().item() == pytest.approx(1, abs=0.06)
    assert build_model(depth=3).blocks[2].drop_path == pytest.approx(0.1 * 3 / 24)


# ---- sizes -----------------------------------------------------------------------------------


def count_parameters(depth: int, scales: tuple[int, ...], *, shared: bool) -> int:
    config = TransformerConfig(scales=scales, depth=depth, shared_modulation=shared)
    width = config.resolved_width
    with torch.device("meta"):
        model = NextScaleTransformer(config, ClassConditioner(width=width, num_classes=1000))
    count = sum(p.numel() for p in model.parameters())
    # The formula of next-scale.md 2.1, whose table needs 8 C per block where it says 7 C.
    tokens, v, z = ScaleSchedule(scales).num_tokens, 4096, 32
    adaln = (
        6 * width**2 + 6 * width + 6 * width * depth if shared else depth * 6 * width * (width + 1)
    )
    blocks = depth * (12 * width**2 + 8 * width + depth)
    head = 2 * width**2 + 2 * width + width * v + v
    inputs = z * width + width + 1001 * width + width + tokens * width + len(scales) * width
    assert count == blocks + adaln + head + inputs
    return count


@pytest.mark.parametrize(
    ("depth", "millions"), [(16, 310.28), (20, 600.92), (24, 1033.40), (30, 2010.02)]
)
def test_parameter_count_of_the_released_models(depth: int, millions: float) -> None:
    count = count_parameters(depth, TransformerConfig().scales, shared=False)  # type: ignore[arg-type]
    assert round(count / 1e6, 2) == millions


def test_parameter_count_of_the_released_512_model() -> None:
    scales = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    assert round(count_parameters(36, scales, shared=True) / 1e6, 2) == 2353.89


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="num_heads 3 does not divide width 32"):
        TransformerConfig(width=32, num_heads=3)


def test_initial_gates_are_small_and_initial_logits_nearly_flat(build_model: BuildModel) -> None:
    model = build_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initialize(model)
    logits = model(random_inputs(), class_labels=[0, 1])
    assert logits.abs().max() < 0.1
    weight = model.blocks.get_parameter("0.modulation.weight")
    std = (1 / 3 / WIDTH) ** 0.5
    assert weight[: 2 * WIDTH].std().item() == pytest.approx(1e-3 * std, rel=0.1)
    assert weight[2 * WIDTH :].std().item() == pytest.approx(0.5 * std, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(0.02 * std, rel=0.1)


# ---- bad input -------------------------------------------------------------------------------


def test_forward_says_what_is_missing_or_wrong(tiny_model: NextScaleTransformer) -> None:
    with pytest.raises(UserError, match="one of condition, class_labels or ids"):
        tiny_model(random_inputs())
    with pytest.raises(UserError, match="29 positions for the scales 1 2 3 4, got 30"):
        tiny_model(torch.zeros(1, 30, 8), class_labels=[0])
    with pytest.raises(UserError, match="class label 5 is out of range"):
        tiny_model(random_inputs(1), class_labels=[5])


# ---- our files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "words"])
@torch.no_grad()
def test_saved_and_loaded_transformers_are_equal(
    build_model: BuildModel, tmp_path: Path, kind: str
) -> None:
    conditioner: Conditioner = words()
    if kind == "class":
        conditioner = ClassConditioner(width=WIDTH, num_classes=2, class_names=["cat", "dog"])
    model = build_model(conditioner, mask_policy="markov", normalize_attention=False)
    model.save_pretrained(tmp_path)
    again = NextScaleTransformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.conditioner.config() == model.conditioner.config()
    assert not again.training
    conditions = ["cat", 0] if kind == "class" else ["a red circle", "square"]
    inputs = random_inputs()
    expected = model(inputs, model.condition(conditions))
    assert torch.equal(again(inputs, again.condition(conditions)), expected)


def test_a_file_in_half_precision_loads_as_float32(
    tiny_model: NextScaleTransformer, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    again = NextScaleTransformer.from_pretrained(tmp_path).state_dict()
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16().float()), name


def test_a_folder_of_another_kind_is_refused(
    tiny_model: NextScaleTransformer, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / "conditioner" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "kind": "telepathy"}))
    with pytest.raises(UserError, match='conditioner of kind "telepathy"'):
        NextScaleTransformer.from_pretrained(tmp_path)
    path.write_text(json.dumps({**config, "num_classes": 7}))
    with pytest.raises(UserError, match="does not fit the model"):
        NextScaleTransformer.from_pretrained(tmp_path)


# ---- the released format ---------------------------------------------------------------------

WRAPPERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "flat": lambda state: state,
    "training checkpoint": lambda state: {
        "epoch": 3,
        "trainer": {"var_wo_ddp": state, "vae_local": {}},
    },
    "DDP prefix": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled and wrapped": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_released_weights_load_however_they_are_wrapped(
    build_model: BuildModel, tmp_path: Path, name: str, shared: bool
) -> None:
    model = build_model(shared_modulation=shared)
    source = WRAPPERS[name](to_official(model))
    torch.save(source, tmp_path / "var.pth")
    for where in (source, tmp_path / "var.pth"):
        loaded = NextScaleTransformer.from_official(where, SCALES)
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


def test_heads_come_from_the_file_else_from_the_caller_else_from_the_depth(
    build_model: BuildModel,
) -> None:
    def heads(model: NextScaleTransformer, num_heads: int | None = None) -> int:
        state = to_official(model)
        loaded = NextScaleTransformer.from_official(state, SCALES, num_heads)
        return loaded.config.resolved_heads

    assert heads(build_model(num_heads=4)) == 4
    plain = build_model(num_heads=4, normalize_attention=False)
    assert heads(plain, num_heads=4) == 4
    assert heads(plain) == plain.config.depth
    with pytest.raises(UserError, match="num_heads 5 does not divide"):
        heads(plain, num_heads=5)


def test_a_released_token_count_tells_the_scales(build_model: BuildModel) -> None:
    scales = TransformerConfig().scales
    state = to_official(build_model(scales=scales, depth=1, num_heads=1))
    assert NextScaleTransformer.from_official(state).config.scales == scales


def test_an_unknown_token_count_needs_the_scales(build_model: BuildModel) -> None:
    state = to_official(build_model())
    with pytest.raises(UserError, match="has 30 positions, which is none of the released"):
        NextScaleTransformer.from_official(state)


def test_another_schedule_is_refused(build_model: BuildModel) -> None:
    state = to_official(build_model())
    with pytest.raises(UserError, match="1 2 3 5 give 39 tokens, the transformer has 30"):
        NextScaleTransformer.from_official(state, (1, 2, 3, 5))
    # 30 tokens too, but five scales: the table of scale embeddings does not fit.
    with pytest.raises(UserError, match="scale_embedding"):
        NextScaleTransformer.from_official(state, (1, 1, 2, 2, 2, 4))


def test_a_tokenizer_in_place_of_the_transformer_is_named(golden: Golden) -> None:
    with pytest.raises(UserError, match="tokenizer and transformer swapped"):
        NextScaleTransformer.from_official(golden("vqvae_state"), SCALES)


@pytest.mark.parametrize("missing", ["pos_start", "head.weight", "blocks.0.ffn.fc1.weight"])
def test_a_state_dict_without_a_part_is_refused(build_model: BuildModel, missing: str) -> None:
    state = {k: v for k, v in to_official(build_model()).items() if k != missing}
    with pytest.raises(UserError, match=f'no complete VAR transformer: "{missing}" is missing'):
        NextScaleTransformer.from_official(state, SCALES)


def test_a_depth_that_does_not_fit_names_the_tensors(build_model: BuildModel) -> None:
    state = to_official(build_model(depth=3))
    hole = {k: v for k, v in state.items() if not k.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"blocks\.1\.\S+ is missing.* and \d+ more"):
        NextScaleTransformer.from_official(hole, SCALES)
    extra = {**state, "blocks.2.attn.rope": torch.zeros(1)}
    with pytest.raises(UserError, match=r"blocks\.2\.attn\.rope is unexpected"):
        NextScaleTransformer.from_official(extra, SCALES)


def test_a_truncated_file_is_refused(build_model: BuildModel, tmp_path: Path) -> None:
    path = tmp_path / "var.pth"
    torch.save(to_official(build_model()), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"var\.pth is not a whole PyTorch file"):
        NextScaleTransformer.from_official(path, SCALES)


def test_models_that_the_released_format_cannot_hold_are_not_written(
    build_model: BuildModel,
) -> None:
    with pytest.raises(UserError, match="only class-conditional models"):
        to_official(build_model(words()))
    with pytest.raises(UserError, match="no mask policy markov"):
        to_official(build_model(mask_policy="markov"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_with_context_samples_in_half_precision(
    dtype: torch.dtype,
    tiny_tokenizer: MultiscaleVQ,
    build_model: Callable[..., NextScaleTransformer],
) -> None:
    words = WordConditioner(width=32, words=("red",), encoder_width=16, encoder_heads=2)
    model = build_model(words)
    exact = model(torch.zeros(1, 29, 8), model.condition(["red"]))
    half = model.to(dtype)
    logits = half(torch.zeros(1, 29, 8), half.condition(["red"]))
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
