"""The further methods: reference values, and what must hold whatever the values."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nextscale.align.advantages import beta_norm, group_advantages
from nextscale.align.experience import Rollout
from nextscale.align.methods.covariance import covariances, highest, random_between
from nextscale.align.methods.d2o import D2O, D2OConfig
from nextscale.align.methods.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from nextscale.align.methods.fdpg import FDPG, FDPGConfig, fdpg_rewards
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig
from nextscale.align.methods.nft import NFT, NFTConfig
from nextscale.align.methods.reg_grpo import RegGRPO, RegGRPOConfig
from nextscale.align.methods.seppo import SePPO, SePPOConfig
from nextscale.align.methods.sibling import Sibling, SiblingConfig
from nextscale.align.objectives import (
    diffusion_nft_loss,
    dpo_loss,
    grpo_loss,
    nft_loss,
    reg_grpo_loss,
    seppo_loss,
)
from nextscale.align.prompts import DatasetPicture, Prompt
from nextscale.align.trajectory import StepEval, Trajectory
from nextscale.errors import UserError

MISC = json.loads((Path(__file__).parents[1] / "golden" / "align" / "misc.json").read_text())


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).detach(), double(wanted), rtol=rtol, atol=atol
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- reference values ----------------------------------------------------------------------------


def test_beta_normalisation() -> None:
    row = MISC["bnpo_beta"]
    rewards = double(row["rewards"])
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    close(beta_norm(rewards.flatten(), groups).view_as(rewards), row["advantages"])
    found = group_advantages(rewards.flatten(), groups, scale_rewards="beta_norm")
    close(found.view_as(rewards), row["advantages"])
    with pytest.raises(UserError, match=r"beta_norm's rewards is 0 to 2"):
        beta_norm(double([0.0, 2.0]), torch.tensor([0, 0]))


def test_beta_normalisation_at_its_edges() -> None:
    """In float32 as in float64; without the groups that nothing could score; without a spread."""
    rewards = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(6).repeat_interleave(4)
    wanted = beta_norm(rewards.double().flatten(), groups)
    close(beta_norm(rewards.flatten(), groups), wanted.tolist(), rtol=1e-5, atol=1e-6)
    lost = torch.cat([rewards.flatten(), torch.full((4,), math.nan)])
    found = beta_norm(lost, torch.cat([groups, torch.full((4,), 6)]))
    close(found[:24], wanted.tolist(), rtol=1e-5, atol=1e-6)
    assert not found[24:].any()
    alike = torch.tensor([0.0, 1.0] * 4)
    for same in (torch.zeros(8, dtype=torch.long), torch.arange(4).repeat_interleave(2)):
        close(beta_norm(alike, same), (alike - 0.5).tolist())


def test_covariances() -> None:
    row = MISC["covariance_control"]
    found = covariances(double(row["advantages"]), double(row["logps"]))
    close(found, row["cov"])
    every = torch.ones_like(found, dtype=torch.bool)
    chosen = highest(found, row["kl_cov_top_percent"] / 100, every)
    assert chosen.flatten().nonzero()[:, 0].tolist() == row["kl_cov_indices"]
    low, high = 0.0, 1.0
    some = random_between(found, low, high, 0.2, every, torch.Generator().manual_seed(0))
    assert int(some.sum()) == 2
    assert bool(((found[some] > low) & (found[some] < high)).all())
    few = random_between(found, 1.0, 5.0, 0.5, every, torch.Generator().manual_seed(0))
    assert few.flatten().nonzero()[:, 0].tolist() == [2]
    counted = torch.ones_like(found, dtype=torch.bool)
    counted[0] = False
    values = torch.arange(20.0, dtype=torch.float64)[None]
    trained = (values < 10) & (values > 0)
    assert highest(values, 0.4, trained).nonzero()[:, 1].tolist() == [7, 8, 9]
    drawn = random_between(values, 2.0, 30.0, 0.4, trained, torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == 3
    assert bool((trained & (values > 2))[drawn].all())
    part = covariances(double(row["advantages"]), double(row["logps"]), counted)
    assert not part[0].any()
    rest = covariances(double(row["advantages"])[1:], double(row["logps"])[1:])
    close(part[1:], rest.tolist())


def test_nft() -> None:
    row = MISC["nft_llm"]
    logps, right = double(row["ratio"]).log()[:, None], double(row["label"])
    share = torch.full_like(right, row["r_q"])
    close(nft_loss(logps, torch.zeros_like(logps), right, share), row["loss"])


def test_nft_is_grpo_on_policy() -> None:
    """Its gradient is that of advantages 1 and -q / (1 - q)."""
    logps = noise(6, 4)
    right, share = double([1, 0, 0, 1, 1, 1]), double([1 / 3, 1 / 3, 1 / 3, 0.75, 0.75, 0.75])
    advantages = torch.where(right > 0, 1.0, -share / (1 - share))
    grads = []
    for loss in (
        lambda x: nft_loss(x, logps, right, share),
        lambda x: grpo_loss(x, logps, advantages),
    ):
        x = logps.clone().requires_grad_()
        loss(x).backward()
        grads.append(x.grad)
    close(grads[0], grads[1].tolist())


def test_diffusion_nft() -> None:
    row = MISC["diffusion_nft"]
    v, old, clean, noised = (double(row[name]) for name in ("v", "v_old", "x0", "xt"))
    t, share = double(row["t"])[:, None], double(row["r"])
    predicted = noised - t * v
    errors, old_errors = predicted - clean, noised - t * old - clean
    found = diffusion_nft_loss(errors, old_errors, share, beta=row["beta"])
    close(found, row["loss_per_sample"])
    even = errors.clone().requires_grad_()
    half = torch.full_like(share, 0.5)
    diffusion_nft_loss(even, errors, half, beta=row["beta"]).sum().backward()
    assert even.grad is not None
    close(even.grad, torch.zeros_like(even).tolist())  # 1/2 teaches nothing on policy


def test_reg_grpo() -> None:
    row = MISC["reg_grpo"]
    ratios, advantages = double(row["log_ratio"])[None], double(row["advantage"])[None]
    close(reg_grpo_loss(ratios, advantages), row["loss"])
    at_once = torch.zeros_like(ratios).requires_grad_()
    reg_grpo_loss(at_once, advantages, beta=0.5).backward()
    assert at_once.grad is not None
    centred = advantages - advantages.mean()
    close(at_once.grad, (-2 / 0.5 * centred / 4).tolist())


def test_seppo() -> None:
    """Logistic in the difference of log-ratios, by hand; a liked sample counts as a given one."""
    given, drawn = double([0.0, 0.5, 0.5]), double([0.0, -1.0, 2.0])
    loss, sign = seppo_loss(given, drawn, beta=0.5)
    assert sign.tolist() == [1, 1, -1]
    close(loss, [math.log1p(math.exp(-x / 2)) for x in (0.0, 1.5, 2.5)])
    loss, sign = seppo_loss(given, drawn, beta=0.5, flip=False)
    assert sign.tolist() == [1, 1, 1]
    close(loss[2], math.log1p(math.exp(0.75)))


def test_seppo_is_dpo_on_its_first_step() -> None:
    given, drawn = noise(5, seed=1), noise(5, seed=2)
    grads = []
    for by_seppo in (True, False):
        x, y = given.clone().requires_grad_(), drawn.clone().requires_grad_()
        if by_seppo:
            seppo_loss(x - given, y - drawn, beta=0.3)[0].mean().backward()
        else:
            sides = (part[:, None] for part in (x, y, given, drawn))
            dpo_loss(*sides, beta=0.3).backward()
        grads.append(torch.stack([x.grad, y.grad]))  # pyright: ignore
    close(grads[0], grads[1].tolist())


# ---- losses in the place of the clip -------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["gbpo", "gbpo_square", "mdpo"])
def test_the_first_step_follows_the_advantages(loss_type: str) -> None:
    old, advantages = noise(4, 3), double([1.0, -2.0, 0.5, 0.0])
    x = old.clone().requires_grad_()
    grpo_loss(x, old, advantages, loss_type=loss_type, epsilon=0.2).backward()
    assert x.grad is not None
    assert torch.equal(x.grad.sign(), -advantages.sign()[:, None].expand(4, 3))
    if loss_type == "mdpo":
        close(x.grad, (-advantages[:, None] / 12).expand(4, 3).tolist())


def test_the_best_policy_within_bounds_costs_nothing() -> None:
    old, advantages = noise(3, 2), double([1.0, -1.0, 0.0])
    best = old + (1 + 0.2 * advantages.sign())[:, None].log()
    for loss_type in ("gbpo", "gbpo_square"):
        close(grpo_loss(best, old, advantages, loss_type=loss_type, epsilon=0.2), 0.0)
        assert float(grpo_loss(old, old, advantages, loss_type=loss_type, epsilon=0.2)) > 0
    high = old + (1 + 0.3 * advantages.clamp(min=0) + 0.2 * advantages.clamp(max=0))[:, None].log()
    close(grpo_loss(high, old, advantages, loss_type="gbpo", epsilon=0.2, epsilon_high=0.3), 0.0)


def test_mirror_descent_has_the_closed_form_of_its_step() -> None:
    """Of a categorical, pi is proportional to pi_old exp(t A)."""
    old, advantages = noise(5).log_softmax(0), noise(5, seed=1)
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        new = logits.log_softmax(0)
        units = [
            grpo_loss(new[i, None, None], old[i, None, None], advantages[i : i + 1],
                      loss_type="mdpo", mirror_step=0.7)
            for i in range(5)
        ]  # fmt: skip
        loss = sum((p * u for p, u in zip(old.exp(), units, strict=True)), logits.new_zeros(()))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    wanted = (old + 0.7 * advantages).softmax(0)
    close(logits.softmax(0), wanted.tolist(), rtol=1e-4)


# ---- baselines -----------------------------------------------------------------------------------


def test_baselines_of_a_group() -> None:
    rewards, groups = double([0.0, 1.0, 5.0, 2.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    median = group_advantages(rewards, groups, scale_rewards="none", baseline="median")
    close(median, [-1.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    even = group_advantages(rewards, torch.zeros(6, dtype=torch.long), scale_rewards="none",
                            baseline="median")  # fmt: skip
    close(even, [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0])
    half = double([0, 0, 1, 1])
    close(group_advantages(half, torch.zeros(4, dtype=torch.long), scale_rewards="none",
                           baseline="median"), [-0.5, -0.5, 0.5, 0.5])  # fmt: skip
    norms = double([1.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    options: dict[str, Any] = {"scale_rewards": "none", "baseline": "score_norm"}
    weighted = group_advantages(rewards, groups, score_norms=norms, **options)
    close(weighted, [-2.75, -1.75, 2.25, 0.0, 0.0, 0.0])
    known = double([0.0, 1.0, math.nan])
    alike = double([1.0] * 3)
    unscorable = group_advantages(known, torch.tensor([0, 0, 0]), score_norms=alike, **options)
    close(unscorable, [-0.5, 0.5, 0.0])
    with pytest.raises(UserError, match="needs score_norms"):
        group_advantages(rewards, groups, baseline="score_norm")


def test_equal_rewards_teach_nothing_by_any_baseline() -> None:
    """Nor by what rounding leaves of weighted means."""
    groups, rewards = torch.zeros(64, dtype=torch.long), torch.full((64,), 1 / 3)
    norms = torch.rand(64, generator=torch.Generator().manual_seed(3))
    for baseline in ("mean", "median", "score_norm"):
        found = group_advantages(rewards, groups, baseline=baseline, score_norms=norms)
        assert not found.any(), baseline


def test_the_baseline_by_score_norms_has_the_least_variance() -> None:
    """Of the gradient estimate g (r - b), over constants b; g and r depend on each other."""
    score = noise(20000)
    rewards = score.square() + 0.1 * noise(20000, seed=1)
    norms, zeros = score.square(), torch.zeros(20000, dtype=torch.long)
    spread = {
        name: float(
            (score * group_advantages(rewards, zeros, scale_rewards="none", baseline=name,
                                      score_norms=norms)).var()
        )
        for name in ("mean", "score_norm")
    }  # fmt: skip
    assert spread["score_norm"] < 0.9 * spread["mean"]


# ---- f-DPG ---------------------------------------------------------------------------------------


def test_fdpg_rests_where_the_policy_is_the_target() -> None:
    rewards = noise(2000)
    beta = 0.5
    # samples of pi = p: their log-ratio to the reference is r / beta - log Z
    log_z = 0.3
    at_target = rewards / beta - log_z
    for divergence in ("reverse_kl", "forward_kl", "js_divergence"):
        found = fdpg_rewards(at_target, rewards, beta, divergence)
        assert float(found.std()) < 1e-6, divergence
        away = fdpg_rewards(torch.zeros_like(rewards), rewards, beta, divergence)
        order = rewards.argsort()
        assert bool((away[order].diff() >= 0).all()), divergence


def test_fdpg_takes_no_settings_that_it_would_not_read() -> None:
    for changes in ({"scale_rewards": "none"}, {"std_eps": 1.0}, {"std_ddof": 0}):
        with pytest.raises(UserError, match="divides by no deviation"):
            FDPGConfig(loss=GRPOConfig(**changes))


def test_fdpg_by_reverse_kl_is_reward_with_a_kl_penalty() -> None:
    rewards, log_ratio = noise(8), 0.1 * noise(8, seed=1)
    found = fdpg_rewards(log_ratio, rewards, 0.5, "reverse_kl")
    wanted = rewards / 0.5 - log_ratio
    close(found - found.mean(), (wanted - wanted.mean()).tolist())


# ---- on a policy ---------------------------------------------------------------------------------


class Toy:
    """As much of a policy as advantages look at: four steps of 1, 2, 3, 4 units."""

    kind, averaged, num_steps = "categorical", False, 4
    units, trained = (1, 2, 3, 4), range(4)


def policy() -> Any:
    return Toy()


class Judged(Toy):
    """What its weights say of three samples is given."""

    def __init__(self, logp: Tensor, ref_logp: Tensor | None = None) -> None:
        self.logp, self.ref_logp = logp, ref_logp

    def evaluate(self, trajectory: Any, *_: Any, **__: Any) -> StepEval:
        rows = trajectory.actions[0][:, 0]
        step = torch.arange(4).repeat_interleave(torch.tensor(self.units))
        return StepEval(
            self.logp[rows], torch.arange(10), step, torch.ones(len(rows), 10, dtype=torch.bool),
            None if self.ref_logp is None else self.ref_logp[rows],
            entropy=torch.zeros(len(rows), 10, dtype=torch.float64),
        )  # fmt: skip


def rollout(old: Tensor, total: Tensor, groups: list[int]) -> Rollout:
    rows, sizes = torch.arange(len(old))[:, None], (1, 2, 3, 4)
    trajectory = Trajectory(
        "categorical", rows, [rows, *(rows.expand(-1, n) for n in sizes[1:])],
        list(old.split(sizes, dim=1)), (True,) * 4, (0.0,) * 4, {},
    )  # fmt: skip
    prompts = [Prompt("a", {})] * len(old)
    numbers = torch.tensor(groups)
    return Rollout(
        trajectory, prompts, numbers, total[:, None], (1.0,), total, "sum", (), {}, {}, (0, 0)
    )


def test_kl_cov_clips_nowhere_and_holds_the_tokens_of_highest_covariance() -> None:
    old, now = -1 - noise(3, 10).abs(), -1 - noise(3, 10, seed=1).abs()
    total = double([0.0, 1.0, 3.0])
    settings = GRPOConfig(covariance="kl", covariance_share=0.2, covariance_coef=0.5)
    method = GRPO(settings, Judged(now))  # pyright: ignore[reportArgumentType]
    experience = method.learn(rollout(old, total, [0, 0, 0]))
    columns = {**experience.columns, "old_logps": old}
    experience = replace(experience, columns=columns)
    advantages = group_advantages(total, torch.zeros(3, dtype=torch.long))[:, None]
    held = highest(covariances(advantages.expand(3, 10), old), 0.2, torch.ones(3, 10).bool())
    assert int(held.sum()) == 6
    ratio = now - old
    wanted = (-ratio.exp() * advantages + 0.5 * ratio.abs() * held).mean()
    ((found, _),) = method.losses(experience, torch.arange(3), 1, nn.Identity())
    close(found, float(wanted))
    # by the weights that drew it, what rounding left of the log-ratio holds nothing
    ((fresh, _),) = method.losses(experience, torch.arange(3), 0, nn.Identity())
    close(fresh, float((-ratio.exp() * advantages).mean()))


def test_clip_cov_gives_its_tokens_no_gradient() -> None:
    old, total = -1 - noise(3, 10).abs(), double([0.0, 1.0, 3.0])
    settings = GRPOConfig(covariance="clip", covariance_share=0.2, covariance_bounds=(0.0, 9.0))
    method = GRPO(settings, Judged(old))  # pyright: ignore[reportArgumentType]
    found = method.learn(rollout(old, total, [0, 0, 0])).columns["advantages"]
    advantages = group_advantages(total, torch.zeros(3, dtype=torch.long))[:, None].expand(3, 10)
    clipped = found == 0
    assert int(clipped.sum()) == 6
    assert bool((covariances(advantages, old)[clipped] > 0).all())
    assert torch.equal(found[~clipped], advantages[~clipped])


def test_fdpg_weighs_whole_samples() -> None:
    """pi / p is a ratio of likelihoods: scale weights are the loss's alone."""
    now, reference = -1 - noise(4, 10).abs(), -1 - noise(4, 10, seed=1).abs()
    total, groups = double([0.0, 1.0, 3.0, 1.0]), [0, 0, 1, 1]
    settings = FDPGConfig(loss=GRPOConfig(scale_weight="scale"), reward_temperature=0.5)
    method = FDPG(settings, Judged(now, reference))  # pyright: ignore[reportArgumentType]
    found = method.learn(rollout(now, total, groups)).columns["advantages"]
    ratio = (now - reference).sum(1)
    for rows in ([0, 1], [2, 3]):
        own = fdpg_rewards(ratio[rows], total[rows], 0.5, "js_divergence")
        close(found[rows], (own - own.mean()).tolist())


def test_unscorable_samples_are_regressed_on_nothing() -> None:
    old = -1 - noise(4, 10).abs()
    method = RegGRPO(RegGRPOConfig(), Judged(old))  # pyright: ignore[reportArgumentType]
    found = method.learn(rollout(old, double([0.0, 1.0, 3.0, math.nan]), [0, 0, 1, 1]))
    assert found.weights.tolist() == [1.0, 0.0]
    alike = method.learn(rollout(old, double([1.0, 1.0, 3.0, 4.0]), [0, 0, 1, 1]))
    assert alike.weights.tolist() == [0.0, 1.0]


def test_siblings_are_judged_by_the_scales_that_they_differ_in() -> None:
    method = Sibling(
        SiblingConfig(steps=(1, 3), siblings=2, loss=GRPOConfig(scale_rewards="none")), policy()
    )
    assert method.branch() == [(1, 2), (3, 2)]
    assert method.items_per_group(3) == 12
    total = double([0, 2, 4, 6, 1, 1, 1, 1])  # one prompt, two trees of four leaves
    found = method.advantages(total, torch.zeros(8, dtype=torch.long))
    assert found.shape == (8, 10)
    close(found[:, 0], [1, 1, 1, 1, -1, -1, -1, -1])  # tree values 3 and 1 around 2
    close(found[:, 1], [-2, -2, 2, 2, 0, 0, 0, 0])  # node values 1 and 5 around 3
    close(found[:, 5], found[:, 1].tolist())
    close(found[:, 6], [-1, 1, -1, 1, 0, 0, 0, 0])  # leaves around their parent's mean
    soft = Sibling(SiblingConfig(steps=(1, 3), value_temperature=1e-3), policy())
    best = soft.advantages(total, torch.zeros(8, dtype=torch.long))
    assert best[0, 0] > 0 > best[4, 0]
    with pytest.raises(UserError, match=r"sibling.steps ends at 4"):
        Sibling(SiblingConfig(steps=(4,)), policy())
    for steps in ((0,), (2, 1), (1, 1)):
        with pytest.raises(UserError, match="rise from 1"):
            SiblingConfig(steps=steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"covariance": "kl", "loss_type": "cispo"}, "covariance kl takes the place of the clip"),
        ({"baseline": "median", "credit": "vmr"}, "one advantage per sample"),
        (
            {"scale_rewards": "beta_norm", "multi_objective_aggregation": "normalize_then_sum"},
            "one reward",
        ),
        ({"scale_rewards": "beta_norm", "baseline": "median"}, "has its own baseline"),
        ({"covariance_bounds": (2.0, 1.0)}, "lowest, highest"),
        ({"mirror_step": 0.0}, "mirror_step is 0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GRPOConfig(**changes)


def test_tokens_are_not_those_of_diffusion() -> None:
    class Gaussian(Toy):
        kind, averaged = "gaussian", True

    other: Any = Gaussian()
    for changes in ({"covariance": "clip"}, {"baseline": "score_norm"}):
        with pytest.raises(UserError, match="for next-scale models"):
            GRPO(GRPOConfig(**changes), other)
    with pytest.raises(UserError, match="diffusion_nft"):
        NFT(NFTConfig(), other)
    with pytest.raises(UserError, match="for next-scale models: nft"):
        DiffusionNFT(DiffusionNFTConfig(), policy())


def test_what_a_group_gives() -> None:
    for method, settings, count in (
        (RegGRPO, RegGRPOConfig(), 1),
        (D2O, D2OConfig(), 1),
        (NFT, NFTConfig(), 8),
        (FDPG, FDPGConfig(), 8),
    ):
        assert method(settings, policy()).items_per_group(8) == count


# ---- what a rollout becomes ----------------------------------------------------------------------


def test_nft_takes_groups_of_both_verdicts_and_what_could_be_scored() -> None:
    old = -1 - noise(8, 10).abs()
    method = NFT(NFTConfig(threshold=1.0), Judged(old))  # pyright: ignore[reportArgumentType]
    total = double([1.0, 0.5, 2.0, math.nan, 1.0, 1.0, 0.0, 0.0])
    found = method.learn(rollout(old, total, [0, 0, 0, 0, 1, 1, 2, 2]))
    assert found.weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert found.columns["right"][:3].tolist() == [1, 0, 1]
    close(found.columns["share"][:3], [2 / 3] * 3)
    assert found.metrics["samples/right"] == pytest.approx(4 / 7)


def test_nft_may_weigh_hard_prompts_and_leaves_masked_units_out() -> None:
    old, right, share = noise(2, 4), double([1.0, 0.0]), double([0.25, 0.25])
    now = old + 0.1 * noise(2, 4, seed=1)
    close(
        nft_loss(now, old, right, share, weighted=True), float(3 * nft_loss(now, old, right, share))
    )
    mask = torch.tensor([[1, 1, 0, 0]] * 2).bool()
    wanted = nft_loss(now[:, :2], old[:, :2], right, share)
    close(nft_loss(now, old, right, share, mask), float(wanted))


def test_d2o_learns_from_the_worst_of_a_group() -> None:
    old = -1 - noise(8, 10).abs()
    total = double([0.5, 0.1, 0.9, 0.1, math.nan, 0.4, 0.4, 0.4])
    drawn = rollout(old, total, [0, 0, 0, 0, 1, 1, 1, 1])
    found = D2O(D2OConfig(), Judged(old)).learn(drawn)  # pyright: ignore[reportArgumentType]
    assert found.items.tolist() == [[1, 3, 0, 2], [5, 6, 7, 4]]
    assert found.weights.tolist() == [1.0, 0.0]  # nothing is below the others, a NaN least of all
    for limit, used in ((0.3, [1.0, 0.0]), (0.5, [1.0, 1.0]), (0.05, [0.0, 0.0])):
        method = D2O(D2OConfig(threshold=limit), Judged(old))  # pyright: ignore
        assert method.learn(drawn).weights.tolist() == used, limit


def test_siblings_of_several_prompts_and_leaves_without_a_reward() -> None:
    plain = GRPOConfig(scale_rewards="none")
    method = Sibling(SiblingConfig(steps=(2,), siblings=2, loss=plain), policy())
    total = double([0, 2, 4, 8, 10, 10, 20, math.nan])  # two prompts of two prefixes
    found = method.advantages(total, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    close(found[:, 0], [-2.5, -2.5, 2.5, 2.5, -5, -5, 5, 5])  # prefixes 1, 6 and 10, 20
    close(found[:, 4], [-1, 1, -2, 2, 0, 0, 0, 0])


def test_seppo_compares_each_sample_with_the_picture_of_its_prompt() -> None:
    """Under one noise for both; by the policy that drew, no sample is liked better than before."""
    asked: list[tuple[str, list[int], list[int]]] = []

    class Pairs(Toy):
        network = nn.Linear(1, 1)

        def trajectory_of(self, images: Tensor, conditions: Any) -> Trajectory:
            assert images.shape == (2, 3, 4, 4)
            assert conditions[0].tolist() == [0, 2]  # the first of each group
            return replace(drawn.trajectory.index([0, 2]), settings={"given": True})

        def pair_score(self, side: Any, *, generators: Any, network: Any) -> tuple[Tensor, Tensor]:
            rows = side.actions[0][:, 0].tolist()
            states = [int(g.get_state().sum()) for g in generators]
            asked.append(("given" if side.settings else "drawn", rows, states))
            value = self.network.weight.double() * (2.0 if side.settings else 1.0)
            return value.expand(len(rows), 10) / 10, torch.ones(len(rows), 10)

    class Picture(DatasetPicture):
        def __init__(self) -> None: ...

        def load(self, resolution: int) -> np.ndarray:
            return np.zeros((resolution, resolution, 3), dtype=np.uint8)

    old = noise(4, 10)
    drawn = rollout(old, double([0.0] * 4), [0, 0, 1, 1])
    conditions = (torch.arange(4),)
    trajectory = replace(drawn.trajectory, images=torch.zeros(4, 3, 4, 4), conditions=conditions)
    drawn = replace(drawn, trajectory=trajectory, prompts=[Prompt("a", {"picture": Picture()})] * 4)
    judge: Any = Pairs()
    method = SePPO(SePPOConfig(beta=1.0, scale_weight="token"), judge)
    experience = method.learn(drawn)
    for name, rows, states in asked:
        # sides of a pair: the picture of its group, and itself, under the same noise
        assert rows == ([0, 0, 2, 2] if name == "given" else [0, 1, 2, 3])
        assert len(set(states)) == 4
    assert asked[0][2] == asked[1][2]
    ((loss, shown),) = method.losses(experience, torch.arange(4), 0, nn.Identity())
    close(loss, math.log(2))
    assert shown["samples/good"] == 0
    with torch.no_grad():
        judge.network.weight += 0.5
    ((loss, shown),) = method.losses(experience, torch.arange(4), 1, nn.Identity())
    assert shown["samples/good"] == 1  # likelier than before: it counts as a given one
    close(loss, math.log1p(math.exp(-1.5)), rtol=1e-6)
