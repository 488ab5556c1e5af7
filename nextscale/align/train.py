"""`nextscale align`: rollouts, rewards, a method's loss, on the loop that all trainers share.

What the loop's data are is in `tasks`, what is looked at on the way in `watcher`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale import processes, storage
from nextscale.align.config import METHOD_NAMES, AlignConfig
from nextscale.align.controlled import ControlledModel
from nextscale.align.methods import METHODS, Method
from nextscale.align.methods.dpo import DPO
from nextscale.align.methods.grpo import GRPO, TokenMask
from nextscale.align.models import AlignModel, open_model
from nextscale.align.prompts import open_prompts
from nextscale.align.report import Report, make_report
from nextscale.align.rewards import normalized, open_reward
from nextscale.align.rewards.control import consistency_reward
from nextscale.align.rewards.reward import AnyReward, CheckedReward, named
from nextscale.align.start_model import open_starts
from nextscale.align.tables import markdown
from nextscale.align.tasks import Offline, Online
from nextscale.align.trajectory import Policy
from nextscale.align.watcher import Watcher, hold_out
from nextscale.errors import UserError
from nextscale.training import FitResult, adamw, decay_groups, fit, latest_checkpoint
from nextscale.training.session import Stateful

logger = logging.getLogger(__name__)
_TUNING = "## Tuning"
_CONSISTENCY = "control_consistency"


@dataclass(frozen=True)
class AlignResult:
    """How a run ended.

    Attributes:
        fit: The result of the loop.
        report: What was measured before and after; None if it was switched off.
        kept: False if the reward did not rise, and the model was saved as it was.
        p_value: Of chance making such a rise; None: fewer than 20 rollouts, or not measured.
    """

    fit: FitResult
    report: Report | None
    kept: bool
    p_value: float | None


def align(
    config: AlignConfig,
    *,
    rewards: Mapping[str, Any] | None = None,
    token_mask: TokenMask | None = None,
    method: Callable[[Policy], Method] | None = None,
    progress: bool = True,
) -> AlignResult:
    """Tune a generator by rewards and save it in `output_dir/model`.

    Args:
        config: The run.
        rewards: Further rewards by name, functions f(images, prompts) as `as_reward` takes them; a
            name in `reward_funcs` or `held_out_rewards` means the one given here first. Those that
            are named nowhere are added to `reward_funcs`.
        token_mask: For GRPO: weights of tokens, from pictures and prompts.
        method: Your own method instead of `config.method`: a class derived from `Method`, or a
            function, that makes it for the policy that it is given.
        progress: Show bars.

    Raises:
        UserError: For settings that do not fit together, and, with exit code 1, if a reward or the
            training fails; the message names the last checkpoint.
    """
    _warn_of_unread(config)
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        return _align(config, rewards or {}, token_mask, method, progress)
    finally:
        state.destroy_process_group()


def _warn_of_unread(config: AlignConfig) -> None:
    """Settings of other methods than the run's do nothing."""
    for name in METHOD_NAMES:
        section = getattr(config, name)
        if name != config.method and section != type(section)():
            logger.warning(
                "settings of %s are given, by a flag or the recipe (%s), but the method is %s, "
                "which does not read them",
                *(name, ", ".join(_changed(section)), config.method),
            )


def _changed(section: Any) -> list[str]:
    usual = type(section)()
    return [f.name for f in fields(section) if getattr(section, f.name) != getattr(usual, f.name)]


def _align(
    config: AlignConfig,
    rewards: Mapping[str, Any],
    token_mask: TokenMask | None,
    own: Callable[[Policy], Method] | None,
    progress: bool,
) -> AlignResult:
    model = open_model(config)
    config = _with_prompts(config, model)
    if config.method == "find":
        model = open_starts(config, model)
    if isinstance(model, ControlledModel) and _CONSISTENCY in (
        *config.reward_funcs,
        *config.held_out_rewards,
    ):
        rewards = {_CONSISTENCY: consistency_reward(model.extractor), **rewards}
    train_rewards, held_out = _open_rewards(config, rewards)
    weights = config.reward_weights or (1.0,) * len(train_rewards)
    if own is not None and (isinstance(own, Method) or not callable(own)):
        raise UserError("method must be a class derived from Method, or a function of the policy")
    method = _open_method(config, model, token_mask) if own is None else own(model.policy)
    if not isinstance(method, Method):
        raise UserError(
            f"method makes {type(method).__name__}, which is not derived from "
            "nextscale.align.methods.Method; see docs/align.md"
        )
    modules: dict[str, nn.Module] = {"policy": model.policy.network}
    if method.needs_reference and (copy := model.add_reference()) is not None:
        modules["reference"] = copy
    task: Any = None
    if config.pairs is not None:  # whose lines are checked before they serve as prompts
        assert isinstance(method, DPO)
        task = Offline(config, model, method)
    prompts = open_prompts(config.prompts, num_classes=model.num_classes)
    weighed = list(zip(train_rewards, weights, strict=True))
    method.check(prompts, weighed, config.reward_mode)
    watched, prompts = hold_out(prompts, config.num_validation_prompts)
    watcher = Watcher(config, model, watched, train_rewards, weights, held_out)
    if task is None:
        task = Online(config, model, method, prompts, train_rewards, weights)
    config = replace(config, checkpointing_steps=task.checkpointing_steps)
    conditions = task.conditions()
    model.check(conditions)
    report = None
    if config.num_eval_prompts:
        report = make_report(config, model, train_rewards, held_out, progress=progress)
    watcher.before()
    began = {}
    if config.trend_p_value is not None and config.pairs is None:
        named_parameters = model.policy.network.named_parameters()
        began = {n: p.detach().cpu().clone() for n, p in named_parameters if p.requires_grad}
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
            state=_State(
                **{"monitor": watcher.monitor, "trend": task.trend, "method": method},
                **{"curriculum": task.curriculum, "lagrangian": task.lagrangian},
            ),
            progress=progress,
        )
    except UserError as error:
        last = latest_checkpoint(config.output_dir)
        if last is None or str(last) in str(error):
            raise
        message = f"{str(error).rstrip('.')}. Last checkpoint: {last}"
        raise UserError(message, exit_code=error.exit_code) from error
    task.check()
    final = result.modules["policy"]
    if "policy" in result.ema_modules:
        final.load_state_dict(result.ema_modules["policy"].state_dict())
    final.eval()
    p_value = task.trend.p_value()
    kept = p_value is None or config.trend_p_value is None or p_value <= config.trend_p_value
    trend: dict[str, Any] = {"p_value": p_value, "kept": kept}
    if not kept:
        moved = ""
        if report is not None:
            trend["kl_of_dropped"] = report.divergence(final)
            moved = ", {total:.2g} {unit} from the base,".format(**trend["kl_of_dropped"])
        logger.error(  # not only a warning: --quiet must not hide it
            "the reward did not rise over the rollouts (p = %.2g for chance): the model is saved "
            "as it was. The trained weights%s are in %s; trend_p_value None saves them",
            *(p_value, moved, result.checkpoint),
        )
        final.load_state_dict(began, strict=False)
    if processes.is_main():
        model.save(final, Path(config.output_dir) / "model")
    if report is not None:
        report.finish(final, result, trend=trend)
    if processes.is_main():
        _add_to_card(config, report)
    return AlignResult(result, report, kept, p_value)


def _add_to_card(config: AlignConfig, report: Report | None) -> None:
    """What the saved model was made of, beside what kind of model it is."""
    folder = Path(config.output_dir, "model")
    card = folder / "README.md"
    known = card.read_text(encoding="utf-8") if card.is_file() else ""
    is_folder = Path(config.model).is_dir()
    name = storage.short_name(config.model) if is_folder else config.model
    lines = [
        f"Tuned from `{name}` by `nextscale align --method {config.method}`.",
        f"Rewards: {', '.join(config.reward_funcs) or 'own functions or given pairs'}.",
        f"Prompts: {', '.join(config.prompts)}. Seed {config.seed}.",
    ]
    text = "\n".join([_TUNING, "", *lines, ""])
    if report is not None:
        text += f"\n{markdown(report.record)}"
    before = known.partition(_TUNING)[0].rstrip()  # of an earlier run, if it was tuned before
    storage.write_bytes(card, f"{before}\n\n{text}".lstrip().encode())


def _with_prompts(config: AlignConfig, model: AlignModel) -> AlignConfig:
    """What is drawn if nothing is said."""
    usual = "scenes:standard" if model.num_classes is None else "classes"
    if config.method == "seppo" and model.grammar == "scenes":
        usual = "examples:scenes"
    prompts = config.prompts or (config.pairs or usual,)
    if config.control is not None:
        prompts = config.prompts or ("images:scenes",)
        measured = tuple(f"{name.partition('@')[0]}@validation" for name in prompts)
    elif model.grammar == "scenes" and (config.method != "find" or config.find.amortised):
        measured = ("benchmark:standard",)
    else:
        measured = prompts
    return replace(config, prompts=prompts, eval_prompts=config.eval_prompts or measured)


class _State:
    """What has a state besides the weights, under one roof."""

    def __init__(self, **parts: Any) -> None:
        self.parts = {name: part for name, part in parts.items() if isinstance(part, Stateful)}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            if name in state:  # else the checkpoint is older than the part
                part.load_state_dict(state[name])


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
            f"{', '.join(names)}. A recipe's weights are for its own rewards: give "
            f"--reward_weights {' '.join('1' * len(names))}"
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
