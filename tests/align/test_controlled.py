"""A control module as what is tuned: its policy, its reward, a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextscale.align import AlignConfig, align
from nextscale.align.controlled import ControlledPolicy
from nextscale.align.methods.grpo_config import GRPOConfig
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.prompts import DatasetPicture, Prompt, open_prompts
from nextscale.align.rewards import open_reward
from nextscale.align.rewards.reward import CheckedReward
from nextscale.control import AdapterConfig, AdditiveConfig, ControlRecord, build_control
from nextscale.control.encoder import EncoderConfig
from nextscale.control.module import ControlConfig
from nextscale.data.images import save_png
from nextscale.data.scenes import render, sample_scene
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import stream
from nextscale.var import SamplingConfig
from nextscale.var.lora import base_fingerprint

SMALL = EncoderConfig(width=16, depth=1, heads=2)
SIZES = {
    "additive": AdditiveConfig(encoder=SMALL, num_sites=2),
    "adapter": AdapterConfig(encoder=SMALL, num_sites=1),
}
GUIDED = SamplingConfig(guidance_scale=2.0, temperature=1.2)
PROMPTS = [
    Prompt(label, {"control_picture": DatasetPicture("scenes", "validation", label)})
    for label in range(4)
]


def add_control(pipe: NextScalePipeline, config: ControlConfig) -> None:
    """A random module for low-resolution pictures."""
    record = ControlRecord(
        type="lowres",
        resolution=(32, 32),
        base_fingerprint=base_fingerprint(pipe.transformer),
        extractor={"spec": "lowres", "settings": {"factor": 4}},
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = build_control(config, pipe.transformer.config, record)
        for parameter in module.parameters():
            parameter.data += torch.randn_like(parameter) * 0.3
    pipe.add_control(module)


@pytest.fixture(params=list(SIZES))
def pipe(request: pytest.FixtureRequest, control_base: Path) -> NextScalePipeline:
    """A random model with a random control."""
    pipe = NextScalePipeline.from_pretrained(control_base, dtype="float32")
    add_control(pipe, SIZES[request.param])
    return pipe


@pytest.fixture
def policy(pipe: NextScalePipeline) -> ControlledPolicy:
    return ControlledPolicy(pipe, pipe.control("lowres"), settings=GUIDED)


def rows(policy: NextScalePolicy) -> Any:
    return policy.encode([prompt.asked for prompt in PROMPTS])


def streams(count: int) -> list[torch.Generator]:
    return [stream(0, i) for i in range(count)]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_pass_says_what_sampling_said(pipe: NextScalePipeline, guidance: float) -> None:
    settings = replace(GUIDED, guidance_scale=guidance)
    policy = ControlledPolicy(pipe, pipe.control("lowres"), settings=settings)
    drawn = policy.sample(rows(policy), generators=streams(4))
    found = policy.evaluate(drawn)
    torch.testing.assert_close(found.logp, torch.cat(drawn.logps, 1), atol=1e-4, rtol=0)


def test_control_changes_what_is_drawn(policy: ControlledPolicy) -> None:
    plain = NextScalePolicy(policy.pipeline, GUIDED)
    labels = plain.encode([prompt.condition for prompt in PROMPTS])
    base = plain.sample(labels, generators=streams(4))
    drawn = policy.sample(rows(policy), generators=streams(4))
    assert not torch.equal(torch.cat(drawn.actions, 1), torch.cat(base.actions, 1))


@pytest.mark.parametrize("at_step", [0, 1, 2])
def test_branches_keep_their_control(policy: ControlledPolicy, at_step: int) -> None:
    """What is said of a branch in one pass is what was said when it was drawn."""
    parents = policy.sample(rows(policy), generators=streams(4))
    drawn = policy.branch(parents, at_step, 2, generators=streams(8))
    for k in range(at_step):
        assert torch.equal(drawn.actions[k], parents.actions[k].repeat_interleave(2, 0))
    found = policy.evaluate(drawn)
    torch.testing.assert_close(found.logp, torch.cat(drawn.logps, 1), atol=1e-4, rtol=0)


def test_gradients_reach_the_module_alone(policy: ControlledPolicy) -> None:
    policy.pipeline.transformer.requires_grad_(False)
    policy.controlled.control.requires_grad_(True)
    drawn = policy.sample(rows(policy), generators=streams(4))
    policy.evaluate(drawn).logp.sum().backward()
    for name, parameter in policy.network.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == name.startswith("control."), name


def test_prompts_of_a_dataset_bring_their_pictures() -> None:
    prompts = open_prompts(["images:scenes@validation"])
    picture = prompts[3].metadata["control_picture"]
    assert picture == DatasetPicture("scenes", "validation", 3)
    assert picture.load(32).shape == (32, 32, 3)
    assert isinstance(prompts[3].condition, str)
    assert prompts[3].asked != prompts[4].asked
    with pytest.raises(UserError, match="the split is train, validation or all"):
        open_prompts(["images:scenes@tset"])


def scored(spec: str, images: np.ndarray, metadata: list[Mapping[str, Any]]) -> list[float]:
    reward = open_reward(f"control_consistency:{spec}")
    assert isinstance(reward, CheckedReward)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return reward(pictures, ["x"] * len(images), metadata).values.tolist()


@pytest.mark.parametrize("spec", ["canny", "depth:scenes", "segmentation", "lowres", "softedge"])
def test_the_true_picture_agrees_best(spec: str) -> None:
    if spec == "canny":
        pytest.importorskip("cv2")
    if spec == "softedge":
        pytest.importorskip("kornia")
    metadata = [prompt.metadata for prompt in PROMPTS]
    true = np.stack([entry["control_picture"].load(64) for entry in metadata])
    best = scored(spec, true, metadata)
    assert best == pytest.approx([1.0] * 4, abs=1e-5)
    others = scored(spec, np.roll(true, 1, axis=0), metadata)
    assert all(0 <= other < 1 for other in others)


def test_consistency_needs_pictures() -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=r"images:scenes, and --control"):
        scored("lowres", images, [{}, {}])
    with pytest.raises(UserError, match=r"there is no control type \"edges\""):
        open_reward("control_consistency:edges")


def test_a_new_condition_is_learnt_by_reward(
    tmp_path: Path, control_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CTRL: pictures come to show what their map says, which the model was never told."""

    def share_of_first_codes(policy: NextScalePolicy, trajectory: Any) -> torch.Tensor:
        tokens = torch.cat(trajectory.actions, dim=1)
        low = (tokens < policy.model.config.codebook_size // 2).float().mean(1)
        return low[:, None, None, None].expand(-1, 3, 32, 32)

    def says(condition: Mapping[str, Any]) -> bool:
        return condition["control_picture"].index % 2 == 1

    def follows(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        wanted = torch.tensor([says(entry) for entry in metadata], dtype=torch.float32)
        return 1 - (images.mean((1, 2, 3)) - wanted).abs()

    def two_maps(picture: DatasetPicture, side: int) -> np.ndarray:
        return np.full((3, side, side), float(picture.index % 2), np.float32)

    monkeypatch.setattr("nextscale.align.train.open_prompts", lambda *_, **__: PROMPTS)
    monkeypatch.setattr("nextscale.align.controlled.map_cache", lambda _: two_maps)
    monkeypatch.setattr(NextScalePolicy, "decode", share_of_first_codes)
    config = settings(
        tmp_path / "run", control_base, control="new:lowres", reward_funcs=(), num_generations=8,
        train_batch_size=32, gradient_accumulation_steps=1, max_train_steps=40, learning_rate=1e-2,
        num_eval_prompts=0, num_validation_prompts=0, guidance_scale=1.0, logging_steps=1,
        grpo=GRPOConfig(beta=0.01),
    )  # fmt: skip
    align(config, rewards={"follows": follows}, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reached = [line["rewards/follows/mean"] for line in lines]
    assert reached[0] < 0.6
    assert reached[-1] > 0.8
    module = NextScalePipeline.from_pretrained(control_base)
    assert module.load_control(tmp_path / "run" / "model") == "lowres"


def settings(folder: Path, model: Path, **changes: Any) -> AlignConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(model),
        "control": "lowres",
        "prompts": (f"images:{folder.parent / 'pictures'}",),
        "reward_funcs": ("control_consistency:lowres",),
        "num_prompts": 4,
        "num_generations": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "num_eval_prompts": 4,
        "num_eval_images": 2,
        "num_validation_prompts": 2,
        "validation_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
        "logging_steps": 1,
    }
    return AlignConfig(**{**values, **changes})


@pytest.fixture
def controlled_model(control_base: Path, tmp_path: Path) -> Path:
    """A model with a control, beside a dataset of two classes."""
    for i, image in enumerate(render([sample_scene(1, i) for i in range(12)], 32)):
        split = "validation" if i < 4 else "train"
        path = tmp_path / "pictures" / split / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, path)
    pipe = NextScalePipeline.from_pretrained(control_base, dtype="float32")
    add_control(pipe, SIZES["additive"])
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["grpo", "dpo", "b2"])
def test_a_run_tunes_the_module_and_leaves_the_base(
    method: str, controlled_model: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": method, "learning_rate": 1e-3}
    if method != "grpo":
        changes |= {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    result = align(settings(tmp_path / "run", controlled_model, **changes), progress=False)
    assert result.fit.steps == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        "control_consistency"
        in report["prompts"][f"images:{tmp_path / 'pictures'}@validation"]["rewards"]
    )
    pipe = NextScalePipeline.from_pretrained(controlled_model, dtype="float32")
    before = pipe.control("lowres").state_dict()
    assert pipe.load_control(tmp_path / "run") == "lowres"  # so the base has not changed
    after = pipe.control("lowres").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("classes",)}, "has none: use prompts and eval_prompts such as images:"),
        ({"control": None}, "pass --control NAME"),
        ({"control": "canny"}, "canny"),
        ({"lora_rank": 4}, "leave lora_rank out"),
        ({"method": "find"}, "leave control out"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, controlled_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        align(settings(tmp_path / "run", controlled_model, **changes), progress=False)
    assert not (tmp_path / "run" / "model").exists()
