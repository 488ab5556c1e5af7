"""The data of the training loop: rollouts, or given pairs.

The data are the current rollout: an epoch is a pass over its examples, and when `num_iterations` of
them are done, the next rollout is drawn with the weights as they are then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale import processes
from nextscale.align.config import AlignConfig
from nextscale.align.curriculum import Curriculum
from nextscale.align.experience import (
    Experience,
    Rollout,
    collect,
    rollout_metrics,
    sample_streams,
)
from nextscale.align.methods import Method
from nextscale.align.methods.dpo import DPO
from nextscale.align.models import AlignModel
from nextscale.align.pairs import load_pairs, read_pairs
from nextscale.align.prompts import Condition, Prompt, draw_prompts
from nextscale.align.rewards import RewardTrend
from nextscale.align.rewards.distribution import warn_of_small_sets
from nextscale.align.rewards.lagrangian import Lagrangian
from nextscale.align.rewards.reward import AnyReward, PairwiseReward
from nextscale.align.trajectory import Trajectory
from nextscale.errors import UserError
from nextscale.training import bare
from nextscale.training.batches import global_batch_size
from nextscale.training.session import resolve_precision

logger = logging.getLogger(__name__)


class Online:
    """Rollouts as the data of the loop."""

    def __init__(
        self,
        config: AlignConfig,
        model: AlignModel,
        method: Method,
        prompts: Sequence[Prompt],
        rewards: Sequence[AnyReward],
        weights: Sequence[float],
    ) -> None:
        self.config, self.model, self.method = config, model, method
        self.prompts, self.rewards, self.weights = prompts, rewards, weights
        self.each = method.items_per_group(config.num_generations)
        self.groups = config.num_train_prompts or config.num_prompts
        self.size = self.groups * self.each
        batch = global_batch_size(config, processes.world_size())
        if self.size % batch:
            raise UserError(
                f"a rollout gives {self.size} examples ({self.groups} groups of {self.each}), "
                f"which {batch} per step (train_batch_size {config.train_batch_size} x "
                f"gradient_accumulation_steps {config.gradient_accumulation_steps} x "
                f"{processes.world_size()} processes) does not divide; {self._advice()}"
            )
        self.steps = config.num_iterations * self.size // batch
        leaves = math.prod(siblings for _, siblings in method.branch())
        pictures = config.num_prompts * config.num_generations * leaves
        for reward, weight in zip(rewards, weights, strict=True):
            if weight:
                warn_of_small_sets(reward, pictures // 2 if config.method == "dragon" else pictures)
        every = config.checkpointing_steps
        self.checkpointing_steps = every and math.ceil(every / self.steps) * self.steps
        self.number, self.experience, self.scored, self.warned = -1, None, False, False
        self.trend = RewardTrend()
        self.curriculum = self.lagrangian = None
        if config.curriculum is not None:
            self.curriculum = Curriculum(prompts, temperature=config.curriculum_temperature)
        if config.reward_mode == "lagrangian":
            self.lagrangian = Lagrangian(weights, config.reward_thresholds, config.lagrangian_rate)

    def _advice(self) -> str:
        for steps in range(self.config.gradient_accumulation_steps, 0, -1):
            at_once = self.config.train_batch_size * steps * processes.world_size()
            if self.size % at_once == 0:
                return f"with gradient_accumulation_steps {steps} it does"
        share = self.size // processes.world_size()
        if self.size % processes.world_size():
            return f"choose divisors of {self.size}"
        most = max(n for n in range(1, self.config.train_batch_size + 1) if share % n == 0)
        return f"with train_batch_size {most} and gradient_accumulation_steps 1 it does"

    def check(self) -> None:
        """Refuse a run that no reward has taught anything.

        Raises:
            UserError: With exit code 1, if no sample of its rollouts could be scored.
        """
        if self.number >= 0 and not self.scored and self.method.needs_rewards:
            raise UserError(
                "the rewards could score no sample of any rollout: nothing was trained, nothing is "
                "saved. Check that the prompts and metadata are what they read",
                exit_code=1,
            )

    def conditions(self) -> list[Condition]:
        """Everything that rollouts may draw."""
        return [prompt.asked for prompt in self.prompts]

    def load_batch(self, indices: np.ndarray, step: int) -> Int[Tensor, " b"]:
        """Examples of the rollout of this step."""
        return torch.from_numpy(indices)

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        """The method's loss of some examples; draws the rollout that they belong to."""
        bare(modules["policy"]).eval()  # also where the backward pass computes activations again
        if self.number != step // self.steps:
            if self.number < 0 and step % self.steps:
                logger.warning(
                    "the checkpoint lies within a rollout, which is drawn again by newer weights: "
                    "from here on the run differs from one that was never stopped"
                )
            self.number = step // self.steps
            self.experience = None  # free the old one first
            self.experience = self._draw(step, modules["policy"])
        assert self.experience is not None
        metrics = self.experience.metrics
        parts = self.method.losses(self.experience, batch, step, modules["policy"])
        for loss, values in _checked(self.method, parts):
            yield "policy", loss, {**metrics, **values}
            metrics = {}

    def _draw(self, step: int, network: nn.Module) -> Experience:
        config = self.config
        draw = (config.num_prompts, config.seed, self.number)
        if self.curriculum is None:
            prompts = draw_prompts(self.prompts, *draw)
        else:
            prompts = self.curriculum.draw(*draw)
        weights = self.weights if self.lagrangian is None else self.lagrangian.weights
        rollout = collect(
            self.model.policy,
            self.rewards,
            prompts,
            config.num_generations,
            (config.seed, self.number),
            weights=tuple(weights),
            mode="sum" if self.lagrangian is not None else config.reward_mode,
            branch=self.method.branch(),
            model_version=step,
        )
        self.scored |= bool((~rollout.total.isnan()).any())
        metrics = rollout_metrics(rollout)
        counted = [r for w, r in zip(self.weights, self.rewards, strict=True) if w]
        fixed = self.lagrangian is None  # else the sum has another meaning in every rollout
        compared = any(isinstance(reward, PairwiseReward) for reward in counted)
        if fixed and not compared and self.method.needs_rewards:
            self.trend.update(self.number, metrics["reward"])  # the mean of comparisons never moves
        metrics |= self._adapt(rollout, metrics)
        with torch.no_grad():
            experience = self.method.learn(rollout)
            _check_experience(self.method, experience, self.config.num_prompts * self.each)
            experience = self._kept(experience)
            experience = self._old_logps(experience, network)
        return replace(experience, metrics={**metrics, **experience.metrics})

    def _adapt(self, rollout: Rollout, metrics: Mapping[str, float]) -> dict[str, float]:
        """Move the curriculum and the multipliers by what this rollout gave."""
        shown: dict[str, float] = {}
        if self.lagrangian is not None:
            names = [reward.name for reward in rollout.scored_by]
            shown |= {f"lagrangian/{n}": w for n, w in zip(names, rollout.weights, strict=True)}
            self.lagrangian.update([metrics[f"rewards/{name}/mean"] for name in names])
        if self.curriculum is not None:
            names = list(self.curriculum.sources)
            shares = self.curriculum.probabilities().tolist()
            shown |= {f"curriculum/{n}": p for n, p in zip(names, shares, strict=True)}
            total = rollout.total.view(int(rollout.groups.max()) + 1, -1)
            gains = (total - total.nanmean(1, keepdim=True)).abs().nanmean(1)
            firsts = rollout.prompts[:: total.shape[1]]
            self.curriculum.update(firsts, gains.tolist())
        return shown

    def _kept(self, experience: Experience) -> Experience:
        """The groups to train on: those with a signal first, then in the order of drawing."""
        useful = experience.weights.view(-1, self.each).amax(1) > 0
        order = torch.argsort(useful.logical_not().long(), stable=True)[: self.groups]
        rows = (order[:, None] * self.each + torch.arange(self.each, device=order.device)).flatten()
        if not bool(useful.any()) and not self.warned:
            self.warned = True
            logger.warning(
                "none of the %d groups of a rollout teaches anything: rewards, or what the method "
                "makes of them, do not differ within any. Choose other prompts, a finer reward, "
                "other settings of the method, or more varied samples",
                len(useful),
            )
        shown = {"groups/useful": float(useful.float().mean())}
        return replace(
            experience,
            items=experience.items[rows],
            weights=experience.weights[rows],
            metrics={**experience.metrics, **shown},
        )

    def _old_logps(self, experience: Experience, network: nn.Module) -> Experience:
        """Log-probabilities of the rollout as training computes them.

        Sampling with a cache and judging in one pass round differently, in bfloat16 by percents:
        the first ratio would not be 1.
        """
        wanted = self.config.recompute_old_logps
        known = "old_logps" in experience.columns and experience.recompute
        if not known or wanted is False:
            return experience
        if wanted is None and resolve_precision(self.config.mixed_precision) == "no":
            return experience
        columns = dict(experience.columns)
        if self.steps == 1:  # the first judgement is the only one
            del columns["old_logps"]
            return replace(experience, columns=columns)
        trajectory, size = experience.rollout.trajectory, self.config.train_batch_size
        parts = []
        with torch.enable_grad():  # the same kernels as in training
            for start in range(0, len(trajectory), size):
                part = trajectory.index(slice(start, start + size))
                parts.append(self._judged(part, bare(network)))
        columns["old_logps"] = torch.cat(parts)
        return replace(experience, columns=columns)

    def _judged(self, part: Trajectory, network: nn.Module) -> Tensor:
        """[b, U]; denoising steps one by one, so that the graph of a single one is in memory."""
        policy = self.model.policy
        gaussian = policy.kind == "gaussian"
        chunks = [[step] for step in range(policy.num_steps)] if gaussian else [None]
        found = [policy.evaluate(part, chunk, network=network).logp.detach() for chunk in chunks]
        return torch.cat(found, dim=1)


def _check_experience(method: Method, found: Any, rows: int) -> None:
    """What `learn` of someone's own method returned.

    Raises:
        UserError: Says what it must be.
    """
    name = f"{type(method).__name__}.learn"
    if not isinstance(found, Experience):
        raise UserError(f"{name} returns a {type(found).__name__}; it must return an Experience")
    if found.items.ndim != 2 or len(found.items) != rows or found.weights.shape != (rows,):
        raise UserError(
            f"{name}: items {list(found.items.shape)}, weights {list(found.weights.shape)}; they "
            f"must be [{rows}, k] and [{rows}], items_per_group rows for every group of the rollout"
        )


def _checked(method: Method, parts: Any) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """What `losses` yields, checked."""
    name, empty = f"{type(method).__name__}.losses", True
    if not isinstance(parts, Iterator):
        raise UserError(f"{name} returns a {type(parts).__name__}; it must yield (loss, metrics)")
    for part in parts:
        empty = False
        pair = isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Tensor)
        if not pair or not isinstance(part[1], Mapping):
            raise UserError(f"{name} yields {type(part).__name__}; it must yield (loss, metrics)")
        if part[0].ndim or not part[0].requires_grad:
            how = "has no gradient" if not part[0].ndim else f"has shape {list(part[0].shape)}"
            raise UserError(f"{name}: a loss {how}; it must be one number with a gradient")
        yield part
    if empty:
        raise UserError(f"{name} yields nothing; it must yield (loss, metrics)")


class Offline:
    """Given pairs as the data of the loop."""

    def __init__(self, config: AlignConfig, model: AlignModel, method: DPO) -> None:
        assert config.pairs is not None
        self.config, self.model, self.method = config, model, method
        self.pairs = read_pairs(config.pairs, num_classes=model.num_classes)
        self.size = len(self.pairs)
        self.resolution = model.resolution
        self.trend = RewardTrend()  # given pairs have no rollouts
        self.curriculum = self.lagrangian = None
        self.checkpointing_steps = config.checkpointing_steps

    def check(self) -> None:
        """Given pairs always teach."""

    def conditions(self) -> list[Condition]:
        """Those of all pairs."""
        return [pair.condition for pair in self.pairs]

    def load_batch(self, indices: np.ndarray, step: int) -> dict[str, Any]:
        """Pictures and conditions of some pairs."""
        return load_pairs(self.pairs, indices, self.resolution)

    def losses(
        self, modules: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        """The preference loss of some pairs."""
        policy = self.model.policy
        bare(modules["policy"]).eval()
        conditions = policy.encode([*batch["conditions"], *batch["conditions"]])
        trajectory = policy.trajectory_of(batch["images"], conditions)
        rows = batch["rows"].tolist() * 2
        generators = sample_streams((self.config.seed, step), rows)
        loss, metrics = self.method.pair_loss(trajectory, generators, modules["policy"])
        yield "policy", loss, metrics
