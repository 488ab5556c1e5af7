"""`nextscale align`: rollouts, rewards, a method's loss, on the loop that all trainers share.

The data of the loop is the current rollout: an epoch is a pass over its examples, and when
`num_iterations` of them are done, the next rollout is drawn with the weights as they are then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from nextscale import processes
from nextscale.align.config import AlignConfig
from nextscale.align.experience import Experience, collect, rollout_metrics, sample_streams
from nextscale.align.methods import METHODS, Method
from nextscale.align.methods.dpo import DPO
from nextscale.align.methods.grpo import GRPO, TokenMask
from nextscale.align.models import AlignModel, open_model
from nextscale.align.pairs import load_pairs, read_pairs
from nextscale.align.prompts import Prompt, draw_prompts, open_prompts
from nextscale.align.report import Report, grid, make_report, score_all
from nextscale.align.rewards import (
    HeldOutMonitor,
    RewardTrend,
    combine,
    normalized,
    open_reward,
)
from nextscale.align.rewards.reward import AnyReward, CheckedReward, PairwiseReward, named
from nextscale.align.start_model import open_starts
from nextscale.errors import UserError
from nextscale.training import FitResult, adamw, bare, decay_groups, fit, latest_checkpoint
from nextscale.training.batches import global_batch_size
from nextscale.training.session import Stateful, resolve_precision

logger = logging.getLogger(__name__)
_PLENTY = 20  # times the watched prompts, from which on these are held out of training
_VALIDATION_SEED = 3_000_000_000  # apart from what users draw by hand, 0, 1, 2, ...


@dataclass(frozen=True)
class AlignResult:
    """How a run ended.

    Attributes:
        fit: The result of the loop.
        report: What was measured before and after; None if it was switched off.
        kept: False if the reward did not rise, and the model was saved as it was.
    """

    fit: FitResult
    report: Report | None
    kept: bool


def align(
    config: AlignConfig,
    *,
    rewards: Mapping[str, Any] | None = None,
    token_mask: TokenMask | None = None,
    progress: bool = True,
) -> AlignResult:
    """Tune a generator by rewards and save it in `output_dir/model`.

    Args:
        config: The run.
        rewards: Further rewards by name, functions f(images, prompts) as `as_reward` takes them; a
            name in `reward_funcs` or `held_out_rewards` means the one given here first. Those that
            are named nowhere are added to `reward_funcs`.
        token_mask: For GRPO: weights of tokens, from pictures and prompts.
        progress: Show bars.

    Raises:
        UserError: For settings that do not fit together, and, with exit code 1, if a reward or the
            training fails; the message names the last checkpoint.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        return _align(config, rewards or {}, token_mask, progress)
    finally:
        state.destroy_process_group()


def _align(
    config: AlignConfig,
    rewards: Mapping[str, Any],
    token_mask: TokenMask | None,
    progress: bool,
) -> AlignResult:
    model = open_model(config)
    if config.method == "find":
        model = open_starts(config, model)
    train_rewards, held_out = _open_rewards(config, rewards)
    weights = config.reward_weights or (1.0,) * len(train_rewards)
    method = _open_method(config, model, token_mask)
    modules: dict[str, nn.Module] = {"policy": model.policy.network}
    if method.needs_reference and (copy := model.add_reference()) is not None:
        modules["reference"] = copy
    prompts = open_prompts(config.prompts, num_classes=model.num_classes)
    watched, prompts = _hold_out(prompts, config.num_validation_prompts)
    watcher = _Watcher(config, model, watched, train_rewards, weights, held_out)
    if config.pairs is None:
        task: Any = _Online(config, model, method, prompts, train_rewards, weights)
    else:
        assert isinstance(method, DPO)
        task = _Offline(config, model, method)
    conditions = task.conditions()
    model.check(conditions)
    report = None
    if config.num_eval_prompts:
        report = make_report(config, model, train_rewards, held_out, progress=progress)
    watcher.before()
    trained = [(n, p) for n, p in model.policy.network.named_parameters() if p.requires_grad]
    began = {name: parameter.detach().cpu().clone() for name, parameter in trained}
    try:
        result = fit(
            config,
            modules=modules,
            optimizers={"policy": _optimizer(model.policy.network, config)},
            load_batch=task.load_batch,
            dataset_size=task.size,
            losses=task.losses,
            validate=watcher.validate if config.num_validation_prompts else None,
            stop=watcher.stop,
            state=_State(monitor=watcher.monitor, trend=task.trend, method=method),
            progress=progress,
        )
    except UserError as error:
        last = latest_checkpoint(config.output_dir)
        if last is None or str(last) in str(error):
            raise
        message = f"{str(error).rstrip('.')}. Last checkpoint: {last}"
        raise UserError(message, exit_code=error.exit_code) from error
    final = result.modules["policy"]
    if "policy" in result.ema_modules:
        final.load_state_dict(result.ema_modules["policy"].state_dict())
    final.eval()
    p_value = task.trend.p_value()
    kept = p_value is None or config.trend_p_value is None or p_value <= config.trend_p_value
    if not kept:
        logger.warning(
            "the reward did not rise over the rollouts (p = %.2g for chance): the model is saved "
            "as it was. The trained weights are in %s; trend_p_value none saves them",
            *(p_value, result.checkpoint),
        )
        final.load_state_dict(began, strict=False)
    if processes.is_main():
        model.save(final, Path(config.output_dir) / "model")
    if report is not None:
        report.finish(final, result, trend={"p_value": p_value, "kept": kept})
    return AlignResult(result, report, kept)


class _State:
    """What has a state besides the weights, under one roof."""

    def __init__(self, **parts: Any) -> None:
        self.parts = {name: part for name, part in parts.items() if isinstance(part, Stateful)}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Online:
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
                f"{processes.world_size()} processes) does not divide; choose divisors of "
                f"{self.size}"
            )
        self.steps = config.num_iterations * self.size // batch
        every = config.checkpointing_steps
        if every is not None and every % self.steps:
            raise UserError(
                f"checkpointing_steps {every} lies within a rollout of {self.steps} steps, which "
                f"a resumed run could not go on with; use a multiple of {self.steps}"
            )
        self.number, self.experience = -1, None
        self.trend = RewardTrend()

    def conditions(self) -> list[str | int]:
        """Everything that rollouts may draw."""
        return [prompt.condition for prompt in self.prompts]

    def load_batch(self, indices: np.ndarray, step: int) -> Int[Tensor, " b"]:
        """Examples of the rollout of this step."""
        return torch.from_numpy(indices)

    def losses(
        self, modules: Mapping[str, nn.Module], batch: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        """The method's loss of some examples; draws the rollout that they belong to."""
        if self.number != step // self.steps:
            self.number = step // self.steps
            self.experience = None  # free the old one first
            self.experience = self._draw(step, modules["policy"])
        assert self.experience is not None
        metrics = self.experience.metrics
        parts = self.method.losses(self.experience, batch, step, modules["policy"])
        for loss, values in parts:
            yield "policy", loss, {**metrics, **values}
            metrics = {}

    def _draw(self, step: int, network: nn.Module) -> Experience:
        config = self.config
        prompts = draw_prompts(self.prompts, config.num_prompts, config.seed, self.number)
        rollout = collect(
            self.model.policy,
            self.rewards,
            prompts,
            config.num_generations,
            (config.seed, self.number),
            weights=self.weights,
            mode=config.reward_mode,
            branch=self.method.branch(),
            model_version=step,
        )
        metrics = rollout_metrics(rollout)
        if not any(isinstance(reward, PairwiseReward) for reward in self.rewards):
            self.trend.update(metrics["reward"])  # the mean of comparisons never moves
        with torch.no_grad():
            experience = self._kept(self.method.learn(rollout))
            experience = self._old_logps(experience, network)
        return replace(experience, metrics={**metrics, **experience.metrics})

    def _kept(self, experience: Experience) -> Experience:
        """The groups to train on: those with a signal first, then in the order of drawing."""
        useful = experience.weights.view(-1, self.each).amax(1) > 0
        order = torch.argsort(useful.logical_not().long(), stable=True)[: self.groups]
        rows = (order[:, None] * self.each + torch.arange(self.each, device=order.device)).flatten()
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
                judged = self.model.policy.evaluate(part, network=bare(network))
                parts.append(judged.logp.detach())
        columns["old_logps"] = torch.cat(parts)
        return replace(experience, columns=columns)


class _Offline:
    """Given pairs as the data of the loop."""

    def __init__(self, config: AlignConfig, model: AlignModel, method: DPO) -> None:
        assert config.pairs is not None
        self.config, self.model, self.method = config, model, method
        self.pairs = read_pairs(config.pairs, num_classes=model.num_classes)
        self.size = len(self.pairs)
        self.resolution = model.resolution
        self.trend = RewardTrend()  # given pairs have no rollouts

    def conditions(self) -> list[str | int]:
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
        conditions = policy.encode([*batch["conditions"], *batch["conditions"]])
        trajectory = policy.trajectory_of(batch["images"], conditions)
        rows = batch["rows"].tolist() * 2
        generators = sample_streams((self.config.seed, step), rows)
        loss, metrics = self.method.pair_loss(trajectory, generators, modules["policy"])
        yield "policy", loss, metrics


class _Watcher:
    """Draws the same few prompts again and again: a grid to look at, rewards, the early stop."""

    def __init__(
        self,
        config: AlignConfig,
        model: AlignModel,
        prompts: Sequence[Prompt],
        rewards: Sequence[AnyReward],
        weights: Sequence[float],
        held_out: Sequence[AnyReward],
    ) -> None:
        self.config, self.model = config, model
        self.prompts = list(prompts)
        self.rewards, self.weights, self.held_out = rewards, weights, held_out
        least = min(2, max(1, len(held_out)))
        self.monitor = HeldOutMonitor(config.held_out_patience, least)
        self._stop = False
        steps = config.max_train_steps or 0
        every = config.validation_steps or steps
        seen = steps // every if every and config.num_validation_prompts else 0
        if held_out and seen < config.held_out_patience:
            logger.warning(
                "held_out_rewards are measured %d times in this run and can stop it after %d; set "
                "validation_steps to %d or less",
                *(seen, config.held_out_patience),
                steps // config.held_out_patience,
            )

    def before(self) -> None:
        """The grid of the model as it came, and the first rewards; not in a resumed run."""
        if self.config.num_validation_prompts and latest_checkpoint(self.config.output_dir) is None:
            self._watch(self.model.policy.network, 0)

    def validate(self, modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        """Rewards and a grid by the current weights."""
        return self._watch(modules["policy"], step)

    def _watch(self, network: nn.Module, step: int) -> dict[str, float]:
        values = self._measure(network, step)
        held_out = {r.name: values[f"held_out/{r.name}"] for r in self.held_out}
        if held_out:
            self._stop = self.monitor.update(values["reward"], held_out)
        return values

    def stop(self) -> bool:
        """Whether the held-out rewards say that the reward is being gamed."""
        if self._stop:
            logger.warning(
                "stopped: the reward rises while the held-out rewards (%s) fall",
                ", ".join(r.name for r in self.held_out),
            )
        return self._stop

    def _measure(self, network: nn.Module, step: int) -> dict[str, float]:
        conditions = [prompt.condition for prompt in self.prompts]
        seeds = list(range(_VALIDATION_SEED, _VALIDATION_SEED + len(conditions)))
        images = self.model.draw(network, conditions, seeds)
        columns = score_all([*self.rewards, *self.held_out], images, self.prompts)
        total = combine(columns[:, : len(self.rewards)], self.weights, self.config.reward_mode)
        values = {"reward": float(total.nanmean())}
        for k, reward in enumerate(self.rewards):
            values[f"rewards/{reward.name}/mean"] = float(columns[:, k].nanmean())
        for k, reward in enumerate(self.held_out, len(self.rewards)):
            values[f"held_out/{reward.name}"] = float(columns[:, k].nanmean())
        if processes.is_main():
            grid(self.config.output_dir, step, images, self.prompts, total)
        return values


def _open_rewards(
    config: AlignConfig, given: Mapping[str, Any]
) -> tuple[list[AnyReward], list[AnyReward]]:
    """Rewards to train by, and those that are only watched."""
    own = {name: named(function, name) for name, function in given.items()}
    asked = {*config.reward_funcs, *config.held_out_rewards}
    names = [*config.reward_funcs, *(name for name in own if name not in asked)]
    device = f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu"

    every = [*names, *config.held_out_rewards]
    if twice := [name for name in every if every.count(name) > 1]:
        raise UserError(
            f'the reward "{twice[0]}" is named twice in reward_funcs and held_out_rewards'
        )
    kinds = [name.partition(":")[0] for name in every]
    options: dict[str, Any] = {"device": device, "download": config.download}
    options |= {"timeout": config.http_timeout, "retries": config.http_retries}

    def opened(name: str) -> AnyReward:
        if name in own:
            return own[name]
        reward = open_reward(name, **options)
        return named(reward, name) if kinds.count(name.partition(":")[0]) > 1 else reward

    if not names and config.pairs is None:
        raise UserError('reward_funcs is empty; name a reward, for example "checker"')
    given_weights = len(config.reward_weights)
    if given_weights and given_weights != len(names):
        raise UserError(
            f"reward_weights has {given_weights} numbers for {len(names)} rewards: "
            f"{', '.join(names)}"
        )
    given_scales = len(config.reward_scales)
    if given_scales and given_scales != len(names):
        raise UserError(
            f"reward_scales has {given_scales} numbers for {len(names)} rewards: {', '.join(names)}"
        )
    trained = [opened(name) for name in names]
    scales = config.reward_scales or (1.0,) * len(names)
    trained = [_scaled(reward, scale) for reward, scale in zip(trained, scales, strict=True)]
    return trained, [opened(name) for name in config.held_out_rewards]


def _scaled(reward: AnyReward, scale: float) -> AnyReward:
    if scale == 1:
        return reward
    if not isinstance(reward, CheckedReward):
        raise UserError(
            f'reward_scales: the reward "{reward.name}" is none of single pictures; give it the '
            "scale 1 and a weight"
        )
    return normalized(reward, scale)


def _hold_out(prompts: Sequence[Prompt], count: int) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to watch, and those to train on: the other texts, if there are plenty of them."""
    texts = isinstance(prompts[0].condition, str)
    if not texts or len(prompts) < _PLENTY * count:
        return prompts[:count], prompts
    watched = prompts[len(prompts) - count :]
    held_out = {prompt.condition for prompt in watched}
    return watched, [prompt for prompt in prompts if prompt.condition not in held_out]


def _open_method(
    config: AlignConfig,
    model: AlignModel,
    token_mask: TokenMask | None,
) -> Method:
    settings = getattr(config, config.method)
    if token_mask is not None:
        if config.method != "grpo":
            raise UserError(f"token_mask is for method grpo, not {config.method}")
        return GRPO(settings, model.policy, token_mask)
    return METHODS[config.method](settings, model.policy)


def _optimizer(network: nn.Module, config: AlignConfig) -> torch.optim.Optimizer:
    return adamw(decay_groups(network.named_parameters()), config)
