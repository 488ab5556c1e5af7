"""Rewards by name, as recipes and commands write them: "clip", "brightness:0.8"."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nextscale.align.rewards.classifier import classifier_reward, timm_classifier
from nextscale.align.rewards.composition import Preference
from nextscale.align.rewards.ocr import ocr_reward, open_recogniser
from nextscale.align.rewards.pixels import (
    brightness_reward,
    color_reward,
    jpeg_reward,
    random_reward,
)
from nextscale.align.rewards.remote import http_reward
from nextscale.align.rewards.reward import AnyReward, CheckedReward, Range, scorer_reward
from nextscale.align.rewards.scenes import checker_reward
from nextscale.errors import UserError

if TYPE_CHECKING:
    from nextscale.align.rewards.distribution import FrechetReward


@dataclass(frozen=True)
class Opening:
    """How rewards with weights are opened.

    Attributes:
        device: Where their networks run.
        download: Fetch weights that are nowhere on this machine.
        timeout: Seconds that a server has for an answer.
        retries: Requests after a failed one.
    """

    device: torch.device | str = "cpu"
    download: bool = False
    timeout: float = 60.0
    retries: int = 3


Factory = Callable[[str | None, Opening], AnyReward]
"""What stands behind the colon of a reward's name, if anything, and how to open it -> reward."""


def open_reward(
    name: str,
    *,
    device: torch.device | str = "cpu",
    download: bool = False,
    timeout: float = 60.0,
    retries: int = 3,
) -> AnyReward:
    """Open a reward by its name.

    | name | reward |
    |---|---|
    | checker, checker_statements | the scenes checker: all statements hold, or their share |
    | jpeg_compressibility, jpeg_incompressibility[:DIVISOR] | minus or plus kB as a JPEG |
    | brightness[:TARGET] | minus squared distance of the mean luma; target 1 |
    | color:COLOUR | minus squared distance of the mean colour, a CSS name or #rrggbb |
    | random | a control that means nothing |
    | classifier:MODEL[@FILE] | log-probability of the class label, by a model of timm |
    | clip[:MODEL] | cosine by the bundled CLIP, a model folder, or one of open_clip |
    | frechet:EXEMPLARS | set reward: Fréchet distance in the bundled features |
    | frechet_instance:EXEMPLARS | the same of each picture alone |
    | frechet_pixels:EXEMPLARS[@SIZE] | the set reward of thumbnails of SIZE^2 (4) mean colours |
    | frechet_pixels_instance:EXEMPLARS[@SIZE] | the same of each picture alone |
    | frechet_clip:EXEMPLARS[@MODEL] | the set reward in CLIP's space: also exemplar texts |
    | frechet_clip_instance:EXEMPLARS[@MODEL] | the same of each picture alone |
    | control_consistency[:TYPE[:SOURCE]] | agreement with the control map, by an extractor |
    | vendi | set reward: diversity in the bundled features |
    | preference:REWARD[@T] | pairwise: sigma of differences of a reward over T (SPO) |
    | pickscore, hpsv2, imagereward, aesthetic[:FILE] | preference models |
    | ocr[:PACKAGE] | share of the quoted text that is read in the picture |
    | http:URL (or just the URL) | a server |

    Args:
        name: See the table.
        device: Where networks run.
        download: Fetch weights that are nowhere on this machine.
        timeout: Seconds that a server has for an answer.
        retries: Requests after a failed one.

    Raises:
        UserError: For a name or argument that is none, and with exit code 1 for weights that are
            not there.
    """
    return _by_name(name, Opening(device, download, timeout, retries))


def _by_name(name: str, opening: Opening) -> AnyReward:
    kind, colon, argument = name.partition(":")
    if argument.startswith("//"):
        kind, argument = "http", name
    if kind not in REWARDS:
        near = difflib.get_close_matches(kind.lower(), REWARDS, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f'there is no reward "{kind}".{hint} Choose from {", ".join(REWARDS)}; your own '
            "functions are given in Python, align(rewards=...), or served at http://"
        )
    if colon and not argument:
        raise UserError(f'the reward "{name}" has nothing behind its colon')
    return REWARDS[kind](argument or None, opening)


def _plain(name: str, make: Callable[[], AnyReward]) -> Factory:
    """Of a reward that takes no argument."""

    def factory(argument: str | None, opening: Opening) -> AnyReward:
        if argument is not None:
            raise UserError(f'the reward "{name}" takes nothing behind a colon, got "{argument}"')
        return make()

    return factory


def _number(name: str, argument: str | None, default: float) -> float:
    try:
        return default if argument is None else float(argument)
    except ValueError as error:
        raise UserError(f'the reward "{name}" takes a number, got "{argument}"') from error


def _needed(name: str, argument: str | None, what: str) -> str:
    if argument is None:
        raise UserError(f'the reward "{name}" needs {what}: write {name}:{what.split()[-1]}')
    return argument


def _jpeg(sign: int) -> Factory:
    name = "jpeg_compressibility" if sign < 0 else "jpeg_incompressibility"
    return lambda argument, opening: jpeg_reward(sign, divisor=_number(name, argument, 1.0))


def _classifier(argument: str | None, opening: Opening) -> AnyReward:
    model, _, path = _needed("classifier", argument, "a model of timm, such as resnet50").partition(
        "@"
    )
    options: dict[str, Any] = {"device": opening.device, "download": opening.download}
    return classifier_reward(timm_classifier(model, path or None, **options))


def _clip(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.eval.clip import BUNDLED, clip_scorer, open_clip_model

    clip = open_clip_model(argument or BUNDLED, device=opening.device, download=opening.download)
    return scorer_reward(clip_scorer(clip), "clip", range=(-1.0, 1.0))


def _frechet(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.distribution import frechet_reward
    from nextscale.eval.feature_network import small_features

    exemplars = _needed("frechet", argument, "exemplars, such as scenes")
    return frechet_reward(exemplars, small_features(device=opening.device))


def _frechet_instance(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.distribution import frechet_reward, instance_frechet_reward
    from nextscale.eval.feature_network import small_features

    exemplars = _needed("frechet_instance", argument, "exemplars, such as scenes")
    return instance_frechet_reward(frechet_reward(exemplars, small_features(device=opening.device)))


def _frechet_pixels(argument: str | None, opening: Opening) -> FrechetReward:
    from nextscale.align.rewards.distribution import Thumbnails, frechet_reward

    what = _needed("frechet_pixels", argument, "exemplars, such as a folder")
    exemplars, _, size = what.partition("@")
    if size and not size.isdecimal():
        raise UserError(f'frechet_pixels:{what}: the size "{size}" is no number of fields')
    return frechet_reward(exemplars, Thumbnails(int(size or 4)), "frechet_pixels")


def _frechet_pixels_instance(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.distribution import instance_frechet_reward

    return instance_frechet_reward(_frechet_pixels(argument, opening), "frechet_pixels_instance")


def _frechet_clip(argument: str | None, opening: Opening) -> FrechetReward:
    from nextscale.align.rewards.distribution import frechet_reward
    from nextscale.eval.clip import BUNDLED, ClipFeatures, open_clip_model

    what = _needed("frechet_clip", argument, "exemplars, such as texts.txt")
    exemplars, model = what, BUNDLED
    if "@" in what and not Path(what).exists():
        exemplars, _, model = what.rpartition("@")
    clip = open_clip_model(model, device=opening.device, download=opening.download)
    return frechet_reward(exemplars, ClipFeatures(clip, ["clip"]), "frechet_clip")


def _frechet_clip_instance(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.distribution import instance_frechet_reward

    return instance_frechet_reward(_frechet_clip(argument, opening), "frechet_clip_instance")


def _consistency(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.control import consistency_reward
    from nextscale.control import open_extractor

    spec = _needed("control_consistency", argument, "a type (or --control), such as canny")
    return consistency_reward(open_extractor(spec))


def _vendi(argument: str | None, opening: Opening) -> AnyReward:
    from nextscale.align.rewards.distribution import VendiReward, features_by
    from nextscale.eval.feature_network import small_features

    make = _plain("vendi", lambda: VendiReward(features_by(small_features(device=opening.device))))
    return make(argument, opening)


def _preference(name: str, bounds: Range, *, needs_prompt: bool = True) -> Factory:
    """Of a scorer of `eval.preference_models` by its function's name."""

    def factory(argument: str | None, opening: Opening) -> AnyReward:
        from nextscale.eval import preference_models

        open_scorer = getattr(preference_models, name)
        scorer = open_scorer(argument, device=opening.device, download=opening.download)
        return scorer_reward(scorer, name, range=bounds, needs_prompt=needs_prompt)

    return factory


def _preferred(argument: str | None, opening: Opening) -> AnyReward:
    what = _needed("preference", argument, "a reward, such as checker_statements")
    name, _, temperature = what.partition("@")
    reward = _by_name(name, opening)
    if not isinstance(reward, CheckedReward):
        raise UserError(
            f'the reward "preference" compares single pictures, which "{name}" is not of'
        )
    return Preference(reward, _number("preference", temperature or None, 1.0))


_INF = float("inf")
REWARDS: dict[str, Factory] = {
    "checker": _plain("checker", checker_reward),
    "checker_statements": _plain("checker_statements", lambda: checker_reward(statements=True)),
    "jpeg_compressibility": _jpeg(-1),
    "jpeg_incompressibility": _jpeg(1),
    "brightness": lambda argument, _: brightness_reward(_number("brightness", argument, 1.0)),
    "color": lambda argument, _: color_reward(_needed("color", argument, "a colour, such as red")),
    "random": _plain("random", random_reward),
    "classifier": _classifier,
    "clip": _clip,
    "frechet": _frechet,
    "frechet_instance": _frechet_instance,
    "frechet_pixels": _frechet_pixels,
    "frechet_pixels_instance": _frechet_pixels_instance,
    "frechet_clip": _frechet_clip,
    "frechet_clip_instance": _frechet_clip_instance,
    "control_consistency": _consistency,
    "vendi": _vendi,
    "preference": _preferred,
    "pickscore": _preference("pickscore", (-100.0, 100.0)),
    "hpsv2": _preference("hpsv2", (-1.0, 1.0)),
    "imagereward": _preference("imagereward", (-_INF, _INF)),
    "aesthetic": _preference("aesthetic", (-_INF, _INF), needs_prompt=False),
    "ocr": lambda argument, opening: ocr_reward(open_recogniser(argument, device=opening.device)),
    "http": lambda argument, opening: http_reward(
        _needed("http", argument, "an address, such as http://localhost:8000/score"),
        timeout=opening.timeout,
        retries=opening.retries,
    ),
}
