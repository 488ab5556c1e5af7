"""Control modules: absent = untouched, cached = teacher-forced, causal, additive, on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.control import (
    AdapterConfig,
    AdditiveConfig,
    Control,
    ControlHooks,
    ControlModule,
    ControlRecord,
    SideNetworkConfig,
    attach,
    build_control,
    read_control,
)
from nextscale.control.encoder import ControlEncoder, EncoderConfig
from nextscale.control.module import ControlConfig, check_base, evenly
from nextscale.control.train import ControlledTransformer
from nextscale.errors import UserError
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule
from nextscale.var import (
    ClassConditioner,
    NextScaleTransformer,
    SamplingConfig,
    ScaleStep,
    TransformerConfig,
    sample,
)
from nextscale.var.lora import base_fingerprint
from nextscale.var.official import to_official
from nextscale.var.transformer import initialize

ENCODER = EncoderConfig(width=16, depth=1, heads=2)
KINDS: dict[str, ControlConfig] = {
    "additive": AdditiveConfig(encoder=ENCODER, num_sites=2),
    "per scale": AdditiveConfig(encoder=ENCODER, num_sites=1, projection="per_scale"),
    "adapter": AdapterConfig(encoder=ENCODER, num_sites=2, mlp_ratio=2),
    "adapter, plain": AdapterConfig(
        encoder=ENCODER, num_sites=2, share_ffn=False, gate="none", modulation_rank=4,
        context="control", inject="output",
    ),
    "side network": SideNetworkConfig(encoder=ENCODER),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
LABELS, SEEDS = (0, 3, 1), (5, 17, 2**32 - 1)
PLAIN = SamplingConfig()
GUIDED = SamplingConfig(guidance_scale=2.5, top_k=20, temperature=0.9)
MAPS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))

Build = Callable[..., ControlModule]


@pytest.fixture
def build(tiny_model: NextScaleTransformer) -> Build:
    """A module for the tiny model; `trained` fills all of its weights."""

    def new(kind: str, *, trained: bool = True, seed: int = 3) -> ControlModule:
        record = ControlRecord(
            type="canny", resolution=(8, 8), base_fingerprint=base_fingerprint(tiny_model)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = build_control(KINDS[kind], tiny_model.config, record)
        if trained:
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += noise * 0.5 / max(parameter[0].numel(), 4) ** 0.5
        return module.eval()

    return new


def hooks_of(
    model: NextScaleTransformer,
    modules: Sequence[ControlModule],
    controls: Sequence[dict[str, Any]] = ({},),
    *,
    maps: Tensor = MAPS,
    cached: bool,
    every_row: bool = False,
) -> ControlHooks:
    with torch.no_grad():
        parts = [
            attach(module, maps, Control(image=None, type="canny", **control))
            for module, control in zip(modules, controls, strict=True)
        ]
    return ControlHooks(model, parts, cached=cached, every_row=every_row)


def draw(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    settings: SamplingConfig = GUIDED,
    hooks: ControlHooks | None = None,
    **options: Any,
) -> list[ScaleStep]:
    options.setdefault("seeds", SEEDS)
    return list(sample(model, tokenizer, model.condition(LABELS), settings, hooks=hooks, **options))


def tokens_of(steps: Sequence[ScaleStep]) -> Tensor:
    return torch.cat([step.tokens for step in steps], dim=1)


def forced(
    model: NextScaleTransformer, tokenizer: MultiscaleVQ, tokens: Tensor, hooks: Any = None
) -> Tensor:
    with torch.no_grad():
        return model(tokenizer.teacher_inputs(tokens), class_labels=LABELS, hooks=hooks)


# ---- absent = untouched ----------------------------------------------------------------------


@every_kind
def test_an_untrained_module_leaves_logits_equal(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind, trained=False)
    plain = draw(tiny_model, tiny_tokenizer)
    hooked = draw(tiny_model, tiny_tokenizer, hooks=hooks_of(tiny_model, [module], cached=True))
    for one, other in zip(plain, hooked, strict=True):
        assert torch.equal(one.logits, other.logits)
    tokens = tokens_of(plain)
    assert torch.equal(tokens, tokens_of(hooked))
    hooks = hooks_of(tiny_model, [module], cached=False)
    assert torch.equal(
        forced(tiny_model, tiny_tokenizer, tokens),
        forced(tiny_model, tiny_tokenizer, tokens, hooks),
    )


@every_kind
def test_strength_zero_is_the_base(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    plain = draw(tiny_model, tiny_tokenizer)
    strong = draw(tiny_model, tiny_tokenizer, hooks=hooks_of(tiny_model, [module], cached=True))
    assert (strong[0].logits - plain[0].logits).abs().max() > 0.05
    hooks = hooks_of(tiny_model, [module], [{"strength": 0.0}], cached=True)
    for one, other in zip(plain, draw(tiny_model, tiny_tokenizer, hooks=hooks), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_a_map_of_zero_features_adds_nothing(
    build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    for kind in ("additive", "per scale"):
        module = build(kind)
        part = attach(module, MAPS, Control(image=None, type="canny"))
        nothing = replace(part, features=torch.zeros_like(part.features))
        hooks = ControlHooks(tiny_model, [nothing], cached=True)
        steps = draw(tiny_model, tiny_tokenizer, hooks=hooks)
        assert torch.equal(tokens_of(steps), tokens_of(draw(tiny_model, tiny_tokenizer)))


@every_kind
def test_the_other_side_of_guidance_is_without_control(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))
    prefix = tokens[:, :5]  # the same inputs, whatever control does
    plain = draw(tiny_model, tiny_tokenizer, prefix=prefix)[0]
    for every_row in (False, True):
        hooks = hooks_of(tiny_model, [module], cached=True, every_row=every_row)
        step = draw(tiny_model, tiny_tokenizer, hooks=hooks, prefix=prefix)[0]
        assert plain.unconditional is not None
        assert step.unconditional is not None
        assert (step.conditional - plain.conditional).abs().max() > 0.02
        difference = (step.unconditional - plain.unconditional).abs().max()
        assert difference > 0.02 if every_row else difference < 1e-5


@every_kind
def test_rows_that_are_dropped_are_the_base_s(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    """Dropout in training: the row without control, and only it, has the base's logits."""
    module = build(kind)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))
    part = attach(module, MAPS, Control(image=None, type="canny"))
    keep = torch.tensor([True, False, True])
    hooks = ControlHooks(tiny_model, [part], cached=False, keep=keep)
    plain = forced(tiny_model, tiny_tokenizer, tokens)
    some = forced(tiny_model, tiny_tokenizer, tokens, hooks)
    assert torch.equal(some[1], plain[1])
    assert (some - plain).abs().amax(dim=(1, 2))[[0, 2]].min() > 0.02


def test_a_frozen_base_trains_in_evaluation_mode(
    build: Build, build_model: Callable[..., NextScaleTransformer]
) -> None:
    base = build_model()
    both = ControlledTransformer(base.requires_grad_(False), build("adapter")).train()
    assert both.control.training
    assert not any(module.training for module in base.modules())
    assert (
        ControlledTransformer(base.requires_grad_(True), build("adapter"))
        .train()
        .transformer.training
    )


def test_what_is_added_lies_at_the_cells_of_its_features(build: Build) -> None:
    """Additive control: features of one cell change the stream at this position alone."""
    module = build("additive")
    part = attach(module, MAPS, Control(image=None, type="canny"))
    changed = part.features.clone()
    changed[:, 9] += 1
    found = []
    for features in (part.features, changed):
        state = module.state(features, None, cached=False)  # pyright: ignore[reportArgumentType]
        stream = torch.zeros(3, 30, 32)
        found.append(
            state.contribution(0, slice(0, 30), stream, torch.zeros(3, 1, 32), part.pictures)
        )
    assert found[0] is not None
    assert found[1] is not None
    moved = (found[1] - found[0]).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [9]


def test_a_spot_of_the_map_changes_its_own_cell_most() -> None:
    schedule = ScaleSchedule((1, 2, 4, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ControlEncoder(EncoderConfig(width=32, depth=1, heads=2), schedule, (64, 64))
    for row, column in ((1, 5), (6, 2)):
        maps = torch.zeros(2, 3, 64, 64)
        maps[1, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
        changes = encoder(maps).diff(dim=0)[0].norm(dim=-1)
        for side, where in zip((4, 8), (schedule.slices[2], schedule.slices[3]), strict=True):
            cell = changes[where].argmax().item()
            assert divmod(cell, side) == (row * side // 8, column * side // 8)


def test_the_encoder_sees_minus_one_to_one() -> None:
    encoder = ControlEncoder(ENCODER, ScaleSchedule((1, 2, 4, 8)), (64, 64))
    for value in (0.0, 1.0):
        pixels = encoder.network_input(torch.full((1, 3, 64, 64), value), encoder.grid)
        assert set(pixels.unique().tolist()) == {2 * value - 1}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("adapter", {"context": "control"}),
        ("adapter", {"inject": "output"}),
        ("additive", {"encoder": replace(ENCODER, resize="image")}),
    ],
)
def test_settings_of_equal_weights_differ(
    kind: str,
    change: dict[str, Any],
    build: Build,
    tiny_model: NextScaleTransformer,
    tiny_tokenizer: MultiscaleVQ,
) -> None:
    module = build(kind)
    other = build_control(replace(KINDS[kind], **change), tiny_model.config, module.record)
    other.load_state_dict(module.state_dict())
    tokens = torch.randint(
        32, (3, tiny_model.schedule.num_tokens), generator=torch.Generator().manual_seed(0)
    )
    one, two = (
        forced(tiny_model, tiny_tokenizer, tokens, hooks_of(tiny_model, [m.eval()], cached=False))
        for m in (module, other)
    )
    assert (one - two).abs().max() > 1e-3


@every_kind
def test_an_offset_of_the_start_token_is_no_condition(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    """A learned start moves the start token; AdaLN of base and module see the condition itself."""
    seen: list[Tensor] = []
    module = build(kind)
    state_of = module.state

    def watched(*args: Any, **options: Any) -> Any:
        state = state_of(*args, **options)
        contribution = state.contribution

        def watch(block: int, where: slice, x: Tensor, pooled: Tensor, pictures: Tensor) -> Any:
            seen.append(pooled.clone())
            return contribution(block, where, x, pooled, pictures)

        state.contribution = watch
        return state

    module.state = watched
    hooks = hooks_of(tiny_model, [module], cached=True)
    draw(tiny_model, tiny_tokenizer, hooks=hooks, offset=torch.full((3, 32), 5.0))
    condition = tiny_model.condition(LABELS).pooled[:, None]
    assert all(torch.equal(pooled[:3], condition) for pooled in seen)


def test_a_batch_encodes_and_projects_its_own_maps_alone(build: Build) -> None:
    module = build("additive")
    part = attach(module, MAPS, Control(image=None, type="canny"))
    some = part[torch.tensor([2, 2, 0])]
    assert len(some.features) == 2
    assert torch.equal(some.features[some.pictures], part.features[[2, 2, 0]])


# ---- both modes ------------------------------------------------------------------------------


@every_kind
def test_cached_is_teacher_forced(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    settings = {"strength": (1.0, 0.5, 2.0, 1.0)}
    hooks = hooks_of(tiny_model, [module], [settings], cached=True)
    steps = draw(tiny_model, tiny_tokenizer, hooks=hooks)
    hooks = hooks_of(tiny_model, [module], [settings], cached=False)
    logits = forced(tiny_model, tiny_tokenizer, tokens_of(steps), hooks)
    for step, part in zip(steps, tiny_model.schedule.split(logits), strict=True):
        torch.testing.assert_close(step.conditional, part, atol=1e-4, rtol=0)


@every_kind
@pytest.mark.parametrize("options", [{}, {"guidance_end": 2}])
def test_prefix_and_branches_continue_alike(
    kind: str,
    options: dict[str, Any],
    build: Build,
    tiny_model: NextScaleTransformer,
    tiny_tokenizer: MultiscaleVQ,
) -> None:
    module, settings = build(kind), replace(GUIDED, **options)
    hooks = hooks_of(tiny_model, [module], cached=True)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer, settings, hooks))
    seeds = [s for s in SEEDS for _ in range(2)]
    hooks = hooks_of(tiny_model, [module], cached=True)
    steps = draw(
        tiny_model, tiny_tokenizer, settings, hooks, prefix=tokens[:, :5], branches=2, seeds=seeds
    )
    assert torch.equal(tokens_of(steps), tokens[:, 5:].repeat_interleave(2, 0))


@every_kind
def test_a_picture_does_not_depend_on_its_batch(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    hooks = hooks_of(tiny_model, [module], cached=True)
    whole = tokens_of(draw(tiny_model, tiny_tokenizer, hooks=hooks))
    for i in range(3):
        hooks = hooks_of(tiny_model, [module], maps=MAPS[i : i + 1], cached=True)
        condition = tiny_model.condition(LABELS[i : i + 1])
        steps = sample(
            tiny_model, tiny_tokenizer, condition, GUIDED, seeds=SEEDS[i : i + 1], hooks=hooks
        )
        assert torch.equal(tokens_of(list(steps)), whole[i : i + 1])


@every_kind
def test_later_features_do_not_change_earlier_logits(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))
    part = attach(module, MAPS, Control(image=None, type="canny"))
    changed = part.features.clone()
    changed[:, 5:14] += 1  # scale 2

    def logits(features: Tensor) -> Tensor:
        own = replace(part, features=features)
        hooks = ControlHooks(tiny_model, [own], cached=False)
        return forced(tiny_model, tiny_tokenizer, tokens, hooks)

    one, other = logits(part.features), logits(changed)
    torch.testing.assert_close(one[:, :5], other[:, :5], atol=1e-5, rtol=0)
    assert (one[:, 5:14] - other[:, 5:14]).abs().max() > 1e-3


# ---- gradients -------------------------------------------------------------------------------


@every_kind
def test_gradients_reach_all_of_the_module_and_none_of_the_base(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind, trained=False).train()
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))
    inputs = tiny_tokenizer.teacher_inputs(tokens)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    reached: set[str] = set()
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(False)
    try:
        for _ in range(2):
            part = attach(module, MAPS, Control(image=None, type="canny"))
            hooks = ControlHooks(tiny_model, [part], cached=False)
            logits = tiny_model(inputs, class_labels=LABELS, hooks=hooks)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            for name, parameter in module.named_parameters():
                if parameter.grad is not None and parameter.grad.abs().max() > 0:
                    reached.add(name)
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in tiny_model.parameters())
    finally:
        for parameter in tiny_model.parameters():
            parameter.requires_grad_(True)
    missing = {name for name, _ in module.named_parameters()} - reached
    assert missing == set()


# ---- where and how strongly ------------------------------------------------------------------


@every_kind
def test_start_and_end_are_scales(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build(kind)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))
    plain = tiny_model.schedule.split(forced(tiny_model, tiny_tokenizer, tokens))
    hooks = hooks_of(tiny_model, [module], [{"start_scale": 1, "end_scale": 3}], cached=False)
    parts = tiny_model.schedule.split(forced(tiny_model, tiny_tokenizer, tokens, hooks))
    assert torch.equal(parts[0], plain[0])
    assert all(not torch.equal(parts[k], plain[k]) for k in (1, 2))
    first = draw(tiny_model, tiny_tokenizer, hooks=hooks_of(
        tiny_model, [module], [{"start_scale": 1, "end_scale": 3}], cached=True
    ))  # fmt: skip
    same = draw(tiny_model, tiny_tokenizer, hooks=hooks_of(
        tiny_model, [module], [{"strength": (0.0, 1.0, 1.0, 0.0)}], cached=True
    ))  # fmt: skip
    assert torch.equal(tokens_of(first), tokens_of(same))


def test_layers_and_masks_scale_what_is_added(
    build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build("additive")
    assert module.sites == (0, 1)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))

    def logits(**control: Any) -> Tensor:
        hooks = hooks_of(tiny_model, [module], [control], cached=False)
        return forced(tiny_model, tiny_tokenizer, tokens, hooks)

    plain = forced(tiny_model, tiny_tokenizer, tokens)
    assert torch.equal(logits(strength={0: 0.0, 1: 0.0}), plain)
    assert not torch.equal(logits(strength={1: 0.0}), logits())
    torch.testing.assert_close(logits(mask=torch.ones(8, 8)), logits(), atol=1e-6, rtol=0)
    assert torch.equal(logits(mask=torch.zeros(8, 8)), plain)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    half = attach(module, MAPS, Control(image=None, type="canny", mask=left))
    weight = half.weights[0]
    assert weight is not None
    parts = module.schedule.split(weight[..., 0])
    grids = [part.view(n, n) for part, n in zip(parts, (1, 2, 3, 4), strict=True)]
    assert grids[0].item() == 0.5
    assert grids[1].tolist() == [[1, 0], [1, 0]]
    assert grids[3].tolist() == [[1, 1, 0, 0]] * 4


def test_guess_mode_rises_over_the_sites(build: Build) -> None:
    module = build("additive")
    part = attach(module, MAPS, Control(image=None, type="canny", guess_mode=True))
    weights = [part.weights[site] for site in module.sites]
    assert weights[0] is not None
    assert weights[0].flatten()[0] == pytest.approx(0.1)
    assert weights[1] is None  # 1 everywhere


@every_kind
def test_contributions_add_up(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    one, other = build(kind), build("additive", seed=9)
    tokens = tokens_of(draw(tiny_model, tiny_tokenizer))

    def logits(modules: Sequence[ControlModule], *strengths: float) -> Tensor:
        settings = [{"strength": s} for s in strengths]
        hooks = hooks_of(tiny_model, modules, settings, cached=False)
        return forced(tiny_model, tiny_tokenizer, tokens, hooks)

    assert torch.equal(logits([one, other], 1.0, 0.0), logits([one], 1.0))
    both = logits([one, other], 1.0, 1.0)
    torch.testing.assert_close(both, logits([other, one], 1.0, 1.0), atol=1e-5, rtol=0)
    assert (both - logits([one], 1.0)).abs().max() > 0.02


# ---- guidance --------------------------------------------------------------------------------


@every_kind
def test_two_knobs_of_guidance(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    """L(0,0) + g (L(c,0) - L(0,0)) + v (L(c,u) - L(c,0)), by three separate runs."""
    module = build(kind)
    text, control = (1.0, 3.0, 1.5, 2.0), (2.0, 0.5, 1.0, 4.0)
    settings = SamplingConfig(guidance_scale=text, control_guidance_scale=control)
    hooks = hooks_of(tiny_model, [module], cached=True)
    steps = draw(tiny_model, tiny_tokenizer, settings, hooks)
    tokens = tokens_of(steps)
    full = forced(tiny_model, tiny_tokenizer, tokens, hooks_of(tiny_model, [module], cached=False))
    alone = forced(tiny_model, tiny_tokenizer, tokens)
    with torch.no_grad():
        null = tiny_model(tiny_tokenizer.teacher_inputs(tokens), tiny_model.null_condition(3))
    for k, where in enumerate(tiny_model.schedule.slices):
        a, b, c = (x[:, where] for x in (null, alone, full))
        expected = a + text[k] * (b - a) + control[k] * (c - b)
        torch.testing.assert_close(steps[k].logits, expected, atol=1e-4, rtol=0)


def test_equal_knobs_are_joint_guidance(
    build: Build, tiny_model: NextScaleTransformer, tiny_tokenizer: MultiscaleVQ
) -> None:
    module = build("additive")
    joint = SamplingConfig(guidance_scale=3.0)
    two = replace(joint, control_guidance_scale=3.0)
    steps = [
        draw(tiny_model, tiny_tokenizer, s, hooks_of(tiny_model, [module], cached=True))
        for s in (joint, two)
    ]
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="control_guidance_scale needs a control"):
        draw(tiny_model, tiny_tokenizer, two)
    with pytest.raises(UserError, match="excludes"):
        replace(two, control_in_negative=True)


# ---- on disk ---------------------------------------------------------------------------------


@every_kind
def test_a_saved_module_is_the_same(
    kind: str, build: Build, tiny_model: NextScaleTransformer, tmp_path: Path
) -> None:
    module = build(kind)
    module.save_pretrained(tmp_path / "control")
    loaded = read_control(tmp_path / "control")
    assert loaded.config == replace(
        module.config, encoder=replace(module.config.encoder, pretrained=False)
    )
    assert loaded.record == module.record
    assert torch.equal(loaded.encode(MAPS), module.encode(MAPS))
    check_base(loaded, tiny_model, base_fingerprint(tiny_model))


def test_another_base_is_refused(
    build: Build, build_model: Callable[..., NextScaleTransformer]
) -> None:
    module = build("additive")
    deeper = build_model(depth=3)
    with pytest.raises(UserError, match=r"was trained on a transformer of depth 2, this one has 3"):
        check_base(module, deeper, base_fingerprint(deeper))
    other = build_model(seed=8)
    with pytest.raises(UserError, match="was trained on other weights"):
        check_base(module, other, base_fingerprint(other))


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"strength": "abc"}, "control_scale is 'abc'"),
        ({"strength": None}, "control_scale is None"),
        ({"mask": torch.full((4, 4), 2.0)}, r"values in \[0, 1\], got \[2, 2\]"),
        ({"strength": 11.0}, r"control_scale is .*, but must lie in \[0, 10.0\]"),
        ({"strength": -1.0}, r"control_scale is .*, but must lie in \[0, 10.0\]"),
        ({"strength": (1.0, 1.0)}, "one for each of the 4 scales, got 2"),
        ({"strength": {7: 1.0}}, r"names the blocks \[7\]; this module acts at \[0, 1\]"),
        ({"start_scale": 2, "end_scale": 2}, r"got \[2, 2\)"),
        ({"start_scale": 4}, r"got \[4, 4\)"),
        ({"end_scale": 9}, r"got \[0, 9\)"),
    ],
)
def test_bad_settings_are_refused(control: dict[str, Any], message: str, build: Build) -> None:
    with pytest.raises(UserError, match=message):
        attach(build("additive"), MAPS, Control(image=None, type="canny", **control))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_a_released_model_takes_a_module(kind: str, dtype: torch.dtype) -> None:
    """The released scales, codebook and head size, read from the released format, at depth 2."""
    sizes = TransformerConfig(depth=2)
    conditioner = ClassConditioner(width=sizes.resolved_width, num_classes=1000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = NextScaleTransformer(sizes, conditioner)
        initialize(made)
        base = NextScaleTransformer.from_official(to_official(made)).requires_grad_(False)
        record = ControlRecord(type="canny", resolution=(256, 256), base_fingerprint="")
        module = build_control(KINDS[kind], base.config, record)
        tokens = torch.randint(sizes.codebook_size, (2, base.schedule.num_tokens))
        inputs = torch.randn(2, base.schedule.num_tokens - 1, sizes.codebook_dim)
    maps, keep = torch.rand(2, 3, 256, 256), torch.tensor([True, True])
    both = ControlledTransformer(base, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = both(inputs, torch.tensor([3, 7]), maps, keep, base.schedule.num_scales)
        loss = F.cross_entropy(logits.transpose(1, 2).float(), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_sites_rise_and_are_named_once(build: Build, tiny_model: NextScaleTransformer) -> None:
    record = ControlRecord(type="canny", resolution=(8, 8), base_fingerprint="")
    for sites in ((1, 0), (0, 0)):
        with pytest.raises(UserError, match="rise, each named once"):
            build_control(AdapterConfig(sites=sites), tiny_model.config, record)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_dinov2_encoder_opens_again_without_its_hub(
    registers: int, tiny_model: NextScaleTransformer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "hub")
    encoder = EncoderConfig(kind="dinov2", name=str(tmp_path / "hub"))
    record = ControlRecord(type="canny", resolution=(8, 8), base_fingerprint="")
    sizes = AdditiveConfig(encoder=encoder, num_sites=1)
    module = build_control(sizes, tiny_model.config, record).eval()
    module.save_pretrained(tmp_path / "module")
    (tmp_path / "hub").rename(tmp_path / "gone")
    again = read_control(tmp_path / "module")
    assert again.config.encoder.name == module.config.encoder.name
    with torch.no_grad():
        assert torch.equal(again.encode(MAPS), module.encode(MAPS))


def test_a_timm_encoder_is_built(tiny_model: NextScaleTransformer) -> None:
    pytest.importorskip("timm")
    encoder = EncoderConfig(kind="timm", name="vit_tiny_patch16_224", pretrained=False)
    record = ControlRecord(type="canny", resolution=(8, 8), base_fingerprint="")
    sizes = AdditiveConfig(encoder=encoder, num_sites=1)
    module = build_control(sizes, tiny_model.config, record)
    with torch.no_grad():
        assert module.encode(MAPS).shape == (3, 30, 192)


def test_sites_are_spread_evenly() -> None:
    assert evenly(3, 12) == (0, 4, 8)
    assert evenly(3, 16) == (0, 5, 10)
    assert evenly(4, 16) == (0, 4, 8, 12)
    with pytest.raises(UserError, match="num_sites"):
        evenly(5, 4)
    with pytest.raises(UserError, match="sites"):
        AdditiveConfig(encoder=ENCODER, num_sites=0)
