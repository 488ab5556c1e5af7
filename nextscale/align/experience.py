"""Rollouts: prompts -> samples -> rewards, alike on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale import processes
from nextscale.align.advantages import group_moments
from nextscale.align.prompts import Prompt
from nextscale.align.rewards import (
    combine,
    pairwise_column,
    score,
    set_column,
    set_features,
    set_score,
)
from nextscale.align.rewards.reward import AnyReward, PairwiseReward, SetReward
from nextscale.align.trajectory import Policy, Trajectory, cat_rows, map_rows
from nextscale.streams import stream

_ROLLOUT = 7  # keeps these streams apart from those of data order and training noise


@dataclass(frozen=True)
class Rollout:
    """What one round of sampling gave, the same on every process.

    Attributes:
        trajectory: B samples, group by group, on the policy's device.
        prompts: B.
        groups: [B], number of the prompt that a sample was drawn for.
        rewards: [B, K], one column per reward; NaN is unscorable. Of a set reward, what each
            sample contributes.
        weights: [K], of the rewards.
        total: [B], the rewards as one.
        mode: How: sum, or as `combine` takes it.
        scored_by: [K], the rewards.
        features: Of set rewards, [B, d] by name.
        extra: Further columns of the rewards, for the log.
        key: (seed, step): names the streams of whatever is drawn from here on.
    """

    trajectory: Trajectory
    prompts: list[Prompt]
    groups: Int[Tensor, " b"]
    rewards: Float[Tensor, "b k"]
    weights: tuple[float, ...]
    total: Float[Tensor, " b"]
    mode: str
    scored_by: tuple[AnyReward, ...]
    features: dict[str, Float[Tensor, "b d"]]
    extra: dict[str, Tensor]
    key: tuple[int, int]


@dataclass(frozen=True)
class Experience:
    """A rollout as a method learns from it.

    Attributes:
        rollout: The samples.
        items: [N, r], what one example is made of: rows of the rollout (one sample, or a pair).
        weights: [N], 0 for examples that carry no signal.
        columns: What else belongs to the samples, [B] or [B, U], by name.
        metrics: Of the whole rollout, for the log.
        recompute: "old_logps" are those of the current weights, and may be judged again in the
            precision of training.
    """

    rollout: Rollout
    items: Int[Tensor, "n r"]
    weights: Float[Tensor, " n"]
    columns: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    recompute: bool = True


def collect(
    policy: Policy,
    rewards: Sequence[AnyReward],
    prompts: Sequence[Prompt],
    num_generations: int,
    key: tuple[int, int],
    *,
    weights: Sequence[float] | None = None,
    mode: str = "sum",
    branch: Sequence[tuple[int, int]] = (),
    model_version: int = 0,
) -> Rollout:
    """Draw a group of samples for every prompt and score them.

    Every process draws whole groups of its share of the prompts; then all of them hold all. Sample
    i draws from the stream (seed, step, i), so that the number of processes changes nothing.

    Args:
        policy: Draws.
        rewards: Score.
        prompts: One per group.
        num_generations: G, samples per prompt; with `branch`, prefixes per prompt.
        key: (seed, step).
        weights: One per reward; None: all 1.
        mode: How the rewards become one, see `combine`.
        branch: Levels (step b, K), of rising steps: each sample of the level above gets K - 1
            siblings that share its steps before b, so that B = prompts x G x K x K' ... samples
            are the leaves of G trees per prompt, siblings in a row.
        model_version: Optimizer steps of the weights.
    """
    own = processes.own_range(len(prompts))
    conditions = policy.encode([prompts[i].asked for i in own]) if len(own) else None
    parts: list[Trajectory] = []
    if conditions is not None:
        first = own.start * num_generations
        count = len(own) * num_generations
        repeated = _repeat(conditions, num_generations)
        parts = [policy.sample(repeated, generators=_streams(key, first, count))]
    per_group = num_generations
    for level, (at_step, siblings) in enumerate(branch):
        name, first = (*key, _ROLLOUT, 2 + level), own.start * per_group
        parts = [_with_siblings(policy, t, at_step, siblings, name, first) for t in parts]
        per_group *= siblings
    mine = [prompts[i] for i in own for _ in range(per_group)]
    device = next(policy.network.parameters()).device
    images = policy.decode(parts[0]) if parts else torch.zeros(0, 3, 1, 1, device=device)
    pieces = processes.gather((_cpu(parts), images.cpu()))
    trajectory = Trajectory.cat([p for piece, _ in pieces for p in piece]).to(device)
    groups = torch.arange(len(prompts), device=device).repeat_interleave(per_group)
    columns, extra = _score(rewards, images, mine)
    found = processes.gather((columns.cpu(), {k: v.cpu() for k, v in extra.items()}))
    values = torch.cat([c for c, _ in found]).to(device)
    shown = {name: torch.cat([e[name] for _, e in found if name in e]) for name in found[0][1]}
    everyone = [prompt for prompt in prompts for _ in range(per_group)]
    pictures = torch.cat([p for _, p in pieces if len(p)]).to(device)
    values, features = score_together(rewards, values, pictures, everyone, groups)
    factors = (1.0,) * len(rewards) if weights is None else tuple(weights)
    return Rollout(
        trajectory=replace(trajectory, model_version=model_version, images=pictures),
        prompts=everyone,
        groups=groups,
        rewards=values,
        weights=factors,
        total=combine(values, factors, mode),
        mode=mode,
        scored_by=tuple(rewards),
        features=features,
        extra=shown,
        key=key,
    )


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """What trl logs of a rollout: `reward`, `reward_std`, `rewards/NAME/mean`, ...

    The mean of a set reward is the set's score, not that of the samples' contributions, also
    within `reward`.
    """
    metrics = {f"rewards/{k}/mean": float(v.nanmean()) for k, v in rollout.extra.items()}
    for reward, column in zip(rollout.scored_by, rollout.rewards.unbind(1), strict=True):
        name, valid = reward.name, column[~column.isnan()]
        is_set = isinstance(reward, SetReward)
        mean = set_score(reward, rollout.features[name]) if is_set else float(valid.mean())
        metrics[f"rewards/{name}/mean"] = mean
        metrics[f"rewards/{name}/std"] = float(valid.std()) if len(valid) > 1 else 0.0
        metrics[f"rewards/{name}/unscorable"] = 1 - len(valid) / len(column)
    total = rollout.total
    stds = group_moments(total, rollout.groups, ddof=1)[1]
    metrics["reward"] = float(total.nanmean())
    counted = [(w, r) for w, r in zip(rollout.weights, rollout.scored_by, strict=True) if w]
    if rollout.mode == "sum" and any(isinstance(reward, SetReward) for _, reward in counted):
        metrics["reward"] = sum(w * metrics[f"rewards/{r.name}/mean"] for w, r in counted)
    metrics["reward_std"] = float(stds.mean())
    metrics["frac_reward_zero_std"] = float((stds == 0).float().mean())
    return metrics


def sample_streams(key: tuple[int, ...], rows: Sequence[int]) -> list[torch.Generator]:
    """Streams of given examples of a step, for the noise of losses."""
    return [stream(*key, _ROLLOUT, 1, row) for row in rows]


def _with_siblings(
    policy: Policy,
    parents: Trajectory,
    at_step: int,
    siblings: int,
    key: tuple[int, ...],
    first: int,
) -> Trajectory:
    """Each sample followed by K - 1 others that share its first steps.

    Args:
        policy: Draws.
        parents: This process's samples.
        at_step: First step that siblings draw anew.
        siblings: K.
        key: Of the level's streams.
        first: Number of the first parent among those of all processes.
    """
    count, others = len(parents), siblings - 1
    numbers = range(first * others, (first + count) * others)
    generators = [stream(*key, number) for number in numbers]
    if not others:
        return replace(parents, parent_step=at_step)
    drawn = policy.branch(parents, at_step, others, generators=generators)
    order = torch.arange(count)[:, None]
    new = count + torch.arange(count * others).view(count, others)
    joined = Trajectory.cat([replace(parents, parent_step=at_step), drawn])
    joined = joined.index(torch.cat([order, new], dim=1).flatten().to(parents.actions[0].device))
    ids = torch.arange(count).repeat_interleave(siblings)
    return replace(joined, branch_id=ids.to(joined.branch_id.device))


def _score(
    rewards: Sequence[AnyReward], images: Tensor, prompts: Sequence[Prompt]
) -> tuple[Tensor, dict[str, Tensor]]:
    if not len(images):
        return images.new_zeros(0, len(rewards)), {}
    return score(rewards, images, [p.condition for p in prompts], [p.metadata for p in prompts])


def score_together(
    rewards: Sequence[AnyReward],
    values: Tensor,
    images: Tensor,
    prompts: Sequence[Prompt],
    groups: Tensor,
    *,
    whole: bool = False,
) -> tuple[Tensor, dict[str, Float[Tensor, "b d"]]]:
    """Fill in the columns of rewards that need all samples: of sets, and of pairs in a group.

    Args:
        rewards: All of them.
        values: [B, K], filled in.
        images: All pictures.
        prompts: One each.
        groups: One each.
        whole: Columns of set rewards hold the set's score, not what each sample contributes.

    Returns:
        The columns, and the features of set rewards by name.
    """
    conditions = [prompt.condition for prompt in prompts]
    features = {}
    for k, reward in enumerate(rewards):
        if isinstance(reward, SetReward):
            share = processes.own_range(len(images))
            rows = slice(share.start, share.stop)
            own = set_features(reward, images[rows], conditions[rows]).cpu()
            found = cat_rows(processes.gather(own)).to(images.device)
            features[reward.name] = found
            values[:, k] = (
                set_score(reward, found) if whole else set_column(reward, found).to(values)
            )
        elif isinstance(reward, PairwiseReward):
            values[:, k] = pairwise_column(reward, images, conditions, groups).to(values)
    return values, features


def _streams(key: tuple[int, int], first: int, count: int) -> list[torch.Generator]:
    return [stream(*key, _ROLLOUT, 0, first + i) for i in range(count)]


def _cpu(parts: Sequence[Trajectory]) -> list[Trajectory]:
    return [part.to("cpu") for part in parts]


def _repeat(conditions: object, count: int) -> object:
    return map_rows(conditions, lambda rows: rows.repeat_interleave(count, 0))
