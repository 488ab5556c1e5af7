"""What a reward is: a function of pictures and prompts, checked where its values come in."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.errors import UserError
from nextscale.eval.scorers import Scorer

logger = logging.getLogger(__name__)

Prompts = Sequence[str | int]
Metadata = Sequence[Mapping[str, Any]]
Range = tuple[float, float]
UNBOUNDED: Range = (-math.inf, math.inf)
_ENOUGH = 8  # samples of a call from which equal rewards are no accident


@dataclass(frozen=True)
class RewardOutput:
    """What a reward says of B pictures.

    Attributes:
        values: float32 [B], higher is better, NaN: unscorable.
        extra: Further columns [B] for the log alone, such as one per kind of statement.
    """

    values: Float[Tensor, " b"]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Scores pictures one by one.

    Attributes:
        name: What the log and the messages call it.
        range: Lowest and highest value that it can have.
        needs_prompt: Whether the value depends on the prompt.
        differentiable: Whether gradients reach the pictures.
    """

    name: str
    range: Range
    needs_prompt: bool
    differentiable: bool

    def __call__(
        self, images: Float[Tensor, "b 3 h w"], prompts: Prompts, metadata: Metadata
    ) -> RewardOutput:
        """Score pictures in [0, 1] made for prompts or class labels."""
        ...


@runtime_checkable
class SetReward(Protocol):
    """Scores pictures together, by their features.

    A run on several processes computes `features` on each, gathers them, and calls the other two
    on all rows.

    Attributes:
        name: What the log and the messages call it.
    """

    name: str

    def features(self, images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Float[Tensor, "b d"]:
        """Features of pictures in [0, 1]."""
        ...

    def score_set(self, features: Float[Tensor, "n d"]) -> float:
        """How good the set is, higher is better."""
        ...

    def contributions(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """How much worse the set's score is without each of its rows, float64."""
        ...


@runtime_checkable
class PairwiseReward(Protocol):
    """Compares pictures of one prompt with each other.

    Attributes:
        name: What the log and the messages call it.
    """

    name: str

    def compare(self, images: Float[Tensor, "n 3 h w"], prompts: Prompts) -> Float[Tensor, "n n"]:
        """P(picture i is preferred to picture j); the diagonal does not count."""
        ...


AnyReward = Reward | SetReward | PairwiseReward


class CheckedReward:
    """A function as a reward; made by `as_reward`."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        range: Range,
        needs_prompt: bool,
        differentiable: bool,
    ) -> None:
        self.function, self.name, self.range = function, name, range
        self.needs_prompt, self.differentiable = needs_prompt, differentiable
        self._takes_metadata = _takes_metadata(function, name)
        self._warned = False

    def __call__(
        self, images: Float[Tensor, "b 3 h w"], prompts: Prompts, metadata: Metadata = ()
    ) -> RewardOutput:
        """Call the function and check what comes back.

        Raises:
            UserError: With exit code 1, if it raises, or returns anything but B finite numbers or
                NaNs.
        """
        if len(prompts) != len(images):
            raise UserError(
                f'the reward "{self.name}" needs one prompt per picture, got {len(prompts)} '
                f"prompts and {len(images)} pictures"
            )
        given = (images, prompts, metadata) if self._takes_metadata else (images, prompts)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            found = call(self.name, self.function, *given)
        told = isinstance(found, RewardOutput)
        values = self._column(found.values if told else found, images, "values")
        self._warn_of_constant(values.detach())
        columns = found.extra if told else {}
        extra = {k: self._column(v, images, f"extra {k}") for k, v in columns.items()}
        return RewardOutput(values, extra)

    def _column(self, values: Any, images: Tensor, what: str) -> Float[Tensor, " b"]:
        """Anything as float32 [B] on the pictures' device."""
        try:
            if not isinstance(values, Tensor):
                numbers = [math.nan if value is None else float(value) for value in values]
                values = torch.tensor(numbers, dtype=torch.float32)
            column = values.to(images.device, torch.float32)
        except (TypeError, ValueError) as error:
            raise self._failed(
                f"returned {what} that are no numbers ({_first_line(error)}). Return a tensor [B] "
                "or a list of floats, None for what it cannot score"
            ) from error
        if column.shape != (len(images),):
            raise self._failed(
                f"returned {what} of shape {list(column.shape)} for {len(images)} pictures. Return "
                f"one number per picture, [{len(images)}]"
            )
        if bool(column.isinf().any()):
            raise self._failed(f"returned infinite {what}. Clamp them, or return NaN")
        return column

    def _warn_of_constant(self, values: Tensor) -> None:
        valid = values[~values.isnan()]
        if self._warned or len(values) < _ENOUGH or 0 < len(valid) < _ENOUGH:
            return
        if not len(valid):
            problem = f'the reward "%s" could score none of {len(values)} pictures: check that '
            logger.warning(problem + "its prompts and metadata are what it reads", self.name)
        elif bool((valid == valid[0]).all()):
            logger.warning(
                'the reward "%s" is %g for all %d pictures of a call. Where it is to be learnt '
                "this teaches nothing: choose other prompts, a finer reward, or varied samples",
                *(self.name, float(valid[0]), len(valid)),
            )
        else:
            return
        self._warned = True

    def _failed(self, how: str) -> UserError:
        return UserError(f'the reward "{self.name}" {how}.', exit_code=1)


def as_reward(
    function: Callable[..., Any],
    name: str | None = None,
    *,
    range: Range | None = None,
    needs_prompt: bool | None = None,
    differentiable: bool | None = None,
) -> CheckedReward:
    """Make a reward of a function, and check its results from then on.

    A reward that is constant over 8 samples or more of a call, or scores none of them, is warned
    of once.

    Args:
        function: f(images, prompts) or f(images, prompts, metadata): images float [B, 3, H, W] in
            [0, 1], prompts a sequence of B texts or class labels, metadata one mapping per sample.
            It returns a RewardOutput, a tensor [B], or a list of floats (None: unscorable). Or an
            object that is a `Reward` already, whose attributes hold where none are given.
        name: What to call it; None: the function's own name.
        range: Lowest and highest value; None: unbounded.
        needs_prompt: Whether the value depends on the prompt; None: yes.
        differentiable: Whether gradients reach the pictures; None: no, and none are kept.

    Raises:
        UserError: For something that cannot be called in this way.
    """
    if isinstance(function, CheckedReward) and name in (None, function.name):
        return function
    name = name or getattr(function, "name", None) or getattr(function, "__name__", "unnamed")
    if not callable(function):
        hint = f'; open_reward("{function}") opens one by name' if isinstance(function, str) else ""
        kind = type(function).__name__
        raise UserError(f'the reward "{name}" is a {kind}, not a function{hint}')

    def choose(given: Any, attribute: str, default: Any) -> Any:
        return getattr(function, attribute, default) if given is None else given

    return CheckedReward(
        function,
        str(name),
        range=choose(range, "range", UNBOUNDED),
        needs_prompt=choose(needs_prompt, "needs_prompt", True),
        differentiable=choose(differentiable, "differentiable", False),
    )


def named(reward: Any, name: str) -> AnyReward:
    """A reward, or a function as `as_reward` takes it, under a name of its own."""
    if not isinstance(reward, SetReward | PairwiseReward):
        return as_reward(reward, name)
    other = copy.copy(reward)
    object.__setattr__(other, "name", name)
    return other


def scorer_reward(
    scorer: Scorer, name: str, *, range: Range = UNBOUNDED, needs_prompt: bool = True
) -> CheckedReward:
    """Make a reward of a scorer of `nextscale.eval`, whose prompts are texts."""

    def score(images: Tensor, prompts: Prompts) -> Tensor:
        return scorer(images, texts(prompts, name) if needs_prompt else [str(p) for p in prompts])

    return as_reward(score, name, range=range, needs_prompt=needs_prompt)


def texts(prompts: Prompts, name: str) -> list[str]:
    """Prompts that must be texts.

    Raises:
        UserError: For class labels.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(
                f'the reward "{name}" reads prompts, got the class label {prompt}. Train a model '
                "of captions, or choose a reward of pictures or classes"
            )
    return [str(prompt) for prompt in prompts]


def call(name: str, function: Callable[..., Any], *given: Any) -> Any:
    """Call a part of someone's reward.

    Raises:
        UserError: With exit code 1 and one line that names the reward, whatever it raises.
    """
    try:
        return function(*given)
    except UserError:
        raise
    except Exception as error:  # someone else's code: it may raise anything
        raise UserError(
            f'the reward "{name}" raised {type(error).__name__}: {_first_line(error)}. Call it on '
            "a few pictures by hand, or return NaN for those that it cannot score.",
            exit_code=1,
        ) from error


def numbers(name: str, values: Any, shape: Sequence[int | None], what: str) -> Tensor:
    """A tensor of what someone's code returned.

    Args:
        name: Of the code.
        values: What it returned.
        shape: What it must have; None: any size.
        what: The same in words.

    Raises:
        UserError: With exit code 1, for anything else.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} must return {what}; got a {type(values).__name__} ({_first_line(error)})",
            exit_code=1,
        ) from error
    sizes = list(found.shape)
    if len(sizes) != len(shape) or any(
        n not in (None, own) for n, own in zip(shape, sizes, strict=True)
    ):
        raise UserError(f"{name} must return {what}; got the shape {sizes}", exit_code=1)
    return found


def _takes_metadata(function: Callable[..., Any], name: str) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, which does not tell
        return True
    for count in (3, 2):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count == 3
    raise UserError(
        f'the reward "{name}" must take (images, prompts) or (images, prompts, metadata), not '
        f"{signature}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
