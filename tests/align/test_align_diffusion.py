"""`align` on diffusers pipelines: every method, LoRA, what is left behind."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as typed_diffusers
import pytest
import tiny_pipelines
import torch
from torch import Tensor

from nextscale.align import AlignConfig, align
from nextscale.align.config import DiffusionSettings
from nextscale.align.experience import Rollout, collect, sample_streams
from nextscale.align.methods.b2 import B2, B2Config
from nextscale.align.methods.d2o import D2OConfig
from nextscale.align.methods.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from nextscale.align.methods.dpo import DPO, DPOConfig
from nextscale.align.methods.fdpg import FDPGConfig
from nextscale.align.methods.grpo import GRPO, GRPOConfig
from nextscale.align.methods.r0 import R0, R0Config
from nextscale.align.methods.sibling import SiblingConfig
from nextscale.align.objectives import diffusion_nft_loss
from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.prompts import Prompt
from nextscale.align.references import Given
from nextscale.align.rewards import open_reward
from nextscale.errors import UserError

# Its annotations do not know what its pipelines take.
diffusers: Any = typed_diffusers


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion on disk."""
    folder = tmp_path_factory.mktemp("pipe") / "pipe"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_pipelines.stable_diffusion().save_pretrained(folder)
    return folder


def settings(folder: Path, model: Path, **changes: Any) -> AlignConfig:
    prompts = folder.with_suffix(".txt")
    prompts.write_text("red\ngreen\nblue\n")
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(model),
        "prompts": (str(prompts),),
        "eval_prompts": (str(prompts),),
        "reward_funcs": ("brightness",),
        "diffusion": DiffusionSettings(num_inference_steps=3),
        "num_prompts": 2,
        "num_generations": 4,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 2,
        "checkpointing_steps": None,
        "logging_steps": 1,
        "num_eval_prompts": 0,
        "num_validation_prompts": 0,
        "mixed_precision": "no",
        "report_to": "none",
        "grpo": GRPOConfig(epsilon=1e-4),
        "dpo": DPOConfig(beta=100.0),
    }
    return AlignConfig(**{**values, **changes})


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "method",
    [
        *("grpo", "dpo", "raft", "b2", "dragon", "diffusion_nft", "r0", "seppo"),
        *("d2o", "reg_grpo", "fdpg", "sibling"),
    ],
)
def test_every_method_trains_a_pipeline_that_diffusers_opens(
    tmp_path: Path, pipeline_folder: Path, method: str
) -> None:
    small: dict[str, Any] = {"train_batch_size": 1} if method in ("dpo", "raft", "dragon") else {}
    if method == "seppo":
        small = {"prompts": ("examples:scenes",)}
    if method in ("d2o", "reg_grpo"):  # a batch of groups
        small = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    small |= {
        "sibling": {"sibling": SiblingConfig(steps=(1,), loss=GRPOConfig(epsilon=1e-4))},
        "d2o": {"d2o": D2OConfig(alpha=1.0)},
        "fdpg": {"fdpg": FDPGConfig(loss=GRPOConfig(epsilon=1e-4))},
    }.get(method, {})
    branches = B2Config(advantage="branch")
    config = settings(tmp_path / "run", pipeline_folder, method=method, b2=branches, **small)
    align(config, progress=False)
    lines = log(tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in lines)
    if method == "grpo":
        assert lines[0]["ratio/max_deviation"] < 1e-4
    base = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    tuned = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    pairs = zip(tuned.unet.parameters(), base.unet.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    for part in ("vae", "text_encoder"):
        for name, tensor in getattr(tuned, part).state_dict().items():
            assert torch.equal(tensor, getattr(base, part).state_dict()[name])


def test_branches_begin_where_a_step_is_random(tmp_path: Path) -> None:
    """The last step of `set_alpha_to_one` is not: the interval ends before it."""
    pipe = tiny_pipelines.stable_diffusion()
    changes = {"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    policy = DiffusionPolicy(pipe, num_inference_steps=5)
    assert B2(B2Config(first_interval=1), policy).branch() == ((3, 4),)
    with pytest.raises(UserError, match="be at most the 4 steps that are trained"):
        B2(B2Config(last_interval=5), policy)
    still = DiffusionPolicy(pipe, num_inference_steps=5, stochastic_steps=range(0))
    with pytest.raises(UserError, match="no step of this sampler is random"):
        B2(B2Config(), still)


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, pipeline_folder: Path) -> None:
    changes = {"checkpointing_steps": 1, "max_train_steps": 2}
    align(settings(tmp_path / "whole", pipeline_folder, **changes), progress=False)
    part = settings(tmp_path / "part", pipeline_folder, **changes)
    align(replace(part, max_train_steps=1), progress=False)
    align(replace(part, resume_from_checkpoint="latest"), progress=False)
    keys = ("step", "loss", "reward", "grad_norm")
    whole, resumed = ([[x[k] for k in keys] for x in log(tmp_path / n)] for n in ("whole", "part"))
    assert whole == resumed


def test_two_processes_are_one(
    tmp_path: Path,
    pipeline_folder: Path,
    repeat_with_two_processes: Callable[[str, Path, Path], None],
) -> None:
    """Several backward passes per micro-batch, one for each denoising step."""
    config = settings(tmp_path / "one", pipeline_folder, num_prompts=2)
    align(config, progress=False)
    repeat_with_two_processes("align", tmp_path / "one", tmp_path / "two")
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_clip_range_and_pull_are_those_of_averaged_log_probabilities(
    pipeline_folder: Path,
) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    policy = DiffusionPolicy(pipe, num_inference_steps=2)
    joint = DiffusionPolicy(pipe, num_inference_steps=2, logp_reduction="sum")
    assert GRPO(GRPOConfig(), policy).epsilon == 1e-4
    assert GRPO(GRPOConfig(), joint).epsilon == 0.2
    assert GRPO(GRPOConfig(epsilon=0.3), policy).epsilon == 0.3
    assert DPO(DPOConfig(), policy).beta == 5000
    assert DPO(DPOConfig(score="policy"), policy).beta == 0.1
    assert DPO(DPOConfig(beta=7.0), policy).beta == 7
    with pytest.raises(UserError, match=r"delta is 1.00005.* be above 1 \+ epsilon_high, 1.0001"):
        GRPO(GRPOConfig(delta=1.00005), policy)


def test_in_half_precision_the_policy_starts_as_its_reference(
    tmp_path: Path, pipeline_folder: Path
) -> None:
    """Policy and reference must take the same kernels: beta multiplies what they differ by."""
    config = settings(
        tmp_path / "run", pipeline_folder, method="dpo", mixed_precision="bf16", num_prompts=4,
        train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=1,
    )  # fmt: skip
    align(config, progress=False)
    (line,) = log(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("family", "method"), [("sd", "grpo"), ("sd", "dpo"), ("dit", "grpo")])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, pipeline_folder: Path, family: str, method: str
) -> None:
    small: dict[str, Any] = {"train_batch_size": 1} if method != "grpo" else {}
    if family == "dit":  # whose label embedding drops labels while it trains
        pipe, _ = tiny_pipelines.build("dit")
        pipeline_folder = tmp_path / "pipe"
        pipe.save_pretrained(pipeline_folder)
        small = {"prompts": ("classes",), "eval_prompts": ("classes",)}
    for name, on in (("plain", False), ("less", True)):
        config = settings(
            tmp_path / name, pipeline_folder, method=method, gradient_checkpointing=on, **small
        )
        align(config, progress=False)
    plain, less = (log(tmp_path / name) for name in ("plain", "less"))
    for one, other in zip(plain, less, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.fixture(scope="module")
def grey_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has learnt latents of one random level each: the noised surrogate says what
    is likely only for networks that model something."""
    folder = tmp_path_factory.mktemp("grey") / "pipe"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = tiny_pipelines.stable_diffusion()
        words = pipe.tokenizer("red", padding="max_length", return_tensors="pt").input_ids
        text = pipe.text_encoder(words)[0].detach().expand(32, -1, -1)
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=3e-3)
        for _ in range(200):
            levels = 0.5 * torch.randn(32, 1, 1, 1).expand(-1, 4, 8, 8)
            noise, times = torch.randn(32, 4, 8, 8), torch.randint(0, 1000, (32,))
            noisy = pipe.scheduler.add_noise(levels, noise, times)
            loss = (pipe.unet(noisy, times, text).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1000, 2000))]
)
@pytest.mark.parametrize("method", ["grpo", "dpo", "diffusion_nft"])
def test_every_method_raises_the_reward_of_a_pipeline(
    tmp_path: Path, grey_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, seed: int
) -> None:
    """Not RAFT: the start of these few large steps tells the level, whatever the samples were."""

    def level(policy: DiffusionPolicy, trajectory: Any) -> Tensor:
        return trajectory.actions[-1].mean((1, 2, 3))[:, None, None, None].expand(-1, 3, 1, 1)

    def as_it_is(images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images.mean((1, 2, 3))

    monkeypatch.setattr(DiffusionPolicy, "decode", level)
    own: dict[str, Any] = {
        "grpo": {"train_batch_size": 64},
        "dpo": {"train_batch_size": 16},
        # It judges each sample at one random time alone: more of them, and slower.
        "diffusion_nft": {"num_prompts": 48, "train_batch_size": 192, "learning_rate": 1e-3},
    }[method]
    shared: dict[str, Any] = {"num_prompts": 16, "learning_rate": 3e-3} | own
    config = settings(
        tmp_path / "run", grey_folder, method=method, reward_funcs=(), guidance_scale=1.0,
        gradient_accumulation_steps=1, max_train_steps=20, seed=seed,
        lr_warmup_steps=5 if method == "diffusion_nft" else 0,
        diffusion=DiffusionSettings(num_inference_steps=4), **shared,
    )  # fmt: skip
    align(config, rewards={"level": as_it_is}, progress=False)
    means = torch.tensor([line["rewards/level/mean"] for line in log(tmp_path / "run")])
    error = means[:5].std() / 5**0.5
    assert means[-5:].mean() > means[:5].mean() + 3 * 2**0.5 * error


@pytest.mark.parametrize("chunk", [2, 3])
@pytest.mark.parametrize("scale_weights", [(), (1.0, 0.1, 0.01)])
def test_the_steps_at_once_change_no_gradient(
    tmp_path: Path, pipeline_folder: Path, chunk: int, scale_weights: tuple[float, ...]
) -> None:
    norms = []
    for size in (1, chunk):
        grpo = GRPOConfig(epsilon=1e-4, chunk_steps=size, beta=0.1, scale_weights=scale_weights)
        config = settings(tmp_path / str(size), pipeline_folder, grpo=grpo, max_train_steps=1)
        align(config, progress=False)
        norms.append(log(tmp_path / str(size))[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_lora_loads_in_diffusers_and_the_report_has_a_kl_per_step(
    tmp_path: Path, pipeline_folder: Path
) -> None:
    config = settings(
        tmp_path / "run", pipeline_folder, lora_rank=2, num_eval_prompts=2, num_eval_images=1,
        grpo=GRPOConfig(epsilon=1e-4, beta=0.1, kl_estimator="exact"), num_validation_prompts=1,
    )  # fmt: skip
    align(config, progress=False)
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(record["kl"]["per_step"]) == 3
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(tmp_path / "run" / "model")
    assert any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_losses_of_whole_samples_need_all_steps(tmp_path: Path, pipeline_folder: Path) -> None:
    config = settings(tmp_path / "run", pipeline_folder, grpo=GRPOConfig(loss_type="luspo"))
    with pytest.raises(UserError, match=r"luspo needs all steps at once; set grpo\.chunk_steps 3"):
        align(config, progress=False)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_other_families_of_pipelines(tmp_path: Path, name: str) -> None:
    pipe, arguments = tiny_pipelines.build(name)
    pipe.save_pretrained(tmp_path / "pipe")
    call = {key: json.dumps(value) for key, value in arguments.get("call", {}).items()}
    prompts = {"prompts": ("classes",), "eval_prompts": ("classes",)} if name == "dit" else {}
    config = settings(
        tmp_path / "run", tmp_path / "pipe", **prompts, num_eval_prompts=2, num_eval_images=1,
        diffusion=DiffusionSettings(num_inference_steps=3, call=call), max_train_steps=1,
    )  # fmt: skip
    align(config, progress=False)
    assert log(tmp_path / "run")[0]["grad_norm"] > 0
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    type(pipe).from_pretrained(tmp_path / "run" / "model", **absent)
    if name == "dit":
        with pytest.raises(UserError, match="no LoRA format for DiTPipeline"):
            align(replace(config, lora_rank=2, output_dir=str(tmp_path / "lora")), progress=False)


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    pipe, _ = tiny_pipelines.build("dit")
    pipe.save_pretrained(tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"1": "goldfish"}}))
    config = settings(tmp_path / "run", tmp_path / "pipe", prompts=("classes",), max_train_steps=1)
    align(config, progress=False)
    tuned = diffusers.DiTPipeline.from_pretrained(tmp_path / "run" / "model")
    assert tuned.get_label_ids(["goldfish"]) == [1]


def test_settings_of_tokens_are_refused(tmp_path: Path, pipeline_folder: Path) -> None:
    config = settings(tmp_path / "run", pipeline_folder, top_k=5, logp_space="conditional")
    with pytest.raises(UserError, match="top_k, logp_space belongs to next-scale models"):
        align(config, progress=False)


def test_a_scheduler_without_log_probability_is_said(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"EulerDiscreteScheduler.*DDIMScheduler\.from_config"):
        align(settings(tmp_path / "run", tmp_path / "pipe"), progress=False)


# ---- further methods -----------------------------------------------------------------------------


def drawn_from(policy: DiffusionPolicy, reward: str = "brightness") -> Rollout:
    """Two groups of four samples."""
    prompts = [Prompt("a red circle", {}), Prompt("green", {})]
    return collect(policy, [open_reward(reward)], prompts, 4, (0, 0))


def test_diffusion_nft_measures_from_the_policy_that_drew(pipeline_folder: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    policy = DiffusionPolicy(pipe, num_inference_steps=2)
    method = DiffusionNFT(DiffusionNFTConfig(reference_weight=0.0), policy)
    with torch.no_grad():
        for p in policy.network.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p.shape)))
    experience = method.learn(drawn_from(policy))
    rows = torch.arange(8)
    share = experience.columns["share"]
    assert 0 < float(share.min()) < 0.5 < float(share.max()) < 1
    drew = copy.deepcopy(policy.network)
    for step, moved in ((0, False), (3, False), (3, True)):
        if moved:
            with torch.no_grad():
                next(policy.network.parameters()).mul_(1.5)
        with torch.no_grad():
            ((loss, _),) = method.losses(experience, rows, step, policy.network)
            generators = sample_streams((0, 0, step), rows.tolist())
            samples = experience.rollout.trajectory
            new, old = (
                policy.errors(samples, generators=generators, network=network)
                for network in (policy.network, drew)
            )
        wanted = 5.0 * diffusion_nft_loss(new, old, share).mean()
        torch.testing.assert_close(loss, wanted)
        assert moved == (not torch.allclose(new, old))


def test_diffusion_nft_is_pulled_to_its_reference(pipeline_folder: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    policy = DiffusionPolicy(pipe, num_inference_steps=2, reference=Given(other))
    losses = {}
    for weight in (0.0, 2.0):
        method = DiffusionNFT(DiffusionNFTConfig(reference_weight=weight), policy)
        experience = method.learn(drawn_from(policy))
        with torch.no_grad():
            ((loss, shown),) = method.losses(experience, torch.arange(8), 0, policy.network)
        losses[weight] = float(loss)
        if weight:
            assert shown["reference/distance"] > 0
            assert losses[2.0] - losses[0.0] == pytest.approx(
                2 * shown["reference/distance"], rel=1e-4
            )


def test_the_gradient_of_a_reward_raises_it(pipeline_folder: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    policy = DiffusionPolicy(pipe, num_inference_steps=3)
    policy.network.requires_grad_(True)
    method = R0(R0Config(last_steps=2), policy)
    experience = method.learn(drawn_from(policy, "color:red"))
    rows, found = torch.arange(8), []
    for _ in range(2):  # the same noise: the same step
        ((loss, shown),) = method.losses(experience, rows, 1, policy.network)
        assert float(loss.detach()) == pytest.approx(-float(shown["redrawn/reward"]))
        found.append(float(shown["redrawn/reward"]))
        loss.backward()
        with torch.no_grad():
            for p in policy.network.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad / p.grad.norm().clamp_min(1e-6)
                    p.grad = None
    assert found[1] > found[0]
