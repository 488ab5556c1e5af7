"""MG-Select: a choice among samples without any reward."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.search.search import Cost
from nextscale.errors import UserError, require
from nextscale.pipeline import NextScalePipeline, Request
from nextscale.streams import candidate_seeds


class MGSelect:
    """The sample whose tokens the prompt decided most (MG-Select, arXiv 2510.05681).

    Of N samples the one with the largest sum over tokens of KL(p(. | c) || p(. | no prompt)), where
    the second side is the unconditional one that guidance computes anyway, so that it costs
    nothing. Differences from the paper, whose second side has masked inputs. Next-scale models
    only: a denoising step has no distribution over tokens, and its two noise predictions are of
    unit scale at every step, whatever the prompt decided.

    Args:
        num_samples: N.
        scales: Only the first so many scales count; None: all where guidance is on.
    """

    def __init__(self, num_samples: int = 8, *, scales: int | None = None) -> None:
        require("num_samples", num_samples, num_samples > 0, "be above 0")
        require("scales", scales, scales is None or scales > 0, "be above 0")
        self.num_samples, self.scales, self.cost = num_samples, scales, Cost()

    @torch.no_grad()
    def __call__(
        self, pipe: NextScalePipeline, request: Request
    ) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b 3 H W"]]:
        """Tokens and pictures in [0, 1] of a pipeline's batch.

        Raises:
            UserError: If guidance is off at all scales that count, or ends picture by picture.
        """
        if request.settings.guidance_threshold is not None:
            raise UserError(
                "MG-Select compares what guidance computes, and guidance_threshold leaves it out "
                "of some pictures: leave out one of the two"
            )
        count, rows = self.num_samples, len(request.seeds)
        seeds = candidate_seeds(request.seeds, count)
        negative = request.negative_ids
        order = torch.arange(rows, device=pipe.device).repeat_interleave(count)
        steps = pipe.stream(
            request.ids.repeat_interleave(count, 0),
            request.settings,
            seeds=seeds,
            negative_ids=None if negative is None else negative.repeat_interleave(count, 0),
            controls=[control[order] for control in request.controls],
        )
        parts, found, step = [], [], None
        for step in steps:
            parts.append(step.tokens)
            counted = self.scales is None or step.scale < self.scales
            if counted and step.unconditional is not None:
                p, q = (x.log_softmax(-1) for x in (step.conditional, step.unconditional))
                found.append((p.exp() * (p - q)).sum(dim=(1, 2)))
        if not found or step is None:
            raise UserError(
                "MG-Select compares what guidance computes, and guidance is off at the scales that "
                "count: raise guidance_scale (linear guidance begins at the second scale)"
            )
        best = torch.stack(found).sum(0).view(-1, count).argmax(1)
        kept = torch.arange(rows, device=best.device) * count + best
        self.cost.samples += len(seeds)
        self.cost.passes += len(seeds)
        self.cost.pictures += rows
        return torch.cat(parts, dim=1)[kept], pipe.decode(step.f_hat[kept])
