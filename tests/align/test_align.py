"""`align` as a whole: learning, resuming, splitting, reports, and what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from nextscale.align import AlignConfig, align
from nextscale.align.experience import Experience, Rollout, collect
from nextscale.align.methods.b2 import B2, B2Config
from nextscale.align.methods.d2o import D2OConfig
from nextscale.align.methods.dpo import DPO, DPOConfig
from nextscale.align.methods.fdpg import FDPGConfig
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig
from nextscale.align.methods.nft import NFTConfig
from nextscale.align.methods.r0 import R0Config
from nextscale.align.methods.raft import RAFT, RAFTConfig
from nextscale.align.methods.sibling import SiblingConfig
from nextscale.align.pairs import read_pairs
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.prompts import DatasetPicture, Prompt, draw_prompts, open_prompts
from nextscale.align.references import Given
from nextscale.align.rewards import as_reward
from nextscale.align.rewards.composition import Preference
from nextscale.align.tables import compare
from nextscale.align.trajectory import Trajectory
from nextscale.align.watcher import hold_out
from nextscale.cli import main
from nextscale.data.captions import parse
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.storage import read_tensors, short_name
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer, SamplingConfig
from nextscale.var.model_folder import save_model


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[..., NextScaleTransformer],
    tiny_tokenizer: MultiscaleVQ,
) -> Path:
    """A random class-conditional model on disk."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, tiny_tokenizer, build_model(), SamplingConfig(guidance_scale=1.5))
    return folder


def settings(folder: Path, model: Path, **changes: Any) -> AlignConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(model),
        "prompts": ("classes",),
        "eval_prompts": ("classes",),
        "reward_funcs": ("brightness",),
        "num_prompts": 4,
        "num_generations": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
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


def weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / "model" / "transformer" / "model.safetensors")


# ---- learning ----------------------------------------------------------------------------------


def count_of_first_code(policy: NextScalePolicy, trajectory: Any) -> Tensor:
    """Pictures of one pixel: the share of tokens that are code 0."""
    tokens = torch.cat(trajectory.actions, dim=1)
    return (tokens == 0).float().mean(1)[:, None, None, None].expand(-1, 3, 1, 1)


def all_first_code(policy: NextScalePolicy, images: Tensor, conditions: Tensor) -> Trajectory:
    """In the place of what a tokenizer makes of pictures."""
    streams = [torch.Generator().manual_seed(i) for i in range(len(images))]
    drawn = policy.sample(conditions, generators=streams)
    return replace(drawn, actions=[torch.zeros_like(part) for part in drawn.actions])


def brightness(images: Tensor, prompts: Sequence[int]) -> Tensor:
    return images.mean((1, 2, 3))


LARGE = {"train_batch_size": 32}
TOY: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("dpo", "raft", "dragon", "reg_grpo")},
    "grpo": LARGE,
    "b2": {"train_batch_size": 64},
    "beta_norm": {"method": "grpo", "grpo": GRPOConfig(scale_rewards="beta_norm"), **LARGE},
    "clip_cov": {"method": "grpo", "grpo": GRPOConfig(covariance="clip"), **LARGE},
    "kl_cov": {"method": "grpo", "grpo": GRPOConfig(covariance="kl"), **LARGE},
    "score_norm": {"method": "grpo", "grpo": GRPOConfig(baseline="score_norm"), **LARGE},
    "mdpo": {"method": "grpo", "grpo": GRPOConfig(loss_type="mdpo"), **LARGE},
    "gbpo": {
        "method": "grpo",
        "grpo": GRPOConfig(loss_type="gbpo", baseline="median", scale_rewards="none"),
        **LARGE,
    },
    "nft": {"nft": NFTConfig(threshold=0.1), **LARGE},
    "fdpg": {"fdpg": FDPGConfig(reward_temperature=0.004), "learning_rate": 5e-3, **LARGE},
    "d2o": {"d2o": D2OConfig(alpha=1.0)},
    "seppo": {"train_batch_size": 16},
    "sibling": {
        "sibling": SiblingConfig(steps=(1, 3)),
        "num_generations": 2,
        "train_batch_size": 32,
    },
    "rpo": {"method": "dpo", "dpo": DPOConfig(rpo_alpha=0.1)},
    "spo": {"method": "grpo", "reward_weights": (0.0, 1.0), **LARGE},
    "lagrangian": {
        "method": "grpo",
        "reward_mode": "lagrangian",
        "reward_thresholds": (0.95, math.nan),
        "reward_weights": (0.0, 1.0),
        "lagrangian_rate": 1.0,
        **LARGE,
    },
    "dump": {"method": "grpo", "curriculum": "dump", **LARGE},
}


FAR = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1000, 2000))]


@pytest.mark.parametrize("seed", FAR)
@pytest.mark.parametrize("method", TOY)
def test_a_toy_reward_is_learnt(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, seed: int
) -> None:
    monkeypatch.setattr(NextScalePolicy, "decode", count_of_first_code)
    given: dict[str, Any] = {"method": method, "train_batch_size": 4, "learning_rate": 2e-2}
    given |= {"num_generations": 8, **TOY[method]}
    config = settings(
        tmp_path,
        model_folder,
        reward_funcs=(),
        gradient_accumulation_steps=1,
        max_train_steps=60,
        checkpointing_steps=None,
        guidance_scale=1.0,
        seed=seed,
        **given,
    )
    if method == "seppo":  # whose given pictures are code 0 everywhere
        labels = [Prompt(k, {"picture": DatasetPicture("scenes", "train", k)}) for k in range(3)]
        monkeypatch.setattr("nextscale.align.train.open_prompts", lambda *_, **__: labels)
        monkeypatch.setattr(NextScalePolicy, "trajectory_of", all_first_code)
    rewards: dict[str, Any] = {"zeros": brightness}
    if method == "spo":  # which sees preferences alone
        rewards["preferred"] = Preference(as_reward(brightness), temperature=0.05)
    if method == "lagrangian":  # whose objective says nothing
        rewards["even"] = lambda images, prompts: torch.zeros(len(images))
    if method == "dump":
        labels = [Prompt(k % 3, {}, source=f"source {k % 2}") for k in range(6)]
        monkeypatch.setattr("nextscale.align.train.open_prompts", lambda *_, **__: labels)
    align(config, rewards=rewards, progress=False)
    # NFT asks for right samples, of which every one with a reward over its threshold is as good.
    aim = "samples/right" if method == "nft" else "rewards/zeros/mean"
    reached = [line[aim] for line in log(tmp_path)]
    assert reached[0] < 0.4
    assert reached[-1] > 0.9


def test_seppo_needs_pictures(tmp_path: Path, model_folder: Path) -> None:
    config = settings(tmp_path, model_folder, method="seppo")
    with pytest.raises(UserError, match=r"has none: use prompts such as examples:scenes"):
        align(config, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_reward_did_not_rise_leaves_the_model_as_it_was(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(images: Tensor, prompts: Sequence[int]) -> Tensor:
        return torch.rand(len(images), generator=generator)

    def run(folder: Path, reward: Any, **changes: Any) -> Any:
        config = settings(
            folder, model_folder, reward_funcs=(), max_train_steps=22, checkpointing_steps=None,
            train_batch_size=16, gradient_accumulation_steps=1, **changes,
        )  # fmt: skip
        return align(config, rewards={"reward": reward}, progress=False)

    before = read_tensors(model_folder / "transformer" / "model.safetensors")
    result = run(tmp_path / "a", noise, num_eval_prompts=2, num_eval_images=2)
    assert not result.kept
    assert "the reward did not rise over the rollouts" in caplog.text
    assert str(result.fit.checkpoint) in caplog.text
    after = weights(tmp_path / "a")
    assert all(torch.equal(after[name], before[name]) for name in before)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    trend = report["reward_trend"]
    assert trend["p_value"] > 0.01
    assert not trend["kept"]
    assert trend["kl_of_dropped"]["total"] > 1e-4 > abs(report["kl"]["total"])
    assert "the model was saved as it was" in (tmp_path / "a" / "report.md").read_text()
    assert run(tmp_path / "b", noise, trend_p_value=None).kept
    assert run(tmp_path / "c", brightness, learning_rate=1e-2).kept
    for moved in ("b", "c"):
        after = weights(tmp_path / moved)
        assert not all(torch.equal(after[name], before[name]) for name in before)


def test_a_random_reward_moves_nothing(tmp_path: Path, model_folder: Path) -> None:
    """Its expected gradient is zero: the mean brightness stays within 3 standard errors."""
    watched: list[Tensor] = []

    def watch(images: Tensor, prompts: Sequence[int]) -> Tensor:
        watched.append(images.mean((1, 2, 3)))
        return torch.full((len(images),), 0.5)

    config = settings(
        tmp_path, model_folder, reward_funcs=("random",), learning_rate=1e-4, max_train_steps=20,
        checkpointing_steps=None, num_generations=16, train_batch_size=32,
    )  # fmt: skip
    align(config, rewards={"watch": watch}, progress=False)
    first, last = torch.cat(watched[:5]), torch.cat(watched[-5:])
    error = (first.var() / len(first) + last.var() / len(last)).sqrt()
    assert (first.mean() - last.mean()).abs() < 3 * error


def test_the_first_ratio_is_one_and_the_log_has_the_usual_names(
    tmp_path: Path, model_folder: Path
) -> None:
    config = settings(tmp_path, model_folder, num_iterations=2, grpo=GRPOConfig(beta=0.1))
    align(config, progress=False)
    first, second = log(tmp_path)[:2]
    assert first["ratio/max_deviation"] < 1e-4
    assert second["ratio/max_deviation"] > 1e-4
    names = {
        *("reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"),
        *("rewards/brightness/mean", "rewards/brightness/std"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    }
    assert names <= first.keys()
    assert first["kl"] < 1e-6 < second["kl"]


def test_lower_precision_judges_rollouts_again(tmp_path: Path, model_folder: Path) -> None:
    config = settings(tmp_path, model_folder, mixed_precision="bf16", num_iterations=2)
    align(config, progress=False)
    assert log(tmp_path)[0]["ratio/max_deviation"] < 1e-4


# ---- equivalences ------------------------------------------------------------------------------


def test_micro_batches_are_one_batch(tmp_path: Path, model_folder: Path) -> None:
    small = {"train_batch_size": 4, "gradient_accumulation_steps": 4}
    align(settings(tmp_path / "a", model_folder), progress=False)
    align(settings(tmp_path / "b", model_folder, **small), progress=False)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["grpo", "dpo", "b2"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, model_folder: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": method, "num_validation_prompts": 2}
    changes["b2"] = B2Config(num_stages=4, threshold=0.0)
    if method == "dpo":
        changes |= {"train_batch_size": 2}
    whole = settings(tmp_path / "whole", model_folder, **changes)
    align(whole, progress=False)
    part = settings(tmp_path / "part", model_folder, **changes)
    align(replace(part, max_train_steps=2), progress=False)
    align(replace(part, resume_from_checkpoint="latest"), progress=False)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "part")[name]), name
    keys = ("step", "loss", "reward", "grad_norm")
    whole_log = [[line.get(k) for k in keys] for line in log(tmp_path / "whole")]
    assert whole_log[-2:] == [[line.get(k) for k in keys] for line in log(tmp_path / "part")][-2:]


def test_a_resumed_run_judges_all_its_rollouts(tmp_path: Path, model_folder: Path) -> None:
    changes: dict[str, Any] = {
        "num_prompts": 2, "num_generations": 2, "train_batch_size": 4,
        "gradient_accumulation_steps": 1, "max_train_steps": 20, "checkpointing_steps": 10,
    }  # fmt: skip
    whole = align(settings(tmp_path / "whole", model_folder, **changes), progress=False)
    part = settings(tmp_path / "part", model_folder, **changes)
    assert align(replace(part, max_train_steps=10), progress=False).p_value is None
    resumed = align(replace(part, resume_from_checkpoint="latest"), progress=False)
    assert whole.p_value is not None
    assert resumed.p_value == whole.p_value


def test_a_resumed_run_repeats_the_validation_of_its_checkpoint(
    tmp_path: Path, model_folder: Path
) -> None:
    """It is younger than the checkpoint; without it the run would stop later than the unbroken."""
    changes: dict[str, Any] = {
        "num_validation_prompts": 2, "validation_steps": 2, "held_out_rewards": ("color:red",),
    }  # fmt: skip
    align(settings(tmp_path / "whole", model_folder, **changes), progress=False)
    part = settings(tmp_path / "part", model_folder, **changes)
    align(replace(part, max_train_steps=2), progress=False)
    align(replace(part, resume_from_checkpoint="latest"), progress=False)

    def monitor(name: str) -> Any:
        path = tmp_path / name / "checkpoints" / "step_00000004" / "state.json"
        return json.loads(path.read_text())["own"]["monitor"]

    assert monitor("part") == monitor("whole")
    values = [
        [(x["step"], x["val/reward"]) for x in log(tmp_path / name) if "val/reward" in x]
        for name in ("whole", "part")
    ]
    assert values[0] == values[1]
    assert [step for step, _ in values[0]] == [2, 4]


def test_a_checkpoint_within_a_rollout_is_said(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"gradient_accumulation_steps": 1, "checkpointing_steps": 1}  # rollouts of 2 steps
    part = settings(tmp_path / "part", model_folder, **changes)
    align(replace(part, max_train_steps=3), progress=False)
    steps = sorted(path.name for path in (tmp_path / "part" / "checkpoints").iterdir())
    assert steps == ["step_00000002", "step_00000003"]  # whole rollouts, and the last one
    assert "within a rollout" not in caplog.text
    align(replace(part, resume_from_checkpoint="latest"), progress=False)
    assert "lies within a rollout" in caplog.text


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_gradient_checkpointing_changes_nothing_with_drop_path(
    tmp_path: Path,
    build_model: Callable[..., NextScaleTransformer],
    tiny_tokenizer: MultiscaleVQ,
    method: str,
) -> None:
    save_model(tmp_path / "model", tiny_tokenizer, build_model(drop_path=0.5), SamplingConfig())
    small = {"train_batch_size": 2} if method == "dpo" else {}
    for name, on in (("plain", False), ("less", True)):
        config = settings(
            tmp_path / name, tmp_path / "model", method=method, gradient_checkpointing=on,
            max_train_steps=2, **small,
        )  # fmt: skip
        align(config, progress=False)
    plain, less = (log(tmp_path / name) for name in ("plain", "less"))
    for one, other in zip(plain, less, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 8},
        pytest.param(
            {"grpo": GRPOConfig(credit="vmr", vmr_scale=2), "num_generations": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": "dpo", "dpo": DPOConfig(pairs_per_group=2), "train_batch_size": 4},
            marks=pytest.mark.slow,
        ),
        {"method": "b2"},
        pytest.param({"method": "dragon", "train_batch_size": 4}, marks=pytest.mark.slow),
    ],
    ids=["grpo", "vmr", "dpo", "b2", "dragon"],
)
def test_two_processes_are_one(
    tmp_path: Path,
    model_folder: Path,
    changes: dict[str, Any],
    repeat_with_two_processes: Callable[[str, Path, Path], None],
) -> None:
    """Rollouts with and without branches, and the report."""
    config = settings(
        tmp_path / "one", model_folder, reward_funcs=("brightness", "jpeg_compressibility"),
        num_eval_prompts=3, num_eval_images=1, num_validation_prompts=3, **changes,
    )  # fmt: skip
    align(config, progress=False)
    repeat_with_two_processes("align", tmp_path / "one", tmp_path / "two")
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two.keys() == one.keys()
        if "reward" not in one:  # the validation
            continue
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], atol=1e-4, rtol=1e-3)
    one, two = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two"))
    row, other = (r["prompts"]["classes"]["rewards"]["brightness"] for r in (one, two))
    assert other["before"] == row["before"]
    assert other["after"]["value"] == pytest.approx(row["after"]["value"], abs=1e-3)


@pytest.mark.parametrize("seed", FAR)
def test_the_gradient_of_a_reward_raises_it(tmp_path: Path, model_folder: Path, seed: int) -> None:
    """R0 through the last scale; and the pull to the start holds it back."""
    changes: dict[str, Any] = {
        "method": "r0", "max_train_steps": 15, "num_prompts": 8, "num_generations": 8,
        "train_batch_size": 64, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
        "checkpointing_steps": None, "seed": seed,
    }  # fmt: skip
    gains = []
    for pull in (0.0, 100.0):
        folder = tmp_path / str(pull)
        own = {**changes, "r0": R0Config(weight_decay_to_start=pull)}
        align(settings(folder, model_folder, **own), progress=False)
        found = [line["reward"] for line in log(folder)]
        gains.append(sum(found[-5:]) / 5 - found[0])
    assert gains[0] > 0.008  # little: most of a picture is in the scales before
    assert gains[1] < gains[0] / 2


def test_an_own_method_is_a_method(tmp_path: Path, model_folder: Path) -> None:
    class Likelihood(RAFT):
        def learn(self, rollout: Rollout) -> Experience:
            seen.append(len(rollout.total))
            return super().learn(rollout)

    seen: list[int] = []
    size = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "max_train_steps": 1}
    config = settings(tmp_path, model_folder, **size)
    align(config, method=lambda policy: Likelihood(RAFTConfig(), policy), progress=False)
    assert seen == [16]

    text: Any = "grpo"
    with pytest.raises(UserError, match="must be a class derived from Method, or a function"):
        align(settings(tmp_path / "no", model_folder), method=text, progress=False)

    def other(policy: Any) -> Any:
        return object()

    with pytest.raises(UserError, match="object, which is not derived from"):
        align(settings(tmp_path / "no", model_folder), method=other, progress=False)


@pytest.mark.parametrize(
    ("part", "found", "message"),
    [
        ("learn", lambda e: None, "returns a NoneType; it must return an Experience"),
        (
            "learn",
            lambda e: replace(e, items=e.items[:-1], weights=e.weights[:-1]),
            r"items \[15, 1\], weights \[15\]; they must be \[16, k\]",
        ),
        ("losses", lambda parts: None, "returns a NoneType; it must yield"),
        ("losses", lambda parts: iter([]), "yields nothing"),
        ("losses", lambda parts: (loss for loss, _ in parts), "yields Tensor; it must yield"),
        ("losses", lambda parts: ((x.detach(), m) for x, m in parts), "a loss has no gradient"),
        ("losses", lambda parts: ((x[None], m) for x, m in parts), r"a loss has shape \[1\]"),
    ],
)
def test_mistakes_of_an_own_method_are_named(
    tmp_path: Path, model_folder: Path, part: str, found: Any, message: str
) -> None:
    class Mine(RAFT):
        def learn(self, rollout: Rollout) -> Experience:
            kept = super().learn(rollout)
            return found(kept) if part == "learn" else kept

        def losses(self, *given: Any) -> Any:
            parts = super().losses(*given)
            return found(parts) if part == "losses" else parts

        def items_per_group(self, num_generations: int) -> int:
            return num_generations

    config = settings(tmp_path, model_folder, max_train_steps=1)
    mine = RAFTConfig(top_k=4)
    with pytest.raises(UserError, match=rf"Mine\.{part}.*{message}"):
        align(config, method=lambda policy: Mine(mine, policy), progress=False)


def test_a_rollout_that_teaches_nothing_is_said(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(
        tmp_path, model_folder, method="nft", nft=NFTConfig(threshold=9.0), max_train_steps=2
    )
    with caplog.at_level("WARNING", "nextscale"):
        align(config, progress=False)
    (said,) = [message for message in caplog.messages if "teaches anything" in message]
    assert said.startswith("none of the 4 groups of a rollout")


def test_r0_needs_rewards_with_a_gradient(tmp_path: Path, model_folder: Path) -> None:
    changes = {"method": "r0", "reward_funcs": ("jpeg_compressibility",)}
    with pytest.raises(UserError, match='"jpeg_compressibility" has none'):
        align(settings(tmp_path, model_folder, **changes), progress=False)
    changes = {"method": "r0", "reward_funcs": ("brightness", "color:red")}
    with pytest.raises(UserError, match="reward_mode majority has no gradient"):
        align(settings(tmp_path, model_folder, reward_mode="majority", **changes), progress=False)
    align(settings(tmp_path / "min", model_folder, reward_mode="min", **changes), progress=False)
    assert all(line["grad_norm"] > 0 for line in log(tmp_path / "min"))
    with pytest.raises(UserError, match="be at most 1 for this model"):
        align(settings(tmp_path, model_folder, method="r0", r0=R0Config(last_steps=2)))


# ---- methods -----------------------------------------------------------------------------------


@pytest.fixture
def policy(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePolicy:
    """Random, without guidance."""
    return NextScalePolicy(NextScalePipeline(tiny_tokenizer, build_model()))


def rollout(policy: NextScalePolicy, method: Any, groups: int = 3, size: int = 2) -> Any:
    prompts = [Prompt(i, {}) for i in range(groups)]
    rewards = [as_reward(brightness, "brightness")]
    return collect(policy, rewards, prompts, size, (0, 0), branch=method.branch())


def test_vmr_judges_the_prefix_by_its_completions(policy: NextScalePolicy) -> None:
    method = GRPO(GRPOConfig(credit="vmr", vmr_scale=2, vmr_samples=3), policy)
    drawn = rollout(policy, method)
    assert len(drawn.trajectory) == 3 * 2 * 3
    prefix = torch.cat(drawn.trajectory.actions[:2], dim=1).view(6, 3, -1)
    assert bool((prefix == prefix[:, :1]).all())
    advantages = method.learn(drawn).columns["advantages"].view(6, 3, -1)
    assert bool((advantages[:, :, :5] == advantages[:, :1, :1]).all())  # 1 + 4 tokens
    assert not torch.allclose(advantages[:, 0, 5:], advantages[:, 1, 5:])
    best = drawn.rewards.view(3, 2, 3).exp().mean(2).argmax(1)
    assert torch.equal(advantages[:, 0, 0].view(3, 2).argmax(1), best)


@pytest.mark.parametrize(
    "method_of",
    [
        lambda policy: GRPO(GRPOConfig(), policy),
        lambda policy: DPO(DPOConfig(score="policy"), policy),
        lambda policy: DPO(DPOConfig(score="pair"), policy),
        lambda policy: RAFT(RAFTConfig(), policy),
        lambda policy: B2(B2Config(threshold=0.0), policy),
    ],
    ids=["grpo", "dpo", "dpo-pair", "raft", "b2"],
)
def test_scales_that_are_not_trained_teach_nothing(
    policy: NextScalePolicy,
    build_model: Callable[..., NextScaleTransformer],
    method_of: Callable[[NextScalePolicy], Any],
) -> None:
    """The gradient is the same whatever their tokens are, and is not that of all scales."""

    def gradient(scales: int, change: bool) -> Tensor:
        policy.trained = range(scales)
        method = method_of(policy)
        experience = method.learn(rollout(policy, method, size=4))
        drawn = experience.rollout.trajectory
        if change:
            fine = [(a + 1) % policy.model.config.codebook_size for a in drawn.actions[2:]]
            drawn = replace(drawn, actions=[*drawn.actions[:2], *fine])
            experience = replace(experience, rollout=replace(experience.rollout, trajectory=drawn))
        policy.model.zero_grad()
        examples = torch.arange(len(experience.items))
        for loss, _ in method.losses(experience, examples, 0, policy.model):
            loss.backward()
        assert policy.model.head.weight.grad is not None
        return policy.model.head.weight.grad.clone()

    policy.baseline = Given(build_model(seed=5))
    some = gradient(2, change=False)
    assert some.abs().max() > 1e-5
    torch.testing.assert_close(gradient(2, change=True), some, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(policy.num_steps, change=False), some, rtol=0.1)


def test_an_update_costs_what_its_scales_cost(policy: NextScalePolicy) -> None:
    """One pass over the trained scales, no token of a later one."""
    policy.trained = range(2)
    method = GRPO(GRPOConfig(), policy)
    experience = method.learn(rollout(policy, method))
    seen: list[int] = []

    def look(module: Any, given: Any, out: Tensor) -> None:
        seen.append(out.shape[1])

    handle = policy.model.head.register_forward_hook(look)
    list(method.losses(experience, torch.arange(2), 0, policy.model))
    handle.remove()
    assert seen == [sum(policy.units[:2])]


def test_vmr_can_alternate(policy: NextScalePolicy) -> None:
    config = GRPOConfig(credit="vmr", vmr_scale=2, vmr_alternate=True)
    method = GRPO(config, policy)
    drawn = rollout(policy, method)
    for number, early in ((0, True), (1, False)):
        a = method.learn(replace(drawn, key=(0, number))).columns["advantages"]
        assert bool(a[:, :5].any()) == early
        assert bool(a[:, 5:].any()) != early


def test_the_reward_that_is_trained_has_the_penalty_whatever_the_weights(
    policy: NextScalePolicy, build_model: Callable[..., NextScaleTransformer]
) -> None:
    """k1 in the reward: r - beta (log pi - log ref), also for weights whose sum is not above 0."""
    policy.baseline = Given(build_model(seed=5))
    for weight in (1.0, -1.0):
        small, none = (GRPO(GRPOConfig(beta=b, kl_estimator="k1"), policy) for b in (1e-6, 0.0))
        drawn = rollout(policy, small, size=4)
        drawn = replace(drawn, total=weight * drawn.total)
        a, b = (method.learn(drawn).columns["advantages"] for method in (small, none))
        torch.testing.assert_close(a, b, atol=1e-2, rtol=0)
    strong = GRPO(GRPOConfig(beta=1e4, kl_estimator="k1", scale_rewards="none"), policy)
    of_kl = strong.learn(drawn).columns["advantages"]
    ev = policy.evaluate(drawn.trajectory, need=("logp", "ref_logp"))
    assert ev.ref_logp is not None
    penalty = (ev.logp - ev.ref_logp).mean(1).detach().view(3, 4)
    expected = -1e4 * (penalty - penalty.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(of_kl, expected, rtol=1e-2, atol=1.0)


def test_settings_of_advantages_hold_for_both_parts_of_vmr(policy: NextScalePolicy) -> None:
    plain = {"credit": "vmr", "vmr_scale": 2, "vmr_samples": 3}
    method = GRPO(GRPOConfig(**plain, advantage_clip=0.1), policy)
    advantages = method.learn(rollout(policy, method)).columns["advantages"]
    assert float(advantages.abs().max()) == pytest.approx(0.1)
    assert bool(advantages[:, :5].any())


def test_dpo_pairs_the_best_of_a_group_with_its_worst(policy: NextScalePolicy) -> None:
    drawn = rollout(policy, GRPO(GRPOConfig(), policy), size=4)
    total = torch.tensor([[0.0, 3.0, 1.0, 2.0], [1.0, 0.0, 1.0, 1.0], [5.0, torch.nan, 4.0, 3.0]])
    drawn = replace(drawn, total=total.flatten())
    found = DPO(DPOConfig(pairs_per_group=2), policy).learn(drawn)
    used = found.items[found.weights > 0].tolist()
    assert used == [[1, 0], [3, 2], [4, 5], [8, 11]]
    one = DPO(DPOConfig(), policy).learn(drawn)
    assert one.items.tolist() == [[1, 0], [4, 5], [8, 11]]
    assert DPO(DPOConfig(margin=2), policy).learn(drawn).weights.tolist() == [1, 0, 0]
    with pytest.raises(UserError, match=r"dpo\.pairs_per_group is 2, .* at most half of"):
        DPO(DPOConfig(pairs_per_group=2), policy).items_per_group(3)


def test_the_most_uncertain_tokens_are_those_of_the_whole_rollout(policy: NextScalePolicy) -> None:
    method = GRPO(GRPOConfig(top_entropy_quantile=0.25), policy)
    experience = method.learn(rollout(policy, method, size=4))
    chosen = experience.columns["advantages"] != 0
    assert float(chosen.float().mean()) == pytest.approx(0.25, abs=0.02)
    ev = policy.evaluate(experience.rollout.trajectory, need=("logp", "entropy"))
    assert ev.entropy is not None
    assert ev.entropy[chosen].min() >= ev.entropy[~chosen].max() - 1e-5

    def gradient(size: int) -> Tensor:
        policy.model.zero_grad()
        for examples in torch.arange(12).split(size):
            for loss, _ in method.losses(experience, examples, 0, policy.model):
                (loss * len(examples) / 12).backward()
        assert policy.model.head.weight.grad is not None
        return policy.model.head.weight.grad.clone()

    torch.testing.assert_close(gradient(3), gradient(12), atol=1e-6, rtol=1e-4)


def test_a_token_mask_says_which_tokens_learn(policy: NextScalePolicy) -> None:
    def only_the_first(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        mask = torch.zeros(len(images), 30)
        mask[:, 0] = 1
        return mask

    def gradient(mask: Any, **changes: Any) -> Tensor:
        method = GRPO(GRPOConfig(**changes), policy, mask)
        experience = method.learn(rollout(policy, method))
        policy.model.zero_grad()
        (loss, _), = method.losses(experience, torch.arange(6), 0, policy.model)  # fmt: skip
        loss.backward()
        assert policy.model.head.weight.grad is not None
        return policy.model.head.weight.grad.clone()

    masked = gradient(only_the_first)
    by_weight = gradient(None, scale_weights=(1.0, 0.0, 0.0, 0.0))
    torch.testing.assert_close(masked, by_weight)
    assert not torch.allclose(masked, gradient(None))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            lambda images, prompts: torch.ones(2, 3),
            r"must return weights.*\[6, 30\].*got .*\[2, 3\]",
        ),
        (lambda images, prompts: [[1.0, "a"]], r"must return weights.*\[6, 30\].*got a list"),
        (lambda images, prompts: -torch.ones(6, 30), "must return weights.*the least is -1"),
        (lambda images, prompts: 1 / 0, "token_mask.*ZeroDivisionError"),
    ],
)
def test_a_bad_token_mask_is_named(policy: NextScalePolicy, mask: Any, message: str) -> None:
    method = GRPO(GRPOConfig(), policy, mask)
    with pytest.raises(UserError, match=message):
        method.learn(rollout(policy, method))


def test_a_cap_within_the_clip_range_is_refused(policy: NextScalePolicy) -> None:
    with pytest.raises(UserError, match=r"delta is 1.1, but must be above 1 . epsilon_high, 1.2"):
        GRPO(GRPOConfig(delta=1.1), policy)
    with pytest.raises(UserError, match=r"be above 1 . epsilon_high, 1.5"):
        GRPO(GRPOConfig(delta=1.3, epsilon_high=0.5), policy)
    GRPO(GRPOConfig(delta=1.1, epsilon=0.05), policy)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_every_kl_estimator_pulls_back_to_the_reference(
    tmp_path: Path, model_folder: Path, estimator: str
) -> None:
    """With a strong pull and a vanishing reward the policy stays nearer than without."""
    moved = []
    for beta in (0.0, 3.0):
        folder = tmp_path / str(beta)
        grpo = GRPOConfig(beta=beta, kl_estimator=estimator)
        config = settings(folder, model_folder, grpo=grpo, max_train_steps=8,
                          num_generations=8, train_batch_size=16, seed=1)  # fmt: skip
        align(config, progress=False)
        base = read_tensors(model_folder / "transformer" / "model.safetensors")
        change = [(t - base[n]).square().sum() for n, t in weights(folder).items()]
        moved.append(float(torch.stack(change).sum()))
    assert moved[1] != moved[0]
    if estimator in ("k2", "exact"):
        assert moved[1] < 1.05 * moved[0]


def test_offline_pairs_are_learnt(tmp_path: Path, model_folder: Path) -> None:
    for name, value in (("light", 230), ("dark", 20)):
        Image.new("RGB", (8, 8), (value, value, value)).save(tmp_path / f"{name}.png")
    lines = [
        {"class_label": i % 3, "chosen": "light.png", "rejected": "dark.png"} for i in range(8)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    config = settings(tmp_path / "run", model_folder, method="dpo", pairs=str(path),
                      train_batch_size=4, learning_rate=3e-3, max_train_steps=20,
                      checkpointing_steps=None)  # fmt: skip
    align(config, progress=False)
    lines = log(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < 0.3
    assert lines[-1]["rewards/accuracies"] == 1


# ---- what is left behind -----------------------------------------------------------------------


def test_a_run_leaves_a_report_pictures_and_a_model(tmp_path: Path, model_folder: Path) -> None:
    config = settings(
        tmp_path, model_folder, num_eval_prompts=3, num_eval_images=2, num_validation_prompts=2,
        held_out_rewards=("jpeg_compressibility",), use_ema=True, ema_decay=0.5,
    )  # fmt: skip
    result = align(config, progress=False)
    record = json.loads((tmp_path / "report.json").read_text())
    assert result.report is not None
    assert record == result.report.record
    (found,) = record["prompts"].values()
    assert set(found["rewards"]) == {"brightness", "jpeg_compressibility"}
    row = found["rewards"]["brightness"]
    assert row["difference"]["value"] == pytest.approx(
        row["after"]["value"] - row["before"]["value"]
    )
    assert len(record["kl"]["per_step"]) == 4
    assert record["kl"]["total"] > 0
    assert "fd_scenes" not in found  # the pictures are no scenes
    for name in ("report.md", "before_after.png", "samples/step_00000000.png"):
        assert (tmp_path / name).stat().st_size > 0
    tuned = NextScalePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    assert tuned.generation.guidance_scale == 1.5


class Spread:
    """A set reward: the deviation of the pictures' brightness."""

    name = "spread"

    def features(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images.mean((2, 3))

    def score_set(self, features: Tensor) -> float:
        return float(features.std())

    def contributions(self, features: Tensor) -> Tensor:
        rows = range(len(features))
        without = [features[[j for j in rows if j != i]].std() for i in rows]
        return features.std() - torch.stack(without)


class Brighter:
    """A pairwise reward."""

    name = "brighter"

    def compare(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        values = images.mean((1, 2, 3))
        return (values[:, None] > values).float()


def test_rewards_of_sets_and_pairs_train_and_are_reported_as_what_they_are(
    tmp_path: Path, model_folder: Path
) -> None:
    config = settings(
        tmp_path, model_folder, reward_funcs=(), reward_weights=(100.0, 1.0), num_eval_prompts=3,
        num_eval_images=2, held_out_rewards=("other",), num_validation_prompts=3,
    )  # fmt: skip
    rewards = {"set": Spread(), "pairs": Brighter(), "other": Spread()}
    align(config, rewards=rewards, progress=False)
    first = log(tmp_path)[0]
    assert first["grad_norm"] > 0
    assert first["rewards/set/mean"] > 0.005  # the contributions' mean is nearly 0
    assert first["rewards/pairs/mean"] == pytest.approx(0.5)
    record = json.loads((tmp_path / "report.json").read_text())
    found = record["prompts"]["classes"]["rewards"]
    pictures = read_tensors(tmp_path / "before.safetensors")["images"].float() / 255
    spread = Spread()
    expected = spread.score_set(spread.features(pictures, []))
    assert found["set"]["before"] == {"value": pytest.approx(expected), "ci95": None}
    assert found["other"] == found["set"]


def test_several_rewards_become_one(tmp_path: Path, model_folder: Path) -> None:
    def low(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return torch.full((len(images),), -1000.0)

    def blind(images: Tensor, prompts: Sequence[Any]) -> list[float]:
        return [float("nan")] * len(images)

    config = settings(
        tmp_path, model_folder, reward_scales=(0.01, 1.0, 1.0), reward_weights=(1.0, 1.0, 0.0),
        reward_mode="min", max_train_steps=1,
    )  # fmt: skip
    align(config, rewards={"low": low, "blind": blind}, progress=False)
    line = log(tmp_path)[0]
    assert line["rewards/brightness/mean"] < -10  # -(1 - mean)^2 / 0.01
    assert line["reward"] == -1000


def test_pictures_before_training_belong_to_the_run(tmp_path: Path, model_folder: Path) -> None:
    asked = {"num_eval_prompts": 2, "num_eval_images": 1}
    done = settings(tmp_path, model_folder, **asked, max_train_steps=2)
    failing.calls = 3  # pyright: ignore[reportFunctionMemberAccess]
    broken = replace(done, num_eval_images=3, reward_funcs=())
    with pytest.raises(UserError, match="the server is gone"):
        align(broken, rewards={"remote": failing}, progress=False)
    align(done, progress=False)
    assert len(read_tensors(tmp_path / "before.safetensors")["images"]) == 2
    other = replace(done, num_eval_images=2, max_train_steps=4, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="was drawn with other eval_prompts"):
        align(other, progress=False)


def test_a_lora_is_used_and_refused_on_another_base(
    tmp_path: Path, model_folder: Path, build_model: Any, tiny_tokenizer: MultiscaleVQ
) -> None:
    config = settings(tmp_path, model_folder, lora_rank=2, grpo=GRPOConfig(beta=0.1))
    align(config, progress=False)
    pipe = NextScalePipeline.from_pretrained(model_folder, dtype="float32")
    plain = pipe(class_labels=[0, 1], seed=0, output_type="pt").images
    pipe.load_lora(tmp_path / "model", scale=8.0)
    tuned = pipe(class_labels=[0, 1], seed=0, output_type="pt").images
    assert not torch.equal(plain, tuned)
    pipe.unload_lora()
    assert torch.equal(pipe(class_labels=[0, 1], seed=0, output_type="pt").images, plain)
    other = NextScalePipeline(tiny_tokenizer, build_model(seed=9))
    with pytest.raises(UserError, match="other weights"):
        other.load_lora(tmp_path / "model")


def test_a_paired_comparison() -> None:
    before = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    after = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    found = compare(before, after, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert found["mcnemar"] == {"gained": 4, "lost": 1, "p": pytest.approx(0.375)}
    assert found["difference"]["value"] == pytest.approx(0.5)
    low, high = found["difference"]["ci95"]
    assert low < 0.5 < high


# ---- prompts and bad input ---------------------------------------------------------------------


def test_prompts_come_from_files_and_worlds_in_turns(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("one\n\ntwo\n")
    lines = [{"prompt": "three", "text": "hi"}, {"prompt": "four"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = open_prompts([str(tmp_path / "own.txt"), str(tmp_path / "own.jsonl")])
    assert [p.condition for p in found] == ["one", "three", "two", "four"]
    assert found[1].metadata == {"text": "hi"}
    benchmark = {p.condition for p in open_prompts(["benchmark:hard", "benchmark:standard"])}
    training = open_prompts(["scenes:hard", "scenes:standard"])
    assert not benchmark & {p.condition for p in training}
    drawn = [p.condition for n in range(2) for p in draw_prompts(found, 2, 0, n)]
    assert sorted(drawn) == ["four", "one", "three", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "line 1: not a JSON object"), ('{"text": 1}', 'needs either "prompt"')],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        open_prompts([str(tmp_path / "own.jsonl")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_batch_size": 6},
            "does not divide; with train_batch_size 4 and gradient_accumulation_steps 1 it does",
        ),
        ({"num_generations": 1}, "a group of one has nothing to be compared with"),
        (
            {"gradient_accumulation_steps": 5},
            "does not divide; with gradient_accumulation_steps 2 it does",
        ),
        ({"prompts": ("scenes:hard",)}, "takes class labels"),
        ({"prompts": ("nothing",)}, "is no source"),
        ({"reward_weights": (1.0, 2.0)}, "2 numbers for 1 rewards: brightness"),
        ({"reward_funcs": ()}, "reward_funcs is empty"),
        ({"reward_funcs": ("britness",)}, "Did you mean brightness"),
        ({"top_k": 3, "logp_space": "behaviour"}, "no importance ratio"),
        ({"lora_rank": 2, "lora_target_modules": ("nowhere",)}, "lora_target_modules"),
        ({"method": "ppo"}, "be one of grpo, dpo, raft, b2, dragon"),
        ({"pairs": "missing.jsonl", "method": "dpo"}, "does not exist"),
        ({"pairs": "missing.jsonl"}, "pairs are for method dpo"),
        ({"num_train_prompts": 9}, "be at most num_prompts 4"),
        ({"reward_funcs": ("brightness", "brightness")}, 'reward "brightness" is named twice'),
        (
            {"held_out_rewards": ("brightness",), "num_validation_prompts": 1},
            'reward "brightness" is named twice',
        ),
        ({"held_out_rewards": ("vendi",)}, "watched at validations, and num_validation_prompts is"),
        (
            {"eval_prompts": ("benchmark:hard",), "num_eval_prompts": 2},
            "class labels, which eval_prompts benchmark:hard are not",
        ),
        ({"reward_scales": (1.0, 2.0)}, "2 numbers for 1 rewards: brightness"),
        ({"reward_mode": "max"}, "be one of sum, min, majority"),
        ({"train_scales": 5}, r"train_scales is 5, but must lie in \[1, 4\]"),
        ({"train_scales": 2, "method": "find"}, "leave train_scales out, see find.prefix_scales"),
        ({"eval_features": "nowhere", "num_eval_prompts": 2}, "nowhere"),
        ({"grpo": GRPOConfig(scale_rewards="beta_norm")}, r"is -1 to 0, but must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        align(settings(tmp_path / "run", model_folder, **changes), progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("grpo", {"chunk_steps": -1}, "chunk_steps is -1, but must be above 0"),
        ("grpo", {"advantage_clip": -1.0}, "advantage_clip is -1"),
        ("grpo", {"epsilon_high": -5.0}, "epsilon_high is -5"),
        ("grpo", {"std_ddof": 5}, "be 0 or 1"),
        ("grpo", {"scale_weights": (0.0, 0.0)}, "have a number above 0"),
        ("grpo", {"credit": "vmr", "multi_objective_aggregation": "normalize_then_sum"}, "credit"),
        ("dpo", {"label_smoothing": 0.7}, r"lie in \[0, 0.5\)"),
        ("dpo", {"loss_type": "exo_pair"}, "needs label_smoothing"),
        ("dpo", {"loss_type": "sppo_hard", "f_divergence_type": "forward_kl"}, "reverse_kl only"),
        ("dpo", {"rpo_alpha": -1.0}, "dpo.rpo_alpha is -1"),
    ],
)
def test_settings_of_methods_are_checked_where_they_are_given(
    section: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        {"grpo": GRPOConfig, "dpo": DPOConfig}[section](**changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"class_label": 99}, "class label 99 is none of the model's, 0 to 4"),
        ({"class_label": None}, 'line 1: needs "class_label"'),
        ({"class_label": "cat"}, 'line 1: needs "class_label"'),
        ({"class_label": True}, 'line 1: needs "class_label"'),
        ({"class_label": 1.7}, 'line 1: needs "class_label"'),
    ],
)
def test_labels_are_checked_before_the_first_step(
    tmp_path: Path, model_folder: Path, line: dict[str, Any], message: str
) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**line, "chosen": "a.png", "rejected": "b.png"}))
    config = settings(tmp_path / "run", model_folder, method="dpo", pairs=str(path))
    with pytest.raises(UserError, match=message):
        align(config, progress=False)
    if line["class_label"] == 99:
        path.write_text("\n" + json.dumps(line))
        with pytest.raises(UserError, match=message):
            align(settings(tmp_path / "run", model_folder, prompts=(str(path),)), progress=False)


def test_few_prompts_are_watched_and_trained() -> None:
    few = [Prompt(f"text {i}", {}) for i in range(10)]
    watched, rest = hold_out(few, 2)
    assert rest == few
    many = [Prompt(f"text {i % 50}", {}) for i in range(100)]
    watched, rest = hold_out(many, 2)
    assert not {p.condition for p in watched} & {p.condition for p in rest}
    assert len(rest) == 96
    classes = [Prompt(i, {}) for i in range(100)]
    assert hold_out(classes, 2)[1] == classes


@pytest.mark.parametrize("prompt", [None, ["x"], 3])
def test_a_prompt_of_a_pair_is_a_text(tmp_path: Path, prompt: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "chosen": "a.png", "rejected": "b.png"}))
    with pytest.raises(UserError, match='line 1: needs "prompt"'):
        read_pairs(path)


def test_prompts_are_found_for_models_of_classes_and_for_pairs(
    tmp_path: Path, model_folder: Path
) -> None:
    nothing: dict[str, Any] = {"prompts": (), "eval_prompts": (), "num_validation_prompts": 2}
    shown = {"num_eval_prompts": 2, "num_eval_images": 1, "max_train_steps": 1}
    align(settings(tmp_path / "run", model_folder, **nothing, **shown), progress=False)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["prompts"] == recipe["eval_prompts"] == ["classes"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"Tuned from `{short_name(model_folder)}` by `nextscale align --method grpo`" in card
    assert "| classes, 2 prompts | before | after | difference |" in card
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    path = tmp_path / "pairs.jsonl"
    line = json.dumps({"class_label": 3, "chosen": "a.png", "rejected": "b.png"})
    path.write_text(f"{line}\n{line}\n")
    config = settings(
        tmp_path / "pairs", model_folder, method="dpo", pairs=str(path), train_batch_size=2,
        gradient_accumulation_steps=1, **nothing, **shown,
    )  # fmt: skip
    align(config, progress=False)
    assert yaml.safe_load((tmp_path / "pairs" / "recipe.yaml").read_text())["prompts"] == [
        str(path)
    ]


def test_a_pair_file_with_missing_pictures_names_them(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"class_label": 0, "chosen": "a.png", "rejected": "b.png"}))
    config = settings(tmp_path / "run", model_folder, method="dpo", pairs=str(path))
    with pytest.raises(UserError, match="2 pictures are missing"):
        align(config, progress=False)


def test_a_run_that_nothing_could_score_fails(tmp_path: Path, model_folder: Path) -> None:
    config = settings(tmp_path / "run", model_folder, reward_funcs=(), max_train_steps=2)

    def silent(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images.mean((1, 2, 3)) * torch.nan

    with pytest.raises(UserError, match="could score no sample of any rollout") as found:
        align(config, rewards={"silent": silent}, progress=False)
    assert found.value.exit_code == 1
    assert not (tmp_path / "run" / "model").exists()


def failing(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    failing.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
    if failing.calls > 3:  # pyright: ignore[reportFunctionMemberAccess]
        raise RuntimeError("the server is gone")
    return images.mean((1, 2, 3))


def test_a_reward_that_fails_later_names_the_last_checkpoint(
    tmp_path: Path, model_folder: Path
) -> None:
    failing.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    config = settings(tmp_path, model_folder, reward_funcs=())
    with pytest.raises(UserError, match=r"the server is gone.*Last checkpoint: .*step_0") as e:
        align(config, rewards={"remote": failing}, progress=False)
    assert e.value.exit_code == 1


def test_unscorable_samples_do_not_stop_a_run(tmp_path: Path, model_folder: Path) -> None:
    def some(images: Tensor, prompts: Sequence[Any]) -> list[float | None]:
        values = images.mean((1, 2, 3)).tolist()
        return [None if i % 3 == 0 else v for i, v in enumerate(values)]

    align(settings(tmp_path, model_folder, reward_funcs=()), rewards={"some": some}, progress=False)
    line = log(tmp_path)[0]
    assert line["rewards/some/unscorable"] == pytest.approx(6 / 16)
    assert line["grad_norm"] > 0


def test_a_falling_held_out_reward_stops_the_run(tmp_path: Path, model_folder: Path) -> None:
    calls = {"up": 0, "down": 0}

    def up(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        calls["up"] += 1
        return images.mean((1, 2, 3)) + calls["up"]

    def down(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        calls["down"] += 1
        return images.mean((1, 2, 3)) - calls["down"]

    config = settings(
        tmp_path, model_folder, reward_funcs=("up",), held_out_rewards=("down",),
        held_out_patience=2, num_validation_prompts=2, validation_steps=1, max_train_steps=10,
        checkpointing_steps=None,
    )  # fmt: skip
    result = align(config, rewards={"up": up, "down": down}, progress=False)
    assert result.fit.steps == 2
    assert result.fit.checkpoint is not None
    assert result.fit.checkpoint.name == "step_00000002"


def test_captions_of_a_dataset_come_as_often_as_it_has_them() -> None:
    found = open_prompts(["captions:scenes@validation"])
    shapes = [parse(str(prompt.condition)).num_shapes for prompt in found]
    assert all(0.2 < shapes.count(n) / len(shapes) < 0.5 for n in (1, 2, 3))
    assert len({prompt.condition for prompt in found}) < len(found)
    assert all(prompt.asked == prompt.condition for prompt in found)
    digits = open_prompts(["captions:digits"], num_classes=10)
    assert {prompt.condition for prompt in digits} == set(range(10))
    with pytest.raises(UserError, match=r"captions:digits: the dataset has no captions"):
        open_prompts(["captions:digits"])


def test_a_curriculum_and_constraints_go_on_where_they_were(
    tmp_path: Path, model_folder: Path
) -> None:
    for name, labels in {"few": (0, 1), "more": (2, 3, 4)}.items():
        lines = [json.dumps({"class_label": label}) for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    changes: dict[str, Any] = {
        "prompts": tuple(str(tmp_path / f"{name}.jsonl") for name in ("few", "more")),
        "curriculum": "dump",
        "reward_mode": "lagrangian",
        "reward_funcs": ("brightness", "jpeg_compressibility"),
        "reward_thresholds": (float("nan"), 0.0),
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "train_batch_size": 16,
        "gradient_accumulation_steps": 1,
    }
    align(settings(tmp_path / "whole", model_folder, **changes), progress=False)
    first = settings(tmp_path / "parts", model_folder, **{**changes, "max_train_steps": 2})
    align(first, progress=False)
    rest = settings(tmp_path / "parts", model_folder, resume_from_checkpoint="latest", **changes)
    align(rest, progress=False)
    whole, parts = log(tmp_path / "whole"), log(tmp_path / "parts")
    names = [key for key in whole[0] if key.startswith(("curriculum/", "lagrangian/"))]
    assert len(names) == 4
    assert (
        whole[-1]["lagrangian/jpeg_compressibility"] > whole[0]["lagrangian/jpeg_compressibility"]
    )
    for name in [*names, "loss", "reward"]:
        assert parts[-1][name] == whole[-1][name], name


def test_settings_of_another_method_are_warned_of(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"grpo": GRPOConfig(beta=0.1), "method": "raft", "reward_funcs": ("brightness",)}
    given |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "max_train_steps": 1}
    with caplog.at_level("WARNING", "nextscale"):
        align(settings(tmp_path / "run", model_folder, **given), progress=False)
    said = "settings of grpo are given, by a flag or the recipe (beta), but the method is raft, "
    assert said + "which does not read them" in caplog.messages


def test_ctrl_c_says_what_is_kept(
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(config: AlignConfig, **_: Any) -> None:
        raise KeyboardInterrupt

    changes = {"checkpointing_steps": 1, "reward_funcs": ("brightness",), "max_train_steps": 2}
    align(settings(tmp_path / "kept", model_folder, **changes), progress=False)
    monkeypatch.setattr("nextscale.align.train.align", interrupted)
    for name, said in {
        "lost": f"before the first checkpoint: {tmp_path / 'lost'} holds nothing",
        "kept": f"{tmp_path / 'kept'} is kept up to step_",
    }.items():
        assert main(["align", "--config", "grpo-scenes", "--output_dir", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
