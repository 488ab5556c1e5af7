"""Rewards: what a policy is trained to make more of, behind one call convention."""

from nextscale.align.rewards.columns import (
    pairwise_column,
    preference_scores,
    score,
    set_column,
    set_features,
    set_score,
)
from nextscale.align.rewards.composition import HeldOutMonitor, RewardTrend, combine, normalized
from nextscale.align.rewards.registry import REWARDS, open_reward
from nextscale.align.rewards.reward import (
    PairwiseReward,
    Reward,
    RewardOutput,
    SetReward,
    as_reward,
    scorer_reward,
)

__all__ = [
    "REWARDS",
    "HeldOutMonitor",
    "PairwiseReward",
    "Reward",
    "RewardOutput",
    "RewardTrend",
    "SetReward",
    "as_reward",
    "combine",
    "normalized",
    "open_reward",
    "pairwise_column",
    "preference_scores",
    "score",
    "scorer_reward",
    "set_column",
    "set_features",
    "set_score",
]
