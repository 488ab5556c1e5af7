"""Scores of single pictures by their prompts: metrics here, rewards in `align`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.data.checker import Report, check_batch
from nextscale.data.images import to_uint8
from nextscale.errors import UserError

Scorer = Callable[[Float[Tensor, "b 3 h w"], Sequence[str]], Float[Tensor, " b"]]
"""Pictures in [0, 1] and their prompts -> float32 scores, higher is better."""


def checker(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """1 where every statement of a scenes caption holds in the picture, else 0."""
    return torch.tensor([float(report.holds) for report in _reports(images, prompts)])


def checker_statements(
    images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
) -> Float[Tensor, " b"]:
    """Share of a scenes caption's statements that hold in the picture."""
    return torch.tensor([float(report.score) for report in _reports(images, prompts)])


SCORERS: dict[str, Scorer] = {"checker": checker, "checker_statements": checker_statements}


class Scored:
    """Scorers as a network: one feature each, so that one pass serves them and the others.

    Args:
        scorers: By the name of their tap.
        prompts: Of every picture.
        label: What stands in brackets behind the figures, such as a model's name.
    """

    def __init__(
        self, scorers: Mapping[str, Scorer], prompts: Sequence[str], label: str | None = None
    ) -> None:
        self.scorers, self.prompts = scorers, prompts
        self.taps: Mapping[str, int] = dict.fromkeys(scorers, 1)
        self.labels: Mapping[str, str] = {} if label is None else dict.fromkeys(scorers, label)

    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int]
    ) -> dict[str, Float[Tensor, "b 1"]]:
        """The scores of pictures `indices` of the set."""
        prompts = [self.prompts[index] for index in indices]
        same = len({image.shape for image in images}) == 1
        parts = [slice(0, len(images))] if same else [slice(i, i + 1) for i in range(len(images))]
        found = {}
        for name, scorer in self.scorers.items():
            scores = [torch.as_tensor(scorer(_unit(images[p]), prompts[p])) for p in parts]
            for part, given in zip(parts, scores, strict=True):
                if given.shape != (len(prompts[part]),):
                    raise UserError(
                        f'the scorer "{name}" must give one score per picture, '
                        f"[{len(prompts[part])}], not {list(given.shape)}"
                    )
            found[name] = torch.cat(scores).float()[:, None]
        return found

    def fingerprint(self) -> dict[str, str]:
        """Nothing that features of another set would have to share."""
        return {}


def _unit(images: Sequence[np.ndarray]) -> Float[Tensor, "b 3 h w"]:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _reports(images: Tensor, prompts: Sequence[str]) -> list[Report]:
    return check_batch(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), prompts)
