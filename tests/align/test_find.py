"""FIND: learned starts of both generators, their gradients, files, and use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor

from nextscale.align import AlignConfig, align
from nextscale.align.config import DiffusionSettings
from nextscale.align.experience import collect
from nextscale.align.methods.b2 import B2Config
from nextscale.align.methods.find import FIND, FINDConfig
from nextscale.align.methods.grpo import GRPOConfig
from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.policies.start import StartPolicy
from nextscale.align.prompts import Prompt
from nextscale.align.rewards import as_reward
from nextscale.align.start_model import Start, draw_starts
from nextscale.align.starts import TOKENS, StartDistribution, StartShape
from nextscale.cli import main
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.storage import read_tensors
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig
from nextscale.var.model_folder import save_model

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "align" / "misc.json").read_text(encoding="utf-8")
)["find_toy"]


@pytest.fixture
def pipe(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePipeline:
    """Random, of four scales and five classes, with guidance and filters."""
    settings = SamplingConfig(guidance_scale=1.5, top_k=5)
    return NextScalePipeline(tiny_tokenizer, build_model(), settings)


def starts_of(pipe: NextScalePipeline, space: Any, prompts: Any = None) -> StartDistribution:
    width = pipe.transformer.head.in_features
    tokens = space in TOKENS
    shape = (5, pipe.transformer.config.codebook_size) if tokens else (width,)
    lengths = (1, 4) if tokens else ()
    return StartDistribution(StartShape(space, shape, 0.5, width, prompts, lengths=lengths))


def policy_of(pipe: NextScalePipeline, starts: StartDistribution) -> StartPolicy:
    base = NextScalePolicy(pipe, replace(pipe.generation, top_k=0))
    return StartPolicy(base, starts)


def streams(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def brightness(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    return images.mean((1, 2, 3))


# ---- the distribution --------------------------------------------------------------------------


def toy(count: int, seed: int = 0) -> tuple[StartPolicy, dict[str, Tensor], Tensor]:
    """The golden toy: starts in three dimensions, without a generator behind them."""
    starts = StartDistribution(StartShape("noise", (3,), 1.0, 1, ("x",)))
    policy = StartPolicy.__new__(StartPolicy)
    policy.starts, policy.kind, policy.logp_reduction = starts, "gaussian", "sum"
    policy._scales = 0
    rows = torch.zeros(count, dtype=torch.long)
    conditions = {"rows": rows, "features": torch.zeros(count, 1)}
    return policy, conditions, torch.tensor(GOLDEN["c"])


def trajectory_of(policy: StartPolicy, conditions: Any, seed: int) -> Any:
    from nextscale.align.trajectory import Trajectory

    generator = torch.Generator().manual_seed(seed)
    mean, std, _ = policy.starts(conditions["rows"], conditions["features"])
    start = (mean + std * torch.randn(mean.shape, generator=generator)).detach()
    return Trajectory("gaussian", conditions, [start], [], (True,), (1.0,), {})


def test_many_one_step_gradients_have_the_analytic_mean() -> None:
    """r(z) = -|z - c|^2 from mu 0, sd 1: the gradient of the mean is -2 (mu - c)."""
    policy, conditions, c = toy(100_000)
    drawn = trajectory_of(policy, conditions, 0)
    rewards = -(drawn.actions[0] - c).square().sum(1)
    assert float(rewards.mean()) == pytest.approx(GOLDEN["expected_reward"], abs=0.04)
    logp = policy.evaluate(drawn).logp[:, 0]
    ((rewards - rewards.mean()) * logp).mean().backward()
    table = policy.starts.table
    assert table is not None
    assert table.grad is not None
    mean, log_std = table.grad[0].chunk(2)
    torch.testing.assert_close(mean, torch.tensor(GOLDEN["grad_mu"]), atol=0.08, rtol=0)
    torch.testing.assert_close(log_std, torch.tensor(GOLDEN["grad_log_sigma"]), atol=0.16, rtol=0)


def test_the_mean_finds_the_best_start() -> None:
    policy, conditions, c = toy(64)
    optimizer = torch.optim.Adam(policy.starts.parameters(), lr=0.05)
    for step in range(200):
        drawn = trajectory_of(policy, conditions, step)
        rewards = -(drawn.actions[0] - c).square().sum(1)
        loss = -((rewards - rewards.mean()) * policy.evaluate(drawn).logp[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, std, _ = policy.starts(conditions["rows"], conditions["features"])
    assert std is not None
    assert float((mean[0] - c).detach().norm()) < 0.1
    assert float(std.detach().max()) < 0.5


def test_the_divergence_from_the_initial_distribution_is_exact() -> None:
    policy, conditions, _ = toy(200_000)
    with torch.no_grad():
        assert policy.starts.table is not None
        policy.starts.table.copy_(torch.tensor([[0.3, -0.2, 0.5, 0.1, -0.4, 0.2]]))
    ev = policy.evaluate(trajectory_of(policy, conditions, 1))
    assert ev.kl is not None
    assert ev.ref_logp is not None
    found = float((ev.logp - ev.ref_logp).mean().detach())
    assert float(ev.kl[0].detach()) == pytest.approx(found, abs=0.01)


# ---- next-scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("prompts", [None, (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("space", TOKENS)
def test_an_untrained_prefix_is_the_generators_own(
    pipe: NextScalePipeline, space: str, prompts: Any, candidates: int
) -> None:
    """Also where the likeliest of several candidates is kept: each begins with its own prefix."""
    pipe.generation = replace(pipe.generation, num_candidates=candidates)
    policy = policy_of(pipe, starts_of(pipe, space, prompts))
    labels, seeds = [0, 1, 2, 3], [5, 6, 7, 8]
    prefix = draw_starts(policy, labels, seeds, generation=pipe.generation)
    assert len(prefix) == 4 * candidates
    plain = pipe(class_labels=labels, seed=seeds, output_type="pt")
    begun = pipe(class_labels=labels, seed=seeds, start=prefix, output_type="pt")
    parts = pipe(class_labels=labels, seed=seeds, start=prefix, output_type="pt", batch_size=3)
    assert torch.equal(parts.tokens, begun.tokens)
    assert torch.equal(begun.tokens, plain.tokens)
    torch.testing.assert_close(begun.images, plain.images)
    strip = pipe(class_labels=labels, seed=seeds, start=prefix, return_scales=True)
    assert strip.scales is not None
    assert len(strip.scales) == 2


def test_what_is_stored_is_judged_alike_and_branches_keep_the_start(
    pipe: NextScalePipeline,
) -> None:
    for space in (*TOKENS, "embedding"):
        starts = starts_of(pipe, space)
        with torch.no_grad():
            for parameter in starts.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        policy = policy_of(pipe, starts)
        drawn = policy.sample(policy.encode([0, 1, 2]), generators=streams(3))
        ev = policy.evaluate(drawn)
        stored = torch.cat([x.view(3, -1) for x in drawn.logps], dim=1)
        torch.testing.assert_close(ev.logp.detach(), stored, atol=1e-5, rtol=1e-5)
        assert ev.kl is not None
        assert float(ev.kl.detach().min()) > -1e-6
        assert float(ev.kl.detach().max()) > 0
        again = policy.branch(drawn, policy.num_steps, 2, generators=streams(6))
        for kept, parent in zip(again.actions, drawn.actions, strict=True):
            assert torch.equal(kept, parent.repeat_interleave(2, 0))
        assert again.images is not None
        assert not torch.equal(again.images[0], again.images[1])
        with pytest.raises(UserError, match="branch at"):
            policy.branch(drawn, 0, 2, generators=streams(6))


def test_sharpness_is_an_inverse_temperature(pipe: NextScalePipeline) -> None:
    """Factors 2 of both scales of the prefix draw it as half the temperature does."""
    starts = starts_of(pipe, "sharpness", (0, 1))
    assert starts.table is not None
    with torch.no_grad():
        starts.table.fill_(math.log(2))
    policy = policy_of(pipe, starts)
    found = draw_starts(policy, [0, 1], [5, 6], generation=pipe.generation)
    cold = pipe(class_labels=[0, 1], seed=[5, 6], temperature=(0.5, 0.5, 1.0, 1.0))
    assert torch.equal(found, cold.tokens[:, :5])


def test_an_offset_moves_the_picture_and_zero_does_not(pipe: NextScalePipeline) -> None:
    width = pipe.transformer.head.in_features
    plain = pipe(class_labels=[0, 1], seed=0, output_type="pt").images
    zero = pipe(class_labels=[0, 1], seed=0, start=torch.zeros(2, width), output_type="pt").images
    offset = 5 * torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    moved = pipe(class_labels=[0, 1], seed=0, start=offset, output_type="pt").images
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, moved)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.zeros(3, 8), "3 rows for 2 images of 4 candidates"),
        (torch.zeros(2, 8), "an offset of the start token is"),
        (torch.zeros(2, 3, dtype=torch.long), "start has 3 tokens; whole scales have"),
    ],
)
def test_a_start_that_does_not_fit_is_said(
    pipe: NextScalePipeline, start: Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipe(class_labels=[0, 1], seed=0, start=start, num_candidates=4)


# ---- the method --------------------------------------------------------------------------------


def rollout_of(policy: StartPolicy, method: FIND, seed: int = 0) -> Any:
    prompts = [Prompt(i, {}) for i in range(3)]
    rewards = [as_reward(brightness, "brightness")]
    return collect(policy, rewards, prompts, 4, (0, seed), branch=method.branch())


def test_suffixes_share_a_start_whose_return_is_their_mean(pipe: NextScalePipeline) -> None:
    policy = policy_of(pipe, starts_of(pipe, "prefix_table"))
    method = FIND(FINDConfig(suffixes=3), policy)
    drawn = rollout_of(policy, method)
    experience = method.learn(drawn)
    assert len(experience.items) == 12
    expected = drawn.total.view(-1, 3).mean(1)
    torch.testing.assert_close(experience.columns["returns"], expected)


def test_earlier_starts_are_kept_with_their_own_rewards(pipe: NextScalePipeline) -> None:
    policy = policy_of(pipe, starts_of(pipe, "prefix_table"))
    method = FIND(FINDConfig(replay=1), policy)
    first, second = (rollout_of(policy, method, seed) for seed in (0, 1))
    alone = method.learn(first)
    assert len(alone.items) == 24
    assert float(alone.weights.sum()) == 12
    both = method.learn(second)
    assert float(both.weights.sum()) == 24
    rows = both.items[:, 0].view(3, 2, 4)
    returns = both.columns["returns"][rows]
    assert torch.equal(returns[:, 0].flatten(), second.total)
    assert torch.equal(returns[:, 1].flatten(), first.total)
    again = FIND(FINDConfig(replay=1), policy)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    third = rollout_of(policy, method, 2)
    torch.testing.assert_close(again.learn(third).columns, method.learn(third).columns)


def test_a_deviation_beyond_its_bounds_comes_back() -> None:
    starts = StartDistribution(StartShape("noise", (1,), 1.0, 1, (0,), min_std=0.1))
    assert starts.table is not None
    rows, features = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1)
    for log_std, expected in ((-9.0, 0.1), (9.0, 7.389)):
        with torch.no_grad():
            starts.table.copy_(torch.tensor([[0.0, log_std]]))
        std = starts(rows, features)[1]
        assert std is not None
        assert float(std.detach()) == pytest.approx(expected, rel=1e-3)
        starts.zero_grad()
        std.sum().backward()
        assert starts.table.grad is not None
        assert float(starts.table.grad[0, 1]) == pytest.approx(expected, rel=1e-3)


def test_the_clip_range_is_that_of_the_reduction(pipe: NextScalePipeline) -> None:
    policy = policy_of(pipe, starts_of(pipe, "embedding"))
    for reduction, epsilon in (("mean", 1e-4), ("sum", 0.2)):
        policy.logp_reduction = reduction
        assert FIND(FINDConfig(), policy).objective.epsilon == epsilon
        assert policy.averaged == (reduction == "mean")
    assert (
        FIND(FINDConfig(), policy_of(pipe, starts_of(pipe, "prefix_table"))).objective.epsilon
        == 0.2
    )


def test_the_value_network_skips_what_cannot_be_scored(pipe: NextScalePipeline) -> None:
    width = pipe.transformer.head.in_features
    shape = StartShape("prefix_table", (5, pipe.transformer.config.codebook_size), 0.5, width, None)
    starts = StartDistribution(shape, value=True)
    policy = policy_of(pipe, starts)
    method = FIND(FINDConfig(baseline="value"), policy)
    drawn = rollout_of(policy, method)

    def gradient(total: Tensor) -> list[Tensor]:
        experience = method.learn(replace(drawn, total=total))
        starts.zero_grad()
        ((loss, _),) = method.losses(experience, torch.arange(12), 0, starts)
        loss.backward()
        return [p.grad.clone() for p in starts.parameters() if p.grad is not None]

    total = drawn.total.clone()
    total[2] = torch.nan
    found = gradient(total)
    assert all(bool(g.isfinite().all()) for g in found)
    assert any(bool(g.any()) for g in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k1"},
        {"credit": "vmr"},
        {"top_entropy_quantile": 0.5},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_settings_that_only_grpo_reads_are_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    for config, section in ((FINDConfig, "find"), (B2Config, "b2")):
        with pytest.raises(UserError, match=rf"{section}\.loss\.{name}"):
            config(loss=GRPOConfig(**changes))


def test_baselines(pipe: NextScalePipeline) -> None:
    policy = policy_of(pipe, starts_of(pipe, "prefix_table"))
    method = FIND(FINDConfig(baseline="ema", ema_decay=0.5), policy)
    drawn = rollout_of(policy, method)
    method.learn(drawn)
    means = drawn.total.view(3, 4).mean(1)
    shifted = replace(drawn, total=drawn.total + 1)
    found = method.learn(shifted).columns["advantages"].view(3, 4)
    torch.testing.assert_close(found, drawn.total.view(3, 4) + 1 - means[:, None])
    third = method.learn(drawn).columns["advantages"].view(3, 4)
    torch.testing.assert_close(third, drawn.total.view(3, 4) - means[:, None] - 0.5)


def test_the_initial_distribution_can_be_the_anchor(pipe: NextScalePipeline) -> None:
    starts = starts_of(pipe, "embedding")
    policy = policy_of(pipe, starts)
    with torch.no_grad():
        for parameter in starts.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    drawn = rollout_of(policy, FIND(FINDConfig(), policy))
    ev = policy.evaluate(drawn.trajectory)
    for anchor, expected in (("previous", ev.logp), ("initial", ev.ref_logp)):
        method = FIND(FINDConfig(anchor=anchor), policy)  # pyright: ignore[reportArgumentType]
        found = method.learn(drawn).columns["old_logps"]
        assert expected is not None
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[..., NextScaleTransformer],
    tiny_tokenizer: MultiscaleVQ,
) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, tiny_tokenizer, build_model(), SamplingConfig(guidance_scale=1.5))
    return folder


def settings(folder: Path, model: Path, **changes: Any) -> AlignConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(model),
        "method": "find",
        "prompts": ("classes",),
        "eval_prompts": ("classes",),
        "num_prompts": 4,
        "num_generations": 8,
        "train_batch_size": 32,
        "learning_rate": 3e-3,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "num_eval_prompts": 0,
        "num_validation_prompts": 0,
        "mixed_precision": "no",
        "report_to": "none",
    }
    return AlignConfig(**{**values, **changes})


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("space", "amortised"),
    [
        ("prefix_table", True),
        ("embedding", False),
        pytest.param("prefix_table", False, marks=pytest.mark.slow),
        pytest.param("embedding", True, marks=pytest.mark.slow),
    ],
)
def test_a_reward_of_the_start_is_learnt_and_the_generator_stays(
    tmp_path: Path, model_folder: Path, space: Any, amortised: bool
) -> None:
    def first_code(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images.mean((1, 2, 3))

    find = FINDConfig(space=space, amortised=amortised, prefix_scales=2, initial_std=1.0,
                      loss=GRPOConfig(epsilon=0.2))  # fmt: skip
    config = settings(
        tmp_path / "run", model_folder, find=find, reward_funcs=(), num_generations=16,
        train_batch_size=64, max_train_steps=80 if space == "embedding" else 40,
        checkpointing_steps=None, learning_rate=3e-3 if amortised else 1e-1,
        num_eval_prompts=2, num_eval_images=2,
    )  # fmt: skip
    align(config, rewards={"light": first_code}, progress=False)
    lines = log(tmp_path / "run")
    means = torch.tensor([line["rewards/light/mean"] for line in lines])
    assert means[-8:].mean() > means[:8].mean() + 3 * means[:8].std() / 8**0.5
    base = read_tensors(model_folder / "transformer" / "model.safetensors")
    pipe = NextScalePipeline.from_pretrained(model_folder, dtype="float32")
    for name, tensor in base.items():
        assert torch.equal(tensor, pipe.transformer.state_dict()[name]), name
    assert (tmp_path / "run" / "report.md").is_file()
    start = Start(tmp_path / "run" / "model", pipe)
    found = start([0, 1, 2], [0, 1, 2])
    assert pipe(class_labels=[0, 1, 2], seed=0, start=found).images
    for wrong in ((0, 0), ([0, 1], [0]), ("a", [0])):
        with pytest.raises(UserError, match="a list of prompts and a list of as many seeds"):
            start(*wrong)  # pyright: ignore[reportArgumentType]
    for wrong in (start, str(tmp_path / "run" / "model")):
        with pytest.raises(UserError, match=r"not a tensor; .* has Start\(FILE, pipe\)"):
            pipe(class_labels=[0], seed=0, start=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="it needs one for each image, or for each candidate"):
        pipe(class_labels=[0], seed=0, start=found)
    with pytest.raises(UserError, match=r"did you mean .*run/model\?"):
        Start(tmp_path / "run", pipe)
    with pytest.raises(UserError, match=r"other weights|class label"):
        Start(tmp_path / "run" / "model", _other(pipe))


def _other(pipe: NextScalePipeline) -> NextScalePipeline:
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1.0)
    return pipe


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, model_folder: Path) -> None:
    find = FINDConfig(replay=1, baseline="value", suffixes=2, prefix_scales=2)
    changes = {"find": find, "reward_funcs": ("brightness",), "train_batch_size": 64}
    align(settings(tmp_path / "whole", model_folder, **changes), progress=False)
    part = settings(tmp_path / "part", model_folder, **changes)
    align(replace(part, max_train_steps=2), progress=False)
    align(replace(part, resume_from_checkpoint="latest"), progress=False)
    whole = read_tensors(tmp_path / "whole" / "model" / "start.safetensors")
    for name, tensor in read_tensors(tmp_path / "part" / "model" / "start.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    assert log(tmp_path / "whole")[-1]["value_loss"] > 0


def test_the_noise_of_a_pipeline_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = tiny_pipelines.stable_diffusion()
        pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "own.txt").write_text("red\ngreen\nblue\na red circle\n")

    def level(policy: DiffusionPolicy, trajectory: Any) -> Tensor:
        return trajectory.actions[-1].mean((1, 2, 3))[:, None, None, None].expand(-1, 3, 1, 1)

    monkeypatch.setattr(DiffusionPolicy, "decode", level)
    config = settings(
        tmp_path / "run", tmp_path / "pipe", prompts=(str(tmp_path / "own.txt"),),
        find=FINDConfig(amortised=False, loss=GRPOConfig(epsilon=1e-2)), reward_funcs=(),
        diffusion=DiffusionSettings(num_inference_steps=2), max_train_steps=20,
        checkpointing_steps=None, learning_rate=0.05,
    )  # fmt: skip
    align(config, rewards={"level": brightness}, progress=False)
    lines = log(tmp_path / "run")
    assert lines[-1]["rewards/level/mean"] > lines[0]["rewards/level/mean"] + 0.05
    monkeypatch.undo()
    start = Start(tmp_path / "run" / "model", pipe)
    latents = start(["red", "green"], [0, 1])
    assert latents.shape == (2, 4, 8, 8)
    with pytest.raises(UserError, match='there is no start for "white"'):
        start(["white"], [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"find": FINDConfig(space="noise")}, "use embedding, prefix_table or sharpness"),
        ({"find": FINDConfig(prefix_scales=9)}, "find.prefix_scales is 9"),
        ({"lora_rank": 2}, "leave lora_rank out"),
        (
            {
                "find": FINDConfig(amortised=False),
                "prompts": ("FEW",),
                "eval_prompts": ("classes",),
                "num_eval_prompts": 3,
            },
            "there is no start for",
        ),
        (
            {"find": FINDConfig(amortised=False), "prompts": ("classes",), "model": "scenes"},
            "needs a class-conditional model",
        ),
        (
            {
                "find": FINDConfig(amortised=False),
                "prompts": ("scenes:hard",),
                "model": "scenes",
            },
            "would be too large",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "few.jsonl").write_text('{"class_label": 0}')
    given = {"reward_funcs": ("brightness",), "model": str(model_folder), **changes}
    if given.get("prompts") == ("FEW",):
        given["prompts"] = (str(tmp_path / "few.jsonl"),)
    model = given.pop("model")
    with pytest.raises(UserError, match=message):
        align(settings(tmp_path / "run", model, **given), progress=False)


def test_no_start_file(tmp_path: Path, pipe: NextScalePipeline) -> None:
    with pytest.raises(UserError, match="there is no start file"):
        Start(tmp_path, pipe)


def test_generate_takes_a_start_file(tmp_path: Path, model_folder: Path) -> None:
    config = settings(
        tmp_path / "run", model_folder, reward_funcs=("brightness",), learning_rate=0.1,
        find=FINDConfig(prefix_scales=2, loss=GRPOConfig(beta=0.0)),
    )  # fmt: skip
    align(config, progress=False)
    command = ["generate", "--model", str(model_folder), "--class_labels", "0", "1", "--seed", "3"]
    command += ["--dtype", "float32", "--save_scales", "--quiet"]
    start = ["--start", str(tmp_path / "run" / "model")]
    assert main([*command, "--output_dir", str(tmp_path / "plain")]) == 0
    assert main([*command, *start, "--output_dir", str(tmp_path / "tuned")]) == 0
    pictures = [(tmp_path / side / "000000.png").read_bytes()[100:] for side in ("plain", "tuned")]
    assert pictures[0] != pictures[1]
    assert (tmp_path / "tuned" / "000000_scales.png").is_file()
    assert main([*command, "--start", "nowhere", "--output_dir", str(tmp_path / "x")]) == 2
    assert main([*command, *start, "--negative_prompt", "0", "--output_dir", "x"]) == 2


def test_a_table_of_labels_serves_the_command_and_a_wrong_one_costs_nothing(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.jsonl").write_text('{"class_label": 0}\n{"class_label": 3}')
    config = settings(
        tmp_path / "run", model_folder, reward_funcs=("brightness",), num_prompts=2,
        prompts=(str(tmp_path / "few.jsonl"),), find=FINDConfig(amortised=False),
        train_batch_size=16,
    )  # fmt: skip
    align(config, progress=False)
    command = ["generate", "--model", str(model_folder), "--dtype", "float32", "--quiet"]
    command += ["--start", str(tmp_path / "run" / "model"), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--class_labels", "0", "3"]) == 0
    pictures = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main([*command, "--class_labels", "0", "1", "--overwrite"]) == 2
    assert "there is no start for" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == pictures
