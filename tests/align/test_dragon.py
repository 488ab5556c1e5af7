"""DRAGON: D+ and D- by swaps, on golden data, and what is learnt from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.align.experience import Rollout, collect
from nextscale.align.methods.dpo import DPOConfig
from nextscale.align.methods.dragon import DRAGON, DRAGONConfig, MeanPart, SetPart, swap_split
from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.prompts import Prompt
from nextscale.align.references import FrozenCopy, Given
from nextscale.align.rewards import as_reward
from nextscale.align.rewards.distribution import FrechetReward, VendiReward
from nextscale.errors import UserError
from nextscale.eval.frechet import Moments
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ
from nextscale.var import NextScaleTransformer

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "align" / "dragon.json").read_text(encoding="utf-8")
)
D1, D2, REFERENCE = (
    torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("D1", "D2", "reference")
)


def frechet(features: Callable[[Tensor], Tensor] = lambda x: x) -> FrechetReward:
    moments = Moments.of(REFERENCE)
    return FrechetReward(features, moments.mean, moments.covariance)


def test_swaps_are_those_of_the_golden_data() -> None:
    part = SetPart(frechet(), torch.stack([D1, D2], dim=1))
    second = swap_split([(1.0, part)], len(D1))
    swapped = ~second if GOLDEN["swap"]["start_with"] == "D2" else second
    assert swapped.tolist() == GOLDEN["swap"]["swapped"]
    positive = torch.where(second[:, None], D2, D1)
    torch.testing.assert_close(positive, torch.tensor(GOLDEN["swap"]["positive"]).double())
    final = frechet().score_set(positive)
    assert final == pytest.approx(GOLDEN["swap"]["final_reward_positive"], rel=1e-9)
    torch.testing.assert_close(part.rows, positive)
    assert part.reward.score_moments(part.moments) == pytest.approx(final, rel=1e-9)  # pyright: ignore


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_swapping_never_lowers_the_reward_of_the_better_set(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(10, 2, 3, generator=generator, dtype=torch.float64)
    for reward in (frechet(), VendiReward(lambda x: x)):
        second = swap_split([(1.0, SetPart(reward, both))], 10)
        positive = both[torch.arange(10), second.long()]
        least = max(reward.score_set(both[:, 0]), reward.score_set(both[:, 1]))
        assert reward.score_set(positive) >= least - 1e-12


def test_with_rewards_of_pictures_the_better_of_each_pair_is_taken() -> None:
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    second = swap_split([(1.0, MeanPart(values))], 20)
    assert torch.equal(second, values[:, 1] > values[:, 0])
    against = swap_split([(-1.0, MeanPart(values))], 20)
    assert torch.equal(against, values[:, 1] < values[:, 0])


@pytest.fixture
def policy(
    build_model: Callable[..., NextScaleTransformer], tiny_tokenizer: MultiscaleVQ
) -> NextScalePolicy:
    """Random, with itself as reference."""
    policy = NextScalePolicy(NextScalePipeline(tiny_tokenizer, build_model()))
    policy.baseline = FrozenCopy(policy.network)
    return policy


class Spread:
    """A set reward that knows no moments."""

    name = "spread"

    def features(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        return images.mean((2, 3)).double()

    def score_set(self, features: Tensor) -> float:
        return float(features.std(0).sum())

    def contributions(self, features: Tensor) -> Tensor:
        rows = range(len(features))
        kept = [features[[j for j in rows if j != i]] for i in rows]
        return self.score_set(features) - torch.tensor([self.score_set(x) for x in kept])


def brightness(images: Tensor, prompts: Sequence[Any]) -> Tensor:
    return images.mean((1, 2, 3))


def rollout(policy: NextScalePolicy, rewards: Sequence[Any], weights: Sequence[float]) -> Rollout:
    prompts = [Prompt(i, {}) for i in range(4)]
    return collect(policy, rewards, prompts, 4, (0, 0), weights=weights)


def test_both_sets_hold_one_sample_of_each_pair(policy: NextScalePolicy) -> None:
    method = DRAGON(DRAGONConfig(), policy)
    drawn = rollout(policy, [Spread(), as_reward(brightness, "brightness")], (1.0, 0.5))
    experience = method.learn(drawn)
    assert experience.items.shape == (4 * method.items_per_group(4), 2)
    assert torch.equal(experience.items.sort(1).values, torch.arange(16).view(8, 2))
    assert torch.equal(drawn.groups[experience.items[:, 0]], drawn.groups[experience.items[:, 1]])
    metrics = experience.metrics
    assert metrics["dragon/spread_positive"] > metrics["dragon/spread_negative"]
    alone = method.learn(rollout(policy, [as_reward(brightness, "brightness")], (1.0,)))
    values = alone.rollout.total[alone.items]
    assert bool((values[:, 0] >= values[:, 1]).all())


def test_credit_can_be_what_each_sample_contributes(policy: NextScalePolicy) -> None:
    method = DRAGON(DRAGONConfig(credit="leave_one_out"), policy)
    drawn = rollout(policy, [Spread()], (1.0,))
    items = method.learn(drawn).items
    assert bool((drawn.rewards[items[:, 0], 0] >= drawn.rewards[items[:, 1], 0]).all())


def test_unscorable_and_equal_pairs_teach_nothing(policy: NextScalePolicy) -> None:
    method = DRAGON(DRAGONConfig(), policy)
    drawn = rollout(policy, [as_reward(brightness, "brightness")], (1.0,))
    values = drawn.rewards.clone()
    values[0] = torch.nan
    values[2:4] = 0.5
    drawn = replace(drawn, rewards=values, total=values[:, 0])
    assert method.learn(drawn).weights[:3].tolist() == [0, 0, 1]


def test_pairs_that_cannot_be_scored_are_in_no_set(policy: NextScalePolicy) -> None:
    """The others are split as without them."""
    method = DRAGON(DRAGONConfig(), policy)
    drawn = rollout(policy, [Spread(), as_reward(brightness, "brightness")], (1.0, -1.0))
    total = drawn.total.clone()
    total[::8] = torch.nan
    rewards = drawn.rewards.clone()
    rewards[::8, 1] = torch.nan
    found = method.learn(replace(drawn, rewards=rewards, total=total))
    kept = torch.arange(16).view(8, 2)[found.weights > 0].flatten()
    assert len(kept) == 12
    few = replace(
        drawn,
        trajectory=drawn.trajectory.index(kept),
        groups=torch.arange(6).repeat_interleave(2),
        rewards=drawn.rewards[kept],
        total=drawn.total[kept],
        features={"spread": drawn.features["spread"][kept]},
    )
    expected = kept[method.learn(few).items]
    assert torch.equal(found.items[found.weights > 0], expected)


def test_exchanges_in_a_set_of_equal_pictures_keep_their_digits() -> None:
    """Rank-one updates that would leave rounding alone are made anew."""
    reward = FrechetReward(lambda images: images, torch.zeros(6), torch.eye(6))
    features = torch.ones(12, 2, 6, dtype=torch.float64) * 7
    features[:, 1] += 1e-4 * torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    features[0, 0] += 100
    part = SetPart(reward, features)
    part.start(False)
    rows = features[:, 0].clone()
    for index in range(12):
        proposed = rows.clone()
        proposed[index] = features[index, 1]
        assert part.propose(index) == pytest.approx(reward.score_set(proposed), rel=1e-9)
        part.accept()
        rows = proposed


def test_the_reference_point_of_kto_is_that_of_the_rollout(
    policy: NextScalePolicy, build_model: Callable[..., NextScaleTransformer]
) -> None:
    """Micro-batches of any size have one gradient, and pairs of weight 0 move nothing."""
    policy.baseline = Given(build_model(seed=5))
    method = DRAGON(DRAGONConfig(loss_type="kto", pair=DPOConfig(score="policy")), policy)
    drawn = rollout(policy, [as_reward(brightness, "brightness")], (1.0,))
    drawn = replace(drawn, total=(torch.arange(16) // 3).float())  # some pairs are alike
    experience = method.learn(drawn)

    def gradient(size: int) -> Tensor:
        policy.model.zero_grad()
        for examples in torch.arange(8).split(size):
            for loss, _ in method.losses(experience, examples, 0, policy.model):
                (loss * len(examples) / 8).backward()
        assert policy.model.head.weight.grad is not None
        return policy.model.head.weight.grad.clone()

    assert experience.metrics["dragon/z0"] > 0
    assert 0 < float(experience.weights.sum()) < 8
    whole = gradient(8)
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient(2), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_the_loss_prefers_the_positive_set(policy: NextScalePolicy, loss_type: Any) -> None:
    method = DRAGON(DRAGONConfig(loss_type=loss_type, pair=DPOConfig(beta=1.0)), policy)
    drawn = rollout(policy, [as_reward(brightness, "brightness")], (1.0,))
    experience = method.learn(drawn)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    margins = []
    for step in range(5):
        ((loss, metrics),) = method.losses(experience, torch.arange(8), step, policy.model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        margins.append(float(metrics["rewards/margins"]))
        if step == 0:
            assert float(loss.detach()) == pytest.approx(
                0.6931 if loss_type == "dpo" else 0.5, abs=1e-3
            )
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins == sorted(margins)


@pytest.mark.parametrize(
    ("loss_type", "changes"),
    [
        ("dpo", {"margin": 1.0}),
        ("dpo", {"pairs_per_group": 2}),
        ("kto", {"loss_type": "hinge"}),
        ("kto", {"rpo_alpha": 1.0}),
    ],
)
def test_settings_of_pairs_that_nothing_reads_are_refused(
    loss_type: Any, changes: dict[str, Any]
) -> None:
    (name,) = changes
    with pytest.raises(UserError, match=rf"dragon\.pair\.{name} is .* nothing reads it"):
        DRAGONConfig(loss_type=loss_type, pair=DPOConfig(**changes))


def test_an_odd_group_is_refused(policy: NextScalePolicy) -> None:
    with pytest.raises(UserError, match="num_generations is 5: DRAGON pairs"):
        DRAGON(DRAGONConfig(), policy).items_per_group(5)
