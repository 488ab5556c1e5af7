"""The scenes world's checker as a verifiable reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nextscale.align.rewards.reward import CheckedReward, Prompts, RewardOutput, as_reward, texts
from nextscale.data.checker import KINDS, Report, check_batch
from nextscale.data.images import to_uint8

_judged = WeakIdKeyDictionary()  # pictures that still exist: what they were judged for, and how


def checker_reward(*, statements: bool = False) -> CheckedReward:
    """Whether a picture of the scenes world shows what its caption says.

    The idea of GenEval's reward (arXiv 2310.11513) with exact ground truth. Its extra columns are,
    per kind of statement, the share that holds; NaN where a caption makes none of the kind.

    Args:
        statements: Score the share of statements that hold, in [0, 1]; otherwise 1 where all hold
            and 0 elsewhere, with which a group of equal verdicts gives no signal.
    """
    name = "checker_statements" if statements else "checker"

    def judge(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> RewardOutput:
        reports = _reports(images, tuple(texts(prompts, name)))
        values = [r.score if statements else float(r.holds) for r in reports]
        return RewardOutput(torch.tensor(values), {kind: _share(reports, kind) for kind in KINDS})

    return as_reward(judge, name, range=(0.0, 1.0))


def _reports(images: Float[Tensor, "b 3 h w"], captions: tuple[str, ...]) -> list[Report]:
    """`check_batch`, once for both rewards."""
    if images not in _judged or _judged[images][0] != captions:
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        _judged[images] = captions, check_batch(pixels, captions)
    return _judged[images][1]


def _share(reports: Sequence[Report], kind: str) -> Float[Tensor, " b"]:
    shares = []
    for report in reports:
        holds = [s.holds for s in report.statements if s.kind == kind]
        shares.append(sum(holds) / len(holds) if holds else math.nan)
    return torch.tensor(shares)
