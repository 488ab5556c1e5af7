"""Diffusers pipelines as policies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft import LoraConfig
from tiny_pipelines import (
    FAMILIES,
    PIXELS,
    PROMPTS,
    SIZE,
    build,
    ddim,
    diffusers,
    sd3,
    stable_diffusion,
)

from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.policies.saving import save_diffusion
from nextscale.align.references import AdapterOff, FrozenCopy, NamedAdapter
from nextscale.align.trajectory import Policy, Trajectory, map_rows
from nextscale.errors import UserError

STEPS = 4


def policy_of(name: str, **changes: Any) -> DiffusionPolicy:
    pipe, settings = build(name)
    return DiffusionPolicy(pipe, **{"num_inference_steps": STEPS, **settings, **changes})


def conditions_of(policy: DiffusionPolicy, count: int = 3) -> list[Any]:
    return [0, 2, 1, 0][:count] if policy.calls.by_class else list(PROMPTS[:count])


def streams(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(policy: DiffusionPolicy, *seeds: int, **settings: Any) -> Trajectory:
    conditions = policy.encode(conditions_of(policy, len(seeds)))
    return policy.sample(conditions, generators=streams(*seeds), **settings)


def add_lora(pipe: Any, name: str = "default", seed: int = 0) -> None:
    """A LoRA that does something."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe.unet.add_adapter(config, adapter_name=name)
        for parameter_name, parameter in pipe.unet.named_parameters():
            if f".{name}." in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    """Of a Stable Diffusion with guidance; shared, do not change it."""
    return policy_of("sd")


@pytest.fixture(scope="module")
def trajectory(policy: DiffusionPolicy) -> Trajectory:
    return drawn(policy, 0, 1, 2)


# ---- the pipeline's own pictures -------------------------------------------------------------


@pytest.mark.parametrize("name", list(FAMILIES))
def test_deterministic_samples_are_the_pipeline_s_own(name: str) -> None:
    policy = policy_of(name)
    conditions = conditions_of(policy)
    ours = policy.decode(drawn(policy, 5, 6, 7, deterministic=True))
    call = dict(policy.calls.settings)
    key = "class_labels" if policy.calls.by_class else "prompt"
    theirs = policy.pipe(**call, **{key: conditions}, generator=streams(5, 6, 7), output_type="pt")
    images = torch.as_tensor(theirs.images)
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    assert ours.shape == (3, 3, PIXELS, PIXELS)
    assert float(images.std()) > 0.01
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_stochastic_samples_are_the_pipeline_s_own_too(name: str) -> None:
    policy = policy_of(name)
    call = dict(policy.calls.settings) | {"eta": 1.0, "output_type": "pt"}
    theirs = policy.pipe(**call, prompt=list(PROMPTS[:3]), generator=streams(5, 6, 7)).images
    ours = policy.decode(drawn(policy, 5, 6, 7))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_evaluation_repeats_the_log_probs_of_the_draw(name: str) -> None:
    policy = policy_of(name)
    trajectory = drawn(policy, 0, 1, 2)
    found = policy.evaluate(trajectory)
    assert found.logp.shape == (3, STEPS)
    assert bool(found.mask.all())
    torch.testing.assert_close(found.logp, torch.stack(trajectory.logps, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_log_probs_are_densities_of_the_noise(name: str) -> None:
    policy = policy_of(name)
    trajectory = drawn(policy, 3)
    generator = streams(3)[0]
    torch.randn(trajectory.actions[0][0].shape, generator=generator)  # the start
    for step in range(STEPS):
        z = torch.randn(trajectory.actions[0][0].shape, generator=generator)
        std = policy.transitions.std(step)
        wanted = torch.distributions.Normal(0.0, 1.0).log_prob(z).mean() - torch.tensor(std).log()
        torch.testing.assert_close(trajectory.logps[step][0], wanted, rtol=1e-4, atol=1e-4)


def test_sum_is_the_mean_times_the_dimensions() -> None:
    total, mean = policy_of("sd", logp_reduction="sum"), policy_of("sd")
    one, other = drawn(total, 0, 1), drawn(mean, 0, 1)
    dimensions = one.actions[0][0].numel()
    for a, b in zip(one.logps, other.logps, strict=True):
        torch.testing.assert_close(a, b * dimensions, rtol=1e-4, atol=1e-3)


# ---- independence ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux", "flux-guided"])
def test_batch_size_and_order_change_nothing(name: str) -> None:
    policy = policy_of(name)
    conditions = policy.encode(PROMPTS)
    whole = policy.sample(conditions, generators=streams(0, 1, 2, 3))
    order = torch.tensor([2, 0, 3, 1])
    policy.batch_size = 2
    shuffled = policy.sample(
        map_rows(conditions, lambda rows: rows[order]), generators=streams(*order.tolist())
    )
    for a, b in zip(whole.actions, shuffled.actions, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-4)
    for a, b in zip(whole.logps, shuffled.logps, strict=True):
        torch.testing.assert_close(a[order], b, rtol=0, atol=1e-5)
    assert shuffled.branch_id.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(
        policy.decode(whole)[order], policy.decode(shuffled), rtol=0, atol=1e-4
    )


def test_conditions_matter_and_are_rows(policy: DiffusionPolicy) -> None:
    conditions = policy.encode(PROMPTS[:2])
    swapped = map_rows(conditions, lambda rows: rows.flip(0))
    one, other = (policy.sample(c, generators=streams(4, 4)) for c in (conditions, swapped))
    torch.testing.assert_close(one.actions[-1], other.actions[-1].flip(0), rtol=0, atol=1e-4)
    assert (one.actions[-1][0] - one.actions[-1][1]).abs().max() > 1e-3


def test_flags_and_global_random_state_stay(policy: DiffusionPolicy) -> None:
    network = policy.network.train()
    state = torch.get_rng_state()
    try:
        conditions = policy.encode(PROMPTS[:2])
        trajectory = policy.sample(conditions, generators=streams(0, 1))
        policy.evaluate(trajectory, [1])
        policy.decode(trajectory)
        DiffusionPolicy(policy.pipe, num_inference_steps=2, call=SIZE)
        assert all(module.training for module in network.modules())
    finally:
        network.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(network)
    assert "step" not in vars(policy.pipe.scheduler)


# ---- steps -----------------------------------------------------------------------------------


def test_wanted_steps_only(policy: DiffusionPolicy, trajectory: Trajectory) -> None:
    whole, some = policy.evaluate(trajectory), policy.evaluate(trajectory, [3, 1])
    assert some.step.tolist() == some.unit.tolist() == [1, 3]
    torch.testing.assert_close(some.logp, whole.logp[:, [1, 3]])
    with pytest.raises(UserError, match="steps"):
        policy.evaluate(trajectory, [STEPS])


def test_a_step_without_noise_is_flagged_and_counts_nowhere() -> None:
    pipe, settings = build("sd")
    pipe.scheduler = ddim(set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=0)
    policy = DiffusionPolicy(pipe, num_inference_steps=STEPS, **settings)
    assert policy.stochastic == (True, True, True, False)
    trajectory = drawn(policy, 0, 1)
    found = policy.evaluate(trajectory)
    assert found.mask.tolist() == [[True, True, True, False]] * 2
    assert bool(torch.isfinite(found.logp).all())
    assert not bool(found.logp[:, 3].any())
    assert not torch.equal(trajectory.actions[3], trajectory.actions[2])


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_window_of_stochastic_steps(name: str) -> None:
    policy = policy_of(name, stochastic_steps=range(1, 3))
    assert policy.stochastic == (False, True, True, False)
    one, other = drawn(policy, 0), drawn(policy, 9, start=drawn(policy, 0).start)
    assert torch.equal(one.actions[0], other.actions[0])
    assert not torch.equal(one.actions[1], other.actions[1])
    found = policy.evaluate(one)
    torch.testing.assert_close(found.logp, torch.stack(one.logps, 1), rtol=0, atol=1e-6)
    assert found.mask.tolist() == [[False, True, True, False]]


def test_gradient_reaches_the_network_and_stops_at_the_trajectory(
    policy: DiffusionPolicy, trajectory: Trajectory
) -> None:
    policy.network.zero_grad()
    policy.evaluate(trajectory, [2]).logp.sum().backward()
    gradients = [p.grad for p in policy.network.parameters() if p.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0
    policy.network.zero_grad()
    assert not any(action.requires_grad for action in trajectory.actions)


def test_a_training_loop_s_wrapper_is_called_in_place_of_the_network(
    policy: DiffusionPolicy, trajectory: Trajectory
) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.calls = policy.network, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper()
    found = policy.evaluate(trajectory, [0, 2], network=wrapper)
    assert wrapper.calls == 2
    assert torch.equal(found.logp, policy.evaluate(trajectory, [0, 2]).logp)


# ---- branches --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("at_step", [1, 3])
def test_siblings_share_their_prefix_bit_for_bit(name: str, at_step: int) -> None:
    policy = policy_of(name)
    parents = drawn(policy, 0, 1)
    before = copy.deepcopy(parents.actions)
    found = policy.branch(parents, at_step, 3, generators=streams(*range(10, 16)))
    assert found.branch_id.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.parent_step == at_step
    for step in range(STEPS):
        for values, own in ((found.actions, parents.actions), (found.logps, parents.logps)):
            same = [torch.equal(values[step][row], own[step][row // 3]) for row in range(6)]
            assert same == [step < at_step] * 6
    assert not torch.equal(found.actions[at_step][0], found.actions[at_step][1])
    assert all(map(torch.equal, parents.actions, before))
    logps = torch.stack(found.logps, 1)
    torch.testing.assert_close(policy.evaluate(found).logp, logps, rtol=0, atol=1e-5)


def test_branch_at_the_end_is_a_copy(policy: DiffusionPolicy, trajectory: Trajectory) -> None:
    found = policy.branch(trajectory, STEPS, 2, generators=streams(*range(6)))
    assert all(map(torch.equal, found.actions, trajectory.repeat_interleave(2).actions))


def test_branches_at_the_start_share_its_noise(
    policy: DiffusionPolicy, trajectory: Trajectory
) -> None:
    """B2-DiffuRL's last stage: siblings differ by what the steps drew alone."""
    found = policy.branch(trajectory, 0, 2, generators=streams(*range(20, 26)))
    start = _start(trajectory).repeat_interleave(2, 0)
    assert torch.equal(_start(found), start)
    assert not torch.equal(found.actions[0][0], found.actions[0][1])
    conditions = map_rows(trajectory.conditions, lambda rows: rows.repeat_interleave(2, 0))
    same = policy.sample(conditions, generators=streams(*range(20, 26)), start=start)
    assert all(map(torch.equal, found.actions, same.actions))
    assert found.branch_id.tolist() == [0, 0, 1, 1, 2, 2]


def _start(trajectory: Trajectory) -> Tensor:
    assert trajectory.start is not None
    return trajectory.start


# ---- references ------------------------------------------------------------------------------


def test_reference_by_disabled_adapter_is_the_base_model() -> None:
    pipe, settings = build("sd")
    settings |= {"num_inference_steps": STEPS, "reference": AdapterOff()}
    base = DiffusionPolicy(pipe, **settings)
    trajectory = drawn(base, 0, 1)
    wanted = base.evaluate(trajectory).logp.detach()
    add_lora(pipe)
    policy = DiffusionPolicy(pipe, **settings)
    found = policy.evaluate(trajectory, need=("logp", "ref_logp", "kl"))
    assert found.ref_logp is not None
    assert torch.equal(found.ref_logp, wanted)
    assert (found.logp - found.ref_logp).abs().max() > 1e-3
    assert found.kl is not None
    assert bool((found.kl > 0).all())
    found.kl.sum().backward()
    assert any(p.grad is not None for n, p in pipe.unet.named_parameters() if "lora" in n)


def test_reference_by_frozen_copy_takes_no_gradient() -> None:
    pipe, settings = build("sd-unguided")
    frozen = FrozenCopy(pipe.unet)
    policy = DiffusionPolicy(pipe, num_inference_steps=2, reference=frozen, **settings)
    trajectory = drawn(policy, 0, 1)
    same = policy.evaluate(trajectory, need=("logp", "kl"))
    assert same.kl is not None
    assert float(same.kl.detach().abs().max()) == 0
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(0.01)
    moved = policy.evaluate(trajectory, need=("logp", "ref_logp"))
    torch.testing.assert_close(moved.ref_logp, same.logp.detach())
    moved.logp.sum().backward()
    assert all(p.grad is None for p in frozen.module.parameters())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # that is the point
def test_reference_by_named_adapter_and_back_after_an_error() -> None:
    pipe, settings = build("sd")
    add_lora(pipe, "default", seed=1)
    add_lora(pipe, "old", seed=2)
    pipe.unet.set_adapter("old")
    policy = DiffusionPolicy(pipe, num_inference_steps=2, reference=NamedAdapter("old"), **settings)
    trajectory = drawn(policy, 0)
    old = policy.evaluate(trajectory).logp.detach()
    pipe.unet.set_adapter("default")
    now = policy.evaluate(trajectory, need=("logp", "ref_logp"))
    assert torch.equal(now.ref_logp if now.ref_logp is not None else old * 0, old)
    assert not torch.equal(now.logp.detach(), old)
    with pytest.raises(RuntimeError, match="inside"), policy.reference():
        raise RuntimeError("inside")
    assert torch.equal(policy.evaluate(trajectory).logp, now.logp)


def test_no_reference_is_said(policy: DiffusionPolicy, trajectory: Trajectory) -> None:
    with pytest.raises(UserError, match="no reference"):
        policy.evaluate(trajectory, need=("kl",))


# ---- pair scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3", "flux"])
def test_pair_score_is_the_error_of_the_network(name: str) -> None:
    policy = policy_of(name)
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=streams(0)[0])
    given = policy.trajectory_of(images, policy.encode(conditions_of(policy, 2)))
    score, mask = policy.pair_score(given, generators=streams(7, 7))
    assert score.shape == mask.shape == (2, 1)
    assert bool((score < 0).all())
    assert score.requires_grad
    again, _ = policy.pair_score(given, generators=streams(7, 8))
    assert torch.equal(score[0], again[0])
    assert not torch.equal(score[1], again[1])


def test_pair_score_of_a_known_error() -> None:
    # SD with epsilon: for a network that says 0.5, the score is -0.5 mean((0.5 - noise)^2).
    policy = policy_of("sd")
    torch.nn.init.zeros_(policy.pipe.unet.conv_out.weight)
    torch.nn.init.constant_(policy.pipe.unet.conv_out.bias, 0.5)
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=streams(0)[0])
    given = policy.trajectory_of(images, policy.encode(PROMPTS[:2]))
    generator = streams(7)[0]
    torch.rand(1, generator=generator)
    noise = torch.randn(given.actions[0][0].shape, generator=generator)
    same = streams(7)[0]
    score, _ = policy.pair_score(given, generators=[same, same])
    wanted = -0.5 * (0.5 - noise).square().mean()
    torch.testing.assert_close(score, wanted.expand(2, 1))


def test_pair_score_of_the_reference_has_no_gradient() -> None:
    pipe, settings = build("sd3")
    reference = FrozenCopy(pipe.transformer)
    policy = DiffusionPolicy(pipe, num_inference_steps=2, reference=reference, **settings)
    trajectory = drawn(policy, 0, 1)
    ours, _ = policy.pair_score(trajectory, generators=streams(1, 2))
    theirs, _ = policy.pair_score(trajectory, generators=streams(1, 2), reference=True)
    assert torch.equal(ours.detach(), theirs)
    assert not theirs.requires_grad


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_the_network_s_time_follows_the_scheduler_s(name: str) -> None:
    policy = policy_of(name)
    given = policy.transitions.timesteps
    times = policy.plan.network_times(torch.tensor(given), given)
    wanted = torch.tensor(policy.plan.times, dtype=times.dtype)
    torch.testing.assert_close(times, wanted, rtol=1e-5, atol=1e-6)


# ---- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "sd3", "flux"])
def test_pictures_become_the_latents_that_the_decoder_expects(name: str) -> None:
    policy = policy_of(name)
    images = torch.rand(2, 3, PIXELS, PIXELS, generator=streams(0)[0])
    given = policy.trajectory_of(images, policy.encode(conditions_of(policy, 2)))
    vae = policy.pipe.vae
    with torch.no_grad():
        wanted = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    wanted = (wanted / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(policy.decode(given), wanted, rtol=0, atol=1e-4)
    assert all(bool(logp.isnan().all()) for logp in given.logps)
    with pytest.raises(UserError, match="pair_score"):
        policy.evaluate(given)


def test_pictures_of_another_size_are_refused(policy: DiffusionPolicy) -> None:
    images = torch.rand(1, 3, 32, 32, generator=streams(0)[0])
    with pytest.raises(UserError, match="resize"):
        policy.trajectory_of(images, policy.encode(PROMPTS[:1]))


# ---- precision -------------------------------------------------------------------------------


def test_low_precision_keeps_latents_and_ratios() -> None:
    pipe, settings = build("sd")
    policy = DiffusionPolicy(pipe.to(torch.bfloat16), num_inference_steps=STEPS, **settings)
    trajectory = drawn(policy, 0, 1, 2)
    assert {action.dtype for action in trajectory.actions} == {torch.float32}
    logps = torch.stack(trajectory.logps, 1)
    torch.testing.assert_close(policy.evaluate(trajectory).logp, logps, rtol=0, atol=1e-4)
    assert policy.decode(trajectory).dtype == torch.float32


def test_a_float32_network_in_a_low_precision_pipeline() -> None:
    pipe, settings = build("sd")
    pipe.text_encoder.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    policy = DiffusionPolicy(pipe, num_inference_steps=2, autocast=torch.bfloat16, **settings)
    trajectory = drawn(policy, 0)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy.evaluate(trajectory).logp
    torch.testing.assert_close(found, torch.stack(trajectory.logps, 1), rtol=0, atol=1e-4)
    assert bool(policy.decode(trajectory).isfinite().all())


# ---- what is refused -------------------------------------------------------------------------


def test_a_scheduler_without_log_prob_is_one_plain_line() -> None:
    pipe = stable_diffusion()
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UserError, match=r"PNDMScheduler.*DDIMScheduler\.from_config") as caught:
        DiffusionPolicy(pipe)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_guidance_that_is_no_weighted_sum_is_refused() -> None:
    pipe, settings = build("sd")
    settings["call"] = settings["call"] | {"guidance_rescale": 0.7}
    with pytest.raises(UserError, match=r"StableDiffusionPipeline.*guidance_rescale"):
        DiffusionPolicy(pipe, **settings)


def test_latents_changed_between_steps_are_refused() -> None:
    pipe, settings = build("sd")

    def callback(_pipe: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Any]:
        return {"latents": values["latents"] + 1}

    settings["call"] = settings["call"] | {"callback_on_step_end": callback}
    with pytest.raises(UserError, match="changes the latents"):
        DiffusionPolicy(pipe, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, "eta"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"logp_reduction": "max"}, "logp_reduction"),
        ({"call": {"heigth": 16}}, "heigth"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    pipe, settings = build("sd")
    with pytest.raises(UserError, match=message):
        DiffusionPolicy(pipe, **(settings | changes))


def test_other_settings_than_those_of_the_draw_are_refused(trajectory: Trajectory) -> None:
    other = policy_of("sd", guidance_scale=2.0)
    with pytest.raises(UserError, match="guidance_weights"):
        other.evaluate(trajectory)
    with pytest.raises(UserError, match="2 generators for 3 samples"):
        other.sample(trajectory.conditions, generators=streams(0, 1))


# ---- files -----------------------------------------------------------------------------------


def test_a_saved_lora_loads_in_diffusers_alone(tmp_path: Path) -> None:
    pipe, settings = build("sd")
    add_lora(pipe)
    policy = DiffusionPolicy(pipe, num_inference_steps=2, **settings)
    wanted = policy.decode(drawn(policy, 0))
    save_diffusion(pipe, tmp_path, lora=True)
    fresh, _ = build("sd")
    fresh.load_lora_weights(tmp_path)
    loaded = DiffusionPolicy(fresh, num_inference_steps=2, **settings)
    torch.testing.assert_close(loaded.decode(drawn(loaded, 0)), wanted, rtol=0, atol=1e-5)
    assert fresh.unet.peft_config["default_0"].lora_alpha == 4


def test_a_saved_pipeline_loads_in_diffusers_alone(tmp_path: Path) -> None:
    pipe, settings = build("sd")
    save_diffusion(pipe, tmp_path, lora=False)
    loaded = type(pipe).from_pretrained(tmp_path)
    one, other = (DiffusionPolicy(p, num_inference_steps=2, **settings) for p in (pipe, loaded))
    assert torch.equal(one.decode(drawn(one, 0)), other.decode(drawn(other, 0)))


def test_a_pipeline_without_lora_format_is_said(tmp_path: Path) -> None:
    pipe, _ = build("dit")
    with pytest.raises(UserError, match="DiTPipeline"):
        save_diffusion(pipe, tmp_path, lora=True)


def test_it_is_a_policy(policy: DiffusionPolicy) -> None:
    assert isinstance(policy, Policy)
    assert policy.kind == "gaussian"
    assert policy.num_steps == STEPS
    assert policy.units == (1,) * STEPS
    assert policy.guidance == (5.0,) * STEPS
    assert policy_of("flux-guided").guidance == (2.0,) * STEPS


def test_class_names_are_labels() -> None:
    policy = policy_of("dit")
    named, numbered = policy.encode(["shark", "tench"]), policy.encode([2, 0])
    for a, b in zip(named, numbered, strict=True):
        assert torch.equal(a["class_labels"], b["class_labels"])


def test_two_steps_of_an_sd3_are_enough() -> None:
    pipe = sd3()
    policy = DiffusionPolicy(pipe, num_inference_steps=2, guidance_scale=1.0, call=SIZE)
    assert policy.guidance == (1.0, 1.0)
    with pytest.raises(UserError, match="two or more"):
        DiffusionPolicy(pipe, num_inference_steps=1, guidance_scale=1.0, call=SIZE)


@pytest.mark.parametrize("name", ["sd", "sd3", "dit"])
def test_what_is_redrawn_is_a_picture_of_the_policy_with_a_gradient(name: str) -> None:
    """Without noise in the last steps it is the rollout's own picture, by another decoder call."""
    policy = policy_of(name, num_inference_steps=4, stochastic_steps=range(2))
    encoded = policy.encode(conditions_of(policy, 2))
    trajectory = policy.sample(encoded, generators=streams(1, 2))
    pictures = policy.redraw(trajectory, 2, generators=streams(3, 4))
    torch.testing.assert_close(pictures.detach(), policy.decode(trajectory), atol=1e-4, rtol=1e-3)
    pictures.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.network.parameters())
    other = policy.redraw(trajectory, 4, generators=streams(3, 4))  # with noise
    assert not torch.equal(other, pictures)
    again = policy.redraw(trajectory, 4, generators=streams(3, 4))
    assert torch.equal(other, again)


# ---- adaptive guidance ---------------------------------------------------------------------------


def raw(policy: DiffusionPolicy, latents: Tensor, step: int, conditions: Any) -> list[Tensor]:
    """Both predictions of a step."""
    times = torch.full((len(latents),), policy.plan.times[step], dtype=policy.plan.time_dtype)
    dtype, blocks = policy.calls.network.dtype, range(len(policy.plan.weights[0]))
    with torch.no_grad():
        return policy.plan.outputs(policy.network, dtype, latents, times, conditions, list(blocks))


@pytest.mark.parametrize("name", ["sd", "sd3", "dit", "flux-guided"])
def test_guidance_ends_sample_by_sample(name: str) -> None:
    """The one whose predictions are alike goes on by the conditional one, the others as ever."""
    policy = policy_of(name)
    plain = drawn(policy, 0, 1, 2)
    assert plain.start is not None
    conditions = plain.conditions
    one, other = (side.flatten(1) for side in raw(policy, plain.start, 0, conditions))
    gaps = 1 - torch.cosine_similarity(one, other)
    least, following = gaps.sort().values[:2].tolist()
    alike = int(gaps.argmin())
    policy.guidance_threshold = (least + following) / 2
    found = drawn(policy, 0, 1, 2)
    torch.testing.assert_close(found.actions[0], plain.actions[0])
    before = plain.actions[0]
    sides = raw(policy, before, 1, conditions)
    weights, flag = policy.plan.weights[1], policy.stochastic[1]
    guided, alone = (
        policy.transitions.mean(1, before, output, flag)
        for output in (
            sum(w * side for w, side in zip(weights, sides, strict=True)),
            sum(weights) * sides[policy.plan.conditional],
        )
    )
    moved = found.actions[1] - plain.actions[1]  # the noise is the same
    wanted = torch.zeros_like(moved)
    wanted[alike] = (alone - guided)[alike]
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)
    assert float(wanted.abs().max()) > 1e-3
    parts = [
        policy.sample([{k: v[i : i + 1] for k, v in b.items()} for b in conditions],
                      generators=streams(i)) for i in range(3)
    ]  # fmt: skip
    together = torch.cat([part.actions[-1] for part in parts])
    torch.testing.assert_close(together, found.actions[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="depend on what was drawn"):
        policy.evaluate(found)


def test_guidance_that_never_ends_and_none_are_as_ever() -> None:
    for name in ("sd", "flux"):  # with guidance, and without
        policy = policy_of(name)
        plain = drawn(policy, 0, 1, 2)
        policy.guidance_threshold = 0.0
        assert torch.equal(drawn(policy, 0, 1, 2).actions[-1], plain.actions[-1])
    with pytest.raises(UserError, match=r"lie in \[0, 1\]"):
        policy_of("sd", guidance_threshold=2.0)
