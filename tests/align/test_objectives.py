"""Losses against trl's own values and gradients, and what must hold whatever the values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.advantages import (
    combined_advantages,
    group_advantages,
    informative,
    soft_mean,
)
from nextscale.align.objectives import dpo_loss, dpo_metrics, grpo_loss, grpo_metrics, kto_loss
from nextscale.align.objectives.grpo import LOSS_TYPES
from nextscale.align.objectives.kl import categorical_kl, gaussian_kl, k1, k2, k3
from nextscale.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "align"
GRPO = json.loads((GOLDEN / "grpo.json").read_text())
DPO = json.loads((GOLDEN / "dpo.json").read_text())
MISC = json.loads((GOLDEN / "misc.json").read_text())
NO_FORMULA = ("aot", "aot_unpaired", "discopop")  # optional rows, for which no equation is given


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64).detach(), double(wanted), rtol=rtol, atol=atol
    )


# ---- golden data -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRPO["cases"], ids=lambda c: f"{c['name']}-{c['mask']}")
def test_grpo_equals_trl(case: dict[str, Any]) -> None:
    data = {name: double(values) for name, values in GRPO["inputs"].items()}
    advantages, mask = double(GRPO["advantages"]["group"]), data[f"mask_{case['mask']}"]
    logps = data["logps"].clone().requires_grad_()
    loss = grpo_loss(
        logps, data["old_logps"], advantages, mask, ref_logps=data["ref_logps"], **case["params"]
    )
    loss.backward()
    close(loss, case["loss"])
    close(logps.grad, case["grad_logps"])
    names = ("epsilon", "epsilon_high", "importance_sampling_level", "use_bias_correction_kl")
    metrics = grpo_metrics(
        data["logps"],
        data["old_logps"],
        advantages,
        mask,
        ref_logps=data["ref_logps"],
        **{name: case["params"][name] for name in names},
    )
    for name, value in (case.get("metrics") or {}).items():
        close(metrics[name], value, rtol=1e-6)


def test_at_equal_policies_the_gradient_is_reinforce_with_the_groups_baseline() -> None:
    data = {name: double(values) for name, values in GRPO["inputs"].items()}
    advantages = double(GRPO["advantages"]["group"])
    logps = data["old_logps"].clone().requires_grad_()
    loss = grpo_loss(logps, data["old_logps"], advantages)
    loss.backward()
    close(loss, GRPO["ratio_one"]["loss"])
    close(logps.grad, GRPO["ratio_one"]["grad_logps"])
    close(logps.grad, (-advantages[:, None] / logps.numel()).expand_as(logps).tolist())


@pytest.mark.parametrize("mode", ["group", "batch", "none"])
def test_advantages_equal_trl(mode: str) -> None:
    groups = torch.arange(8) // GRPO["group_size"]
    rewards = double(GRPO["inputs"]["rewards"])
    close(group_advantages(rewards, groups, scale_rewards=mode), GRPO["advantages"][mode])


def test_normalised_rewards_are_summed_as_in_trl() -> None:
    rewards = torch.stack(
        [double(GRPO["inputs"]["rewards"]), double(GRPO["inputs"]["second_reward"])], dim=1
    )
    found = combined_advantages(
        rewards,
        GRPO["inputs"]["reward_weights"],
        torch.arange(8) // GRPO["group_size"],
        multi_objective_aggregation="normalize_then_sum",
    )
    close(found, GRPO["advantages_normalize_then_sum"])


@pytest.mark.parametrize(
    "case",
    [case for case in DPO["cases"] if case["loss_type"] not in NO_FORMULA],
    ids=lambda c: f"{c['loss_type']}-{c['f_divergence_type']}-{c['mask']}",
)
def test_dpo_equals_trl(case: dict[str, Any]) -> None:
    exact = case["dtype"] == "float64"
    data = {
        name: double(v).to(torch.float64 if exact else torch.float32)
        for name, v in DPO["inputs"].items()
    }
    sides = ("full", "full") if case["mask"] == "full" else ("chosen_ragged", "rejected_ragged")
    chosen = data["chosen_logps"].clone().requires_grad_()
    rejected = data["rejected_logps"].clone().requires_grad_()
    references = data["ref_chosen_logps"], data["ref_rejected_logps"]
    masks = [data[f"mask_{side}"] for side in sides]
    params = {k: v for k, v in case["params"].items() if k != "discopop_tau"}
    kind = {k: case[k] for k in ("loss_type", "f_divergence_type")}
    loss = dpo_loss(chosen, rejected, *references, *masks, **kind, **params)
    loss.backward()
    tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-6}
    close(loss, case["loss"], **tolerance)
    close(chosen.grad, case["grad_chosen"], **tolerance)
    other = torch.zeros_like(rejected) if rejected.grad is None else rejected.grad
    close(other, case["grad_rejected"], **tolerance)
    metrics = dpo_metrics(chosen, rejected, *references, *masks, beta=params["beta"])
    if case["f_divergence_type"] == "reverse_kl" and case["loss_type"] == "sigmoid":
        close(metrics["rewards/margins"], case["reward_margin"], rtol=1e-6)
        close(metrics["rewards/accuracies"], case["reward_accuracy"])


def test_rpo_and_the_surrogate_of_diffusion_equal_their_equations() -> None:
    rpo = {k: double(v)[:, None] for k, v in MISC["rpo"].items() if isinstance(v, list)}
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    alpha, beta = MISC["rpo"]["rpo_alpha"], MISC["rpo"]["beta"]
    close(dpo_loss(*(rpo[n] for n in names), beta=beta, rpo_alpha=alpha), MISC["rpo"]["loss"])
    row = MISC["diffusion_dpo"]
    errors = ("model_w_mse", "model_l_mse", "ref_w_mse", "ref_l_mse")
    scores = [-0.5 * double(row[name])[:, None] for name in errors]
    close(dpo_loss(*scores, beta=row["beta"]), row["loss"])
    close(dpo_loss(*scores, beta=5.0), row["beta5_loss"])


def test_kl_estimators_have_their_expectations() -> None:
    row = MISC["kl_estimators"]
    p, q = double(row["p"]), double(row["ref"])
    h = p.log() - q.log()
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        close((p * estimator(h)).sum(), row["expected"][name])
    close(categorical_kl(p.log(), q.log()), row["exact_reverse_kl"])
    assert row["expected"]["k2"] != pytest.approx(row["exact_reverse_kl"], rel=0.05)


# ---- what must hold ----------------------------------------------------------------------------


def example(units: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    draw = {
        name: torch.randn(6, units, generator=generator, dtype=torch.float64) * 0.3
        for name in ("logps", "old_logps", "ref_logps")
    }
    return {**draw, "advantages": torch.randn(6, generator=generator, dtype=torch.float64)}


def test_with_full_masks_the_three_averages_are_one() -> None:
    data = example()
    grpo, bnpo, dapo = (grpo_loss(**data, loss_type=t) for t in ("grpo", "bnpo", "dapo"))
    close(grpo, float(bnpo))
    close(grpo, float(dapo))
    constant = grpo_loss(**data, loss_type="dr_grpo", max_completion_length=20)
    close(constant, float(grpo) * 5 / 20)


def test_a_sequence_of_one_unit_is_a_token() -> None:
    data = example(units=1)
    close(
        grpo_loss(**data, importance_sampling_level="sequence"),
        float(grpo_loss(**data, importance_sampling_level="token")),
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_do_not_depend_on_the_split_of_the_batch(loss_type: str) -> None:
    data = example()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]] * 3, dtype=torch.float64)

    def gradient(splits: list[slice]) -> Tensor:
        logps = data["logps"].clone().requires_grad_()
        for rows in splits:
            part = {k: v[rows] for k, v in data.items() if k != "logps"}
            own = len(mask[rows]) / len(mask)
            loss = grpo_loss(
                logps[rows],
                **part,
                mask=mask[rows],
                loss_type=loss_type,
                normalizer=mask.sum() * own,
                beta=0.1,
            )
            (loss * own).backward()
        assert logps.grad is not None
        return logps.grad

    whole = gradient([slice(0, 6)])
    assert whole.abs().sum() > 0
    close(gradient([slice(0, 2), slice(2, 6)]), whole.tolist())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clipped_side_has_no_gradient_and_the_other_has(sign: float) -> None:
    def gradient(ratio: float) -> float:
        logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
        advantages = torch.tensor([sign])
        grpo_loss(logps, torch.zeros(1, 1), advantages, epsilon=0.2, epsilon_high=0.3).backward()
        assert logps.grad is not None
        return float(logps.grad)

    beyond, back = (1.31, 0.79) if sign > 0 else (0.79, 1.31)
    assert gradient(beyond) == 0
    assert gradient(back) * sign < 0  # descent moves the ratio the way that the advantage says


def test_delta_bounds_what_a_bad_sample_can_cost() -> None:
    logps = torch.tensor([[math.log(9.0)]], requires_grad=True)
    loss = grpo_loss(logps, torch.zeros(1, 1), torch.tensor([-1.0]), delta=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)
    assert logps.grad is not None
    assert logps.grad.item() == 0
    with pytest.raises(UserError, match="but must be above"):
        grpo_loss(logps, torch.zeros(1, 1), torch.tensor([-1.0]), delta=1.1)


def test_the_corrected_kl_has_the_gradient_of_the_reverse_kl() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = torch.linspace(-1, 1, 5, dtype=torch.float64).log_softmax(0)
    logits.requires_grad_()
    log_p = logits.log_softmax(0)
    exact = torch.autograd.grad(categorical_kl(log_p, reference), logits, retain_graph=True)[0]

    def expected(corrected: bool) -> Tensor:
        # Every outcome as a sample of its own, weighted by its probability.
        weights = log_p.detach().exp()
        loss = grpo_loss(
            log_p[None],
            log_p.detach()[None],
            torch.zeros(1, dtype=torch.float64),
            weights[None],
            ref_logps=reference[None],
            beta=1.0,
            use_bias_correction_kl=corrected,
            loss_type="dapo",
            normalizer=1.0,
        )
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    close(expected(True), exact.tolist())
    assert (expected(False) - exact).abs().max() > 1e-3


def test_gaussian_kl_is_what_samples_say() -> None:
    mean, other, std = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.0, 0.1]]), torch.tensor(0.5)
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    draws = mean + std * noise
    p, q = (torch.distributions.Normal(m, std).log_prob(draws) for m in (mean, other))
    assert float(gaussian_kl(mean, other, std)) == pytest.approx(float((p - q).mean()), rel=0.02)


@pytest.mark.parametrize(
    ("divergence", "curvature"),
    [("reverse_kl", 1), ("forward_kl", 1), ("js_divergence", 0.5), ("alpha_divergence", 1)],
)
def test_dpo_at_the_reference(divergence: str, curvature: float) -> None:
    reference = torch.full((3, 4), -1.0, dtype=torch.float64)
    chosen, rejected = (reference.clone().requires_grad_() for _ in range(2))
    sides = (chosen, rejected, reference, reference)
    loss = dpo_loss(*sides, f_divergence_type=divergence, beta=0.1)
    loss.backward()
    close(loss, math.log(2))
    close(chosen.grad, [[-0.05 * curvature / 3] * 4] * 3)
    close(rejected.grad, [[0.05 * curvature / 3] * 4] * 3)


def test_other_dpo_losses_at_the_reference() -> None:
    sides = [torch.full((3, 4), -1.0)] * 4
    assert float(dpo_loss(*sides, loss_type="hinge")) == pytest.approx(1)
    assert float(dpo_loss(*sides, loss_type="ipo", beta=0.1)) == pytest.approx(25)


def test_alpha_one_tends_to_reverse_kl() -> None:
    data = {name: double(v) for name, v in DPO["inputs"].items() if "mask" not in name}
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    sides = [data[name] for name in names]
    near = dpo_loss(*sides, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - 1e-7)
    close(near, float(dpo_loss(*sides)), rtol=1e-5)


def test_a_dropped_pair_leaves_the_others_gradients() -> None:
    data = {name: double(v) for name, v in DPO["inputs"].items() if "mask" not in name}
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    gradients = []
    for weight in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0])):
        chosen = data["chosen_logps"].clone().requires_grad_()
        dpo_loss(chosen, *(data[n] for n in names[1:]), weight=weight.double()).backward()
        gradients.append(chosen.grad)
    close(gradients[1][:3], gradients[0][:3].tolist())
    assert gradients[1][3].abs().sum() == 0


def test_kto_pulls_good_samples_up_and_bad_ones_down() -> None:
    logps = torch.full((4, 2), -1.0, dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, True, False])
    loss = kto_loss(logps, logps.detach(), desirable, beta=0.1)
    loss.backward()
    close(loss, 0.5)
    assert logps.grad is not None
    close(logps.grad[:, 0], [-0.00625, 0.00625, -0.00625, 0.00625])


def test_what_makes_no_sense_is_refused() -> None:
    pair = [torch.zeros(2, 3)] * 4
    with pytest.raises(UserError, match="loss_type is ppo"):
        grpo_loss(pair[0], pair[0], torch.zeros(2), loss_type="ppo")
    with pytest.raises(UserError, match=r"advantages must be \[2\] or \[2, 3\]"):
        grpo_loss(pair[0], pair[0], torch.zeros(3))
    with pytest.raises(UserError, match="needs ref_logps"):
        grpo_loss(pair[0], pair[0], torch.zeros(2), beta=0.1)
    with pytest.raises(UserError, match="reverse_kl only"):
        dpo_loss(*pair, loss_type="nca_pair", f_divergence_type="forward_kl")
    with pytest.raises(UserError, match="needs label_smoothing"):
        dpo_loss(*pair, loss_type="exo_pair")


# ---- advantages --------------------------------------------------------------------------------


def test_unscorable_samples_count_nowhere() -> None:
    rewards = torch.tensor([1.0, torch.nan, 0.0, 0.5, torch.nan, torch.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    found = group_advantages(rewards, groups)
    alone = group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    torch.testing.assert_close(found[[0, 2]], alone)
    assert found[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]


def test_the_order_of_groups_does_not_matter() -> None:
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(12) // 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(found, group_advantages(rewards, groups)[order])


def test_groups_without_differences_are_told_apart() -> None:
    """Also where the mean of equal numbers is rounded: 2/3, and 51.7."""
    rewards = torch.tensor([2 / 3] * 8 + [51.7] * 8 + [0.0] + [1.0] * 7)
    groups = torch.arange(24) // 8
    advantages = group_advantages(rewards, groups)
    assert not advantages[:16].any()
    assert informative(advantages, groups).tolist() == [False] * 16 + [True] * 8


def test_the_soft_mean_lies_between_mean_and_best() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.25, torch.nan], [torch.nan, torch.nan]])
    values = soft_mean(rewards, 1.0)
    assert 0.5 < float(values[0]) < 1
    assert float(values[1]) == pytest.approx(0.25)
    assert bool(values[2].isnan())
    assert float(soft_mean(rewards[:1], 1e4)) == pytest.approx(0.5, abs=1e-4)
    assert float(soft_mean(rewards[:1], 1e-3)) == pytest.approx(1.0, abs=1e-3)
