"""What a run is watched by: the same few prompts, drawn again and again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from nextscale import processes
from nextscale.align.config import AlignConfig
from nextscale.align.models import AlignModel
from nextscale.align.prompts import Prompt
from nextscale.align.report import grid, score_all
from nextscale.align.rewards import HeldOutMonitor, combine
from nextscale.align.rewards.reward import AnyReward
from nextscale.training import latest_checkpoint

logger = logging.getLogger(__name__)
_PLENTY = 20  # times the watched prompts, from which on these are held out of training
_VALIDATION_SEED = 3_000_000_000  # apart from what users draw by hand, 0, 1, 2, ...


class Watcher:
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
        if held_out and self.rewards:
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
        conditions = [prompt.asked for prompt in self.prompts]
        seeds = list(range(_VALIDATION_SEED, _VALIDATION_SEED + len(conditions)))
        images = self.model.draw(network, conditions, seeds)
        columns = score_all([*self.rewards, *self.held_out], images, self.prompts)
        mode = self.config.reward_mode
        mode = "sum" if mode == "lagrangian" else mode  # by the weights that it began with
        total = combine(columns[:, : len(self.rewards)], self.weights, mode)
        values = {"reward": float(total.nanmean())} if self.rewards else {}
        for k, reward in enumerate(self.rewards):
            values[f"rewards/{reward.name}/mean"] = float(columns[:, k].nanmean())
        for k, reward in enumerate(self.held_out, len(self.rewards)):
            values[f"held_out/{reward.name}"] = float(columns[:, k].nanmean())
        # A reward may answer one process and not another; all of them must stop alike.
        values = processes.gather(values)[0]
        if processes.is_main():
            shown = total if self.rewards else None
            grid(self.config.output_dir, step, images, self.prompts, shown)
        return values


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to watch, and those to train on: the other texts, if there are plenty of them."""
    texts = isinstance(prompts[0].condition, str)
    if not texts or len(prompts) < _PLENTY * count:
        return prompts[:count], prompts
    watched = prompts[len(prompts) - count :]
    held_out = {prompt.condition for prompt in watched}
    return watched, [prompt for prompt in prompts if prompt.condition not in held_out]
