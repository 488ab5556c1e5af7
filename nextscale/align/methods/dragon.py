"""DRAGON (arXiv 2504.15217): learn from a good and a bad set of pictures.

Every rollout is two sets of samples for the same prompts, D1 and D2. From them a positive and a
negative set are made that still have one sample of each prompt, so that any reward of sets, such
as a distance to an exemplar set or a diversity, becomes preferences that DPO or KTO learns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.align.experience import Experience, Rollout, sample_streams
from nextscale.align.methods.dpo import DPO, DPOConfig
from nextscale.align.methods.method import Loss, Method
from nextscale.align.objectives.kto import kto_loss
from nextscale.align.rewards import set_score
from nextscale.align.rewards.distribution import FrechetReward, without_row
from nextscale.align.rewards.reward import SetReward
from nextscale.align.trajectory import Policy
from nextscale.errors import UserError, require
from nextscale.eval.frechet import Moments, as_float64

_JUDGED = 32  # pairs judged at once outside of the loss


@dataclass(frozen=True, kw_only=True)
class DRAGONConfig:
    """Settings of DRAGON."""

    loss_type: Literal["dpo", "kto"] = "dpo"
    """dpo on pairs of one prompt, or kto on single samples."""
    credit: Literal["swap", "leave_one_out"] = "swap"
    """swap: D+ starts as the better set and takes a sample of the other one wherever the set's
    reward rises. leave_one_out: the sample of each pair that contributes more."""
    pair: DPOConfig = field(default_factory=DPOConfig)
    """beta, weights of scales and the other settings of the likelihoods; its loss_type is dpo's."""
    desirable_weight: float = 1.0
    """kto: weight of D+."""
    undesirable_weight: float = 1.0
    """kto: weight of D-."""

    def __post_init__(self) -> None:
        known = self.loss_type in ("dpo", "kto")
        require("dragon.loss_type", self.loss_type, known, "be dpo or kto")
        known = self.credit in ("swap", "leave_one_out")
        require("dragon.credit", self.credit, known, "be swap or leave_one_out")
        unused = ["margin", "pairs_per_group"]
        if self.loss_type == "kto":
            unused += ["loss_type", "label_smoothing", "rpo_alpha"]
        for name in unused:
            given, value = getattr(self.pair, name), getattr(DPOConfig, name)
            what = f"be {value}: with loss_type {self.loss_type} nothing reads it"
            require(f"dragon.pair.{name}", given, given == value, what)
        for name in ("desirable_weight", "undesirable_weight"):
            require(f"dragon.{name}", getattr(self, name), getattr(self, name) >= 0, "be 0 or more")


class DRAGON(Method):
    """`dpo_loss` or `kto_loss` on D+ and D-; see `DRAGONConfig`.

    Rewards of single pictures count by their mean over D+, set rewards by their value; with the
    former alone swapping is taking the better sample of each pair. A group of G samples makes G / 2
    pairs.

    Args:
        settings: See there.
        policy: What is trained.
    """

    needs_reference = True

    def __init__(self, settings: DRAGONConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.pairs = DPO(settings.pair, policy)
        self._z0 = 0.0

    def items_per_group(self, num_generations: int) -> int:
        """Pairs of a group."""
        if num_generations % 2:
            raise UserError(
                f"num_generations is {num_generations}: DRAGON pairs the samples of a prompt; "
                "use an even number"
            )
        return num_generations // 2

    def learn(self, rollout: Rollout) -> Experience:
        """Split the rollout; pairs that cannot be scored, or are alike, have weight 0."""
        rows = torch.arange(len(rollout.total), device=rollout.total.device).view(-1, 2)
        values = rollout.total[rows]
        scorable = ~values.isnan().any(dim=1)
        used = scorable & (values[:, 0] != values[:, 1])
        second = values[:, 1] > values[:, 0]
        if self.settings.credit == "swap" and scorable.any():
            parts = _parts(rollout, rows[scorable])
            second[scorable] = swap_split(parts, int(scorable.sum())).to(second.device)
        positive = rows.gather(1, second.long()[:, None])
        negative = rows.gather(1, (~second).long()[:, None])
        metrics = {"pairs/used": float(used.float().mean())}
        for reward in rollout.scored_by:
            if isinstance(reward, SetReward):
                features = rollout.features[reward.name]
                for side, chosen in (("positive", positive), ("negative", negative)):
                    value = set_score(reward, features[chosen[:, 0]])
                    metrics[f"dragon/{reward.name}_{side}"] = value
        items = torch.cat([positive, negative], dim=1)
        found = Experience(rollout, items, used.to(rollout.total), metrics=metrics)
        if self.settings.loss_type == "kto":
            self._z0 = self._reference_point(found)
            found.metrics["dragon/z0"] = self._z0
        return found

    @torch.no_grad()
    def _reference_point(self, experience: Experience) -> float:
        """z0 = max(0, mean h) of the rollout's pairs, as the policy is before it trains on them."""
        examples, found = experience.weights.nonzero()[:, 0], []
        for some in examples.split(_JUDGED):
            logp, ref_logp, mask = self._scores(experience, some, self.policy.network)
            found.append(((logp - ref_logp) * mask).sum(1))
        return max(0.0, float(torch.cat(found).mean())) if found else 0.0

    def _scores(
        self, experience: Experience, examples: Int[Tensor, " n"], network: nn.Module, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DPO.scores`, of the good samples and then of the bad ones."""
        pairs = experience.items[examples]
        trajectory = experience.rollout.trajectory.index(pairs.T.flatten())
        generators = sample_streams((*experience.rollout.key, step), examples.tolist() * 2)
        return self.pairs.scores(trajectory, generators, network)

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The loss of some pairs; kto's reference point is that of the whole rollout."""
        if self.settings.loss_type == "dpo":
            yield from self.pairs.losses(experience, examples, step, network)
            return
        logp, ref_logp, mask = self._scores(experience, examples, network, step)
        loss = kto_loss(
            logp,
            ref_logp,
            torch.arange(len(logp), device=logp.device) < len(examples),
            mask,
            beta=self.pairs.beta,
            desirable_weight=self.settings.desirable_weight,
            undesirable_weight=self.settings.undesirable_weight,
            weight=experience.weights[examples].repeat(2),
            z0=self._z0,
        )
        margin = ((logp - ref_logp) * mask).detach().sum(1)
        chosen, rejected = margin.chunk(2)
        yield loss, {"rewards/margins": self.pairs.beta * float((chosen - rejected).mean())}


# ---- the split -----------------------------------------------------------------------------------


class Part(Protocol):
    """One term of the reward of D+, while samples are exchanged."""

    def start(self, second: bool) -> float:
        """Begin with D1 or D2 as D+; its value."""
        ...

    def propose(self, index: int) -> float:
        """The value if this sample came from the other set."""
        ...

    def accept(self) -> None:
        """Make the last proposal."""
        ...


def swap_split(parts: Sequence[tuple[float, Part]], count: int) -> Bool[Tensor, " n"]:
    """Which samples of D+ come from D2, by one greedy pass.

    Start with the better whole set; for i = 1..n exchange sample i, and keep the exchange if the
    reward of D+ strictly rises.

    Args:
        parts: (weight, term); the reward is the weighted sum.
        count: n, samples of a set.
    """
    totals = [sum(w * part.start(side) for w, part in parts) for side in (False, True)]
    second = totals[1] > totals[0]
    best = sum(w * part.start(second) for w, part in parts)
    chosen = torch.full((count,), second)
    for i in range(count):
        value = sum(w * part.propose(i) for w, part in parts)
        if value > best:
            best = value
            chosen[i] = not second
            for _, part in parts:
                part.accept()
    return chosen


class MeanPart:
    """The mean of a reward of single pictures.

    Args:
        values: Of D1 and D2.
    """

    def __init__(self, values: Float[Tensor, "n 2"]) -> None:
        self.values = values.double()

    def start(self, second: bool) -> float:
        """See `Part`."""
        self.side, self.sum = int(second), float(self.values[:, int(second)].sum())
        return self.sum / len(self.values)

    def propose(self, index: int) -> float:
        """See `Part`."""
        own, other = self.values[index, self.side], self.values[index, 1 - self.side]
        self.next = self.sum + float(other - own)
        return self.next / len(self.values)

    def accept(self) -> None:
        """See `Part`."""
        self.sum = self.next


class SetPart:
    """A set reward; of Fréchet rewards the moments are updated by the two rows that move.

    Args:
        reward: The reward.
        features: Of D1 and D2, [n, 2, d].
    """

    def __init__(self, reward: SetReward, features: Float[Tensor, "n 2 d"]) -> None:
        frechet = isinstance(reward, FrechetReward)
        self.reward, self.features = reward, as_float64(features).cpu() if frechet else features

    def start(self, second: bool) -> float:
        """See `Part`."""
        self.side, self.rows = int(second), self.features[:, int(second)].clone()
        if isinstance(self.reward, FrechetReward):
            self.moments = Moments.of(self.rows)
            return self.reward.score_moments(self.moments)
        return self.reward.score_set(self.rows)

    def propose(self, index: int) -> float:
        """See `Part`."""
        new = self.features[index, 1 - self.side]
        if isinstance(self.reward, FrechetReward):
            rest = without_row(self.moments, self.rows, index)
            self.next_moments = rest.merge(Moments.of(new[None]))
            self.place, self.new = index, new
            return self.reward.score_moments(self.next_moments)
        rows = self.rows.clone()
        rows[index] = new
        self.place, self.new = index, new
        return self.reward.score_set(rows)

    def accept(self) -> None:
        """See `Part`."""
        self.rows[self.place] = self.new
        if isinstance(self.reward, FrechetReward):
            self.moments = self.next_moments


def _parts(rollout: Rollout, rows: Int[Tensor, "n 2"]) -> list[tuple[float, Part]]:
    """The terms of a rollout's reward."""
    parts: list[tuple[float, Part]] = []
    columns = zip(rollout.scored_by, rollout.weights, rollout.rewards.unbind(1), strict=True)
    for reward, weight, column in columns:
        if not weight:
            continue
        if isinstance(reward, SetReward):
            features = rollout.features[reward.name][rows]
            parts.append((weight, SetPart(reward, features)))
        else:
            parts.append((weight, MeanPart(column[rows])))
    return parts
