"""B2-DiffuRL: the growing interval, the choice among branches, what is trained and what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.experience import Rollout, collect
from nextscale.align.methods.b2 import B2, B2Config, extremes
from nextscale.align.methods.grpo import GRPOConfig
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.prompts import Prompt
from nextscale.align.rewards import as_reward
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer


@pytest.fixture
def policy(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePolicy:
    """Random, four scales, without guidance."""
    return NextScalePolicy(NextScalePipeline(tiny_tokenizer, build_model()))


def brightness(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    return images.mean((1, 2, 3))


def rollout(policy: NextScalePolicy, method: B2, prompts: int = 3, size: int = 2) -> Rollout:
    return collect(
        policy,
        [as_reward(brightness, "brightness")],
        [Prompt(i, {}) for i in range(prompts)],
        size,
        (0, 0),
        branch=method.branch(),
    )


def of_steps(count: int) -> Any:
    """Something with so many denoising steps."""
    shared = {"averaged": True, "kind": "gaussian", "trained": range(count)}
    return SimpleNamespace(num_steps=count, units=(1,) * count, **shared)


def test_the_interval_grows_as_in_the_paper() -> None:
    method = B2(B2Config(num_stages=100), of_steps(20))
    assert [method.interval(i) for i in (0, 14, 15, 99, 500)] == [14, 14, 15, 20, 20]
    assert [method.interval(i) for i in range(100)] == [14 + 7 * i // 100 for i in range(100)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_interval": 30}, "first_interval is 30"),
        ({"last_interval": 21}, "at most the 20 steps"),
        ({"num_branches": 1}, "num_branches is 1, but must be above 1"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"advantage": "mean"}, "be extremes or branch"),
    ],
)
def test_intervals_that_are_none_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        B2(B2Config(**changes), of_steps(20))


def test_only_extremes_beyond_the_threshold_count() -> None:
    scores = torch.tensor([[0.6, -0.4, -0.6], [0.4, 0.1, 0.2], [torch.nan, -2.0, 0.5]])
    rows, used = extremes(scores, 0.5)
    assert rows.tolist() == [0, 2, 3, 4, 8, 7]
    assert used.tolist() == [1, 1, 0, 0, 1, 1]


def test_scores_are_compared_with_those_of_the_last_stages(policy: NextScalePolicy) -> None:
    """With two rollouts to a stage: the eight stages before this one, and its own first rollout."""
    settings = B2Config(history=8, stage_rollouts=2, threshold=0.0, loss=GRPOConfig())
    method = B2(settings, policy)
    drawn = rollout(policy, method, prompts=1)
    totals = [torch.randn(8) + number for number in range(24)]
    for number, total in enumerate(totals):
        past = torch.cat(totals[max(0, 2 * (number // 2 - 8)) : number + 1])
        found = method.learn(replace(drawn, total=total)).columns["advantages"]
        torch.testing.assert_close(found, (total - past.mean()) / (past.std() + 1e-8))
        if number == 11:
            again = B2(settings, policy)
            again.load_state_dict(json.loads(json.dumps(method.state_dict())))
            method = again


def test_what_cannot_be_scored_teaches_nothing_and_ends_no_stage(policy: NextScalePolicy) -> None:
    method = B2(B2Config(threshold=0.0, min_spread=0.1, stage_rollouts=5), policy)
    drawn = rollout(policy, method)
    total = torch.randn(len(drawn.total))
    total[:8] = torch.nan  # a whole group
    experience = method.learn(replace(drawn, total=total))
    assert experience.columns["advantages"][:8].tolist() == [0] * 8
    assert experience.columns["advantages"][8:].any()
    assert not experience.weights[:4].any()
    experience = method.learn(replace(drawn, total=torch.full_like(total, torch.nan)))
    assert not experience.weights.any()
    assert method.stage == 0


def test_siblings_share_the_prefix_and_only_the_interval_is_trained(
    policy: NextScalePolicy,
) -> None:
    method = B2(B2Config(first_interval=2, num_branches=3, threshold=0.0), policy)
    drawn = rollout(policy, method)
    first = drawn.trajectory.parent_step
    assert first == 2
    prefix = torch.cat(drawn.trajectory.actions[:first], dim=1).view(6, 3, -1)
    assert bool((prefix == prefix[:, :1]).all())
    experience = method.learn(drawn)
    assert experience.items.shape == (12, 1)
    judged: list[Any] = []
    original = policy.evaluate

    def evaluate(*given: Any, **named: Any) -> Any:
        ev = original(*given, **named)
        ev.logp.retain_grad()
        judged.append(ev)
        return ev

    policy.evaluate = evaluate  # pyright: ignore[reportAttributeAccessIssue]
    (loss, _), = method.losses(experience, torch.arange(12), 0, policy.model)  # fmt: skip
    loss.backward()
    (ev,) = judged
    before = ev.step < first
    assert not ev.logp.grad[:, before].any()
    assert ev.logp.grad[:, ~before].abs().sum() > 0


def test_branches_can_be_judged_against_their_own_mean(policy: NextScalePolicy) -> None:
    method = B2(B2Config(advantage="branch", num_branches=3, negative_weight=0.5), policy)
    drawn = rollout(policy, method)
    experience = method.learn(drawn)
    assert len(experience.items) == len(drawn.total) == method.items_per_group(2) * 3
    rewards = drawn.total.view(-1, 3)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    expected = torch.where(expected > 0, expected, 0.5 * expected).flatten()
    torch.testing.assert_close(experience.columns["advantages"], expected)


def test_an_interval_without_differences_ends_early(policy: NextScalePolicy) -> None:
    settings = B2Config(first_interval=1, num_stages=40, stage_rollouts=5, min_spread=0.1)
    method = B2(settings, policy)
    drawn = rollout(policy, method)
    method.learn(replace(drawn, total=torch.randn(len(drawn.total))))
    assert method.stage == 0
    method.learn(replace(drawn, total=torch.zeros(len(drawn.total))))
    assert method.interval(method.stage) == 2
    assert method.branch() == ((2, 4),)
    for _ in range(5):
        method.learn(replace(drawn, total=torch.randn(len(drawn.total))))
    assert method.interval(method.stage) == 2
    again = B2(settings, policy)
    again.load_state_dict(method.state_dict())
    assert again.stage == method.stage


def test_steps_without_noise_leave_nothing_to_train(policy: NextScalePolicy) -> None:
    method = B2(B2Config(first_interval=2, threshold=0.0), policy)
    experience = method.learn(rollout(policy, method))
    calm = replace(experience.rollout.trajectory, stochastic=(True, True, False, False))
    experience = replace(experience, rollout=replace(experience.rollout, trajectory=calm))
    with pytest.raises(UserError, match="no step of the rollout was random"):
        list(method.losses(experience, torch.arange(4), 0, policy.model))
