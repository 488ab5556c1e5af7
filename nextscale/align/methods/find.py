"""FIND (arXiv 2407.19453): learn where a frozen generator starts, by policy gradient.

A one-step decision: the state is the prompt, the action the start, the reward that of the picture.
The policy is a `StartPolicy`; everything else is GRPO's loss on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.align.advantages import group_advantages, informative
from nextscale.align.experience import Experience, Rollout
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.grpo_config import GRPOConfig, check_nested
from nextscale.align.methods.method import Loss, Method, old_logps
from nextscale.align.starts import Space
from nextscale.align.trajectory import Policy, Trajectory
from nextscale.errors import require


def _loss() -> GRPOConfig:
    return GRPOConfig(beta=0.01, kl_estimator="exact")


@dataclass(frozen=True, kw_only=True)
class FINDConfig:
    """Settings of FIND."""

    space: Space | None = None
    """noise (diffusion), embedding, prefix_table or sharpness (next-scale); None: noise, sharpness,
    or prefix_table for a table."""
    amortised: bool = True
    """A network of the prompt's features, for any prompt; off: a table with a row for each of
    `prompts`, as in the paper."""
    prefix_scales: int = 3
    """prefix_table, sharpness: scales whose tokens are learnt."""
    initial_std: float | None = None
    """Standard deviation before training; None: 1 for noise, 0.1 of the start token's rms."""
    min_std: float = 1e-4
    """Standard deviations stay above it."""
    hidden: int = 256
    """Width of the networks."""
    logp_reduction: Literal["mean", "sum"] = "mean"
    """Of log-densities over dimensions; a mean hardly moves, its epsilon must be tiny."""
    deterministic: bool = True
    """Diffusion steps behind the start without noise, eta 0; off: with that of `diffusion.eta`. The
    released code has eta 1, with which the start decides only in part."""
    suffixes: int = 1
    """Pictures drawn per start, whose mean reward is the start's."""
    baseline: Literal["group", "ema", "value"] = "group"
    """What a reward is compared with: the prompt's other samples, a running mean per prompt, or a
    network of the prompt's features."""
    ema_decay: float = 0.9
    """Of the running mean."""
    value_weight: float = 0.5
    """Weight of the value network's squared error."""
    anchor: Literal["previous", "initial"] = "previous"
    """What the ratio compares with: the distribution that drew the start, or the one before
    training, a trust region around it (the released code)."""
    replay: int = 0
    """Earlier rollouts that are trained on again, with the log-probabilities they were drawn by."""
    loss: GRPOConfig = field(default_factory=_loss)
    """The clipped loss; its KL term compares with the distribution before training."""

    def __post_init__(self) -> None:
        for name in ("prefix_scales", "hidden", "suffixes", "min_std", "initial_std"):
            value = getattr(self, name)
            require(f"find.{name}", value, value is None or value > 0, "be above 0")
        for name in ("replay", "value_weight"):
            require(f"find.{name}", getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        require("find.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "lie in [0, 1)")
        check_nested("find.loss", self.loss)
        choices = {
            "space": (None, "noise", "embedding", "prefix_table", "sharpness"),
            "baseline": ("group", "ema", "value"),
            "anchor": ("previous", "initial"),
            "logp_reduction": ("mean", "sum"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            names = ", ".join(str(x) for x in allowed if x is not None)
            require(f"find.{name}", value, value in allowed, f"be one of {names}")


class FIND(Method):
    """GRPO's loss on starts; see `FINDConfig`.

    Differences from the released code, which pairs the newest start with the oldest reward of its
    buffer: each start keeps its own reward, log-probability and prompt. The clip is the pessimistic
    one of PPO. The KL term is that of two Gaussians (or categoricals), not a squared distance. The
    value network sees the prompt's features alone.

    Args:
        settings: See there.
        policy: A StartPolicy.
    """

    def __init__(self, settings: FINDConfig, policy: Policy) -> None:
        self.settings, self.policy = settings, policy
        self.objective = GRPO(settings.loss, policy)
        self._means: dict[str, float] = {}
        self._past: list[dict[str, Any]] = []

    def items_per_group(self, num_generations: int) -> int:
        """The starts of a group, and of as many groups of earlier rollouts."""
        return num_generations * (1 + self.settings.replay)

    def branch(self) -> Sequence[tuple[int, int]]:
        """`suffixes` pictures per start."""
        suffixes = self.settings.suffixes
        return ((self.policy.num_steps, suffixes),) if suffixes > 1 else ()

    def learn(self, rollout: Rollout) -> Experience:
        """Advantages of starts; appends the last `replay` rollouts."""
        settings, count = self.settings, self.settings.suffixes
        rewards = rollout.total.view(-1, count).nanmean(1)
        prompts = [str(p.condition) for p in rollout.prompts[::count]]
        starts = replace(rollout.trajectory.index(slice(None, None, count)), images=None)
        groups = rollout.groups[::count]
        advantages = self._advantages(rewards, groups, prompts, starts)
        own = {
            "starts": starts,
            "conditions": [p.condition for p in rollout.prompts[::count]],
            "advantages": advantages,
            "returns": rewards,
            "old_logps": self._anchor(starts, rollout),
        }
        every = [own, *reversed(self._past)]
        size = len(rewards) // (int(groups.max()) + 1)
        joined = Trajectory.cat([entry["starts"] for entry in every])
        columns = {
            name: torch.cat([entry[name] for entry in every])
            for name in ("advantages", "returns", "old_logps")
        }
        useful = torch.cat(
            [informative(entry["advantages"], groups).to(rewards) for entry in every]
        )
        rows = torch.arange(len(joined), device=rewards.device).view(len(every), -1, size)
        missing = 1 + settings.replay - len(every)
        if missing:  # the first rollouts have no past: their own starts, with weight 0
            rows = torch.cat([rows, rows[:1].repeat(missing, 1, 1)])
        items = rows.transpose(0, 1).flatten()
        weights = useful[items].view(-1, 1 + settings.replay, size)
        weights[:, len(every) :] = 0
        if settings.replay:
            self._past = [*self._past, own][-settings.replay :]
        again = replace(
            rollout,
            trajectory=joined,
            groups=groups.repeat(len(every)),
            prompts=rollout.prompts[::count] * len(every),
            rewards=columns["returns"][:, None],
            weights=(1.0,),
            total=columns["returns"],
        )
        fresh = settings.anchor == "previous" and not settings.replay
        metrics = {"find/return": float(rewards.nanmean())}
        return Experience(
            again, items[:, None], weights.flatten(), columns, metrics, recompute=fresh
        )

    def losses(
        self, experience: Experience, examples: Int[Tensor, " n"], step: int, network: nn.Module
    ) -> Iterator[Loss]:
        """The clipped loss of some starts, and the value network's."""
        parts = self.objective.losses(experience, examples, step, network)
        for number, (loss, metrics) in enumerate(parts):
            if self.settings.baseline != "value" or number:
                yield loss, metrics
                continue
            rows = experience.items[examples, 0]
            conditions = experience.rollout.trajectory.index(rows).conditions
            value = network(conditions["rows"], conditions["features"])[2]
            returns = experience.columns["returns"][rows]
            errors = (value - torch.where(returns.isnan(), value.detach(), returns)).square()
            error = (errors * experience.weights[examples]).mean()
            metrics = {**metrics, "value_loss": float(error.detach())}
            yield loss + self.settings.value_weight * error, metrics

    # ---- what rewards are compared with ----------------------------------------------------------

    def _advantages(
        self, rewards: Tensor, groups: Tensor, prompts: list[str], starts: Trajectory
    ) -> Float[Tensor, " b"]:
        loss, settings = self.settings.loss, self.settings
        if settings.baseline == "group":
            options = {
                name: getattr(loss, name) for name in ("scale_rewards", "std_eps", "std_ddof")
            }
            found = group_advantages(rewards, groups, **options)
        elif settings.baseline == "value":
            with torch.no_grad():
                value = self.policy.network(
                    starts.conditions["rows"], starts.conditions["features"]
                )[2]
            found = (rewards - value).nan_to_num(0.0)
        else:
            known = [self._means.get(prompt) for prompt in prompts]
            means = [m if m is not None else float(rewards[groups == groups[i]].nanmean())
                     for i, m in enumerate(known)]  # fmt: skip
            found = (rewards - rewards.new_tensor(means)).nan_to_num(0.0)
            self._remember(rewards, groups, prompts)
        limit = loss.advantage_clip
        return found if limit is None else found.clamp(-limit, limit)

    def _remember(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> None:
        for group in range(int(groups.max()) + 1):
            rows = (groups == group).nonzero()[:, 0]
            mean = float(rewards[rows].nanmean())
            if mean != mean:
                continue
            prompt, decay = prompts[int(rows[0])], self.settings.ema_decay
            old = self._means.get(prompt, mean)
            self._means[prompt] = decay * old + (1 - decay) * mean

    def _anchor(self, starts: Trajectory, rollout: Rollout) -> Float[Tensor, "b u"]:
        if self.settings.anchor == "previous":
            return old_logps(replace(rollout, trajectory=starts))
        with torch.no_grad():
            found = self.policy.evaluate(starts).ref_logp
        assert found is not None
        return found

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for JSON."""
        past = [
            {
                "conditions": entry["conditions"],
                "actions": [a.tolist() for a in entry["starts"].actions],
                "integers": not entry["starts"].actions[0].is_floating_point(),
                "logps": [x.tolist() for x in entry["starts"].logps],
                **{k: entry[k].tolist() for k in ("advantages", "returns", "old_logps")},
            }
            for entry in self._past
        ]
        return {"means": self._means, "past": past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._means, self._past = dict(state["means"]), []
        device = next(self.policy.network.parameters()).device
        for saved in state["past"]:
            dtype = torch.long if saved["integers"] else torch.float32
            steps = self.policy.num_steps
            starts = Trajectory(
                kind=self.policy.kind,
                conditions=self.policy.encode(saved["conditions"]),
                actions=[torch.tensor(a, dtype=dtype, device=device) for a in saved["actions"]],
                logps=[torch.tensor(x, device=device) for x in saved["logps"]],
                stochastic=(True,) * steps,
                guidance=(1.0,) * steps,
                settings={},
            )
            columns = {
                k: torch.tensor(saved[k], device=device)
                for k in ("advantages", "returns", "old_logps")
            }
            self._past.append({"starts": starts, "conditions": saved["conditions"], **columns})
