"""Does a picture follow its control map? As a reward."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.align.prompts import map_cache
from nextscale.align.rewards.reward import CheckedReward, Metadata, Prompts, as_reward
from nextscale.control.conditions import Extractor, colour_labels
from nextscale.data.images import to_uint8
from nextscale.errors import UserError
from nextscale.eval.controllability import METRIC_OF, agreement


def consistency_reward(extractor: Extractor) -> CheckedReward:
    """Agreement of a picture's control map with the one that it was drawn under, in [0, 1].

    ControlNet++ (arXiv 2404.07987) lets the gradient of this agreement through a differentiable
    extractor and a one-step prediction; here it is a reward of policy gradients, which any
    extractor can be. Maps are compared as `eval.control_score` does, picture by picture; errors e
    in units of a metric's range become 1 - e.

    Args:
        extractor: Makes the maps; of a control that is tuned, its own.

    Raises:
        UserError: For a type without a metric; when called, for pictures without a control picture.
    """
    if extractor.type not in METRIC_OF:
        raise UserError(f"control_consistency: there is no metric for {extractor.type}")
    map_of = map_cache(extractor)

    def judge(
        images: Float[Tensor, "b 3 h w"], prompts: Prompts, metadata: Metadata
    ) -> Float[Tensor, " b"]:
        pictures = [entry.get("control_picture") for entry in metadata]
        if len(pictures) != len(images) or None in pictures:
            raise UserError(
                "control_consistency needs the picture behind each control map: use prompts such "
                "as images:scenes, and --control"
            )
        given = np.stack([map_of(picture, images.shape[2]) for picture in pictures if picture])
        found = extractor(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
        return torch.from_numpy(agreement(extractor.type, given, found, colour_labels)).float()

    return as_reward(judge, "control_consistency", range=(0.0, 1.0))
