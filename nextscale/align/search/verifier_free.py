"""MG-Select: a choice among samples without any reward."""

from __future__ import annotations

from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.search.search import Cost
from nextscale.errors import UserError, require
from nextscale.pipeline import NextScalePipeline, Request
from nextscale.streams import candidate_seeds

_ROUNDING = 1e-3  # nats


class MGSelect:
    """The sample whose tokens the prompt decided most (MG-Select, arXiv 2510.05681).

    Of N samples the one with the largest sum of KL(p(. | c) || p(. | no prompt)) over the tokens of
    the first scales, after which it is drawn again and finished: the others cost the share of those
    scales, which hold few tokens. Differences from the paper: the second side is the unconditional
    one that guidance computes anyway, not one of masked inputs. Next-scale models only: a denoising
    step has no distribution over tokens, and the squared gap of its two predictions told right
    samples from wrong ones no better than chance (docs/generate.md).

    Args:
        num_samples: N.
        scales: Only the first so many scales count, where guidance is on; None: the first half.
            The last ones, which hold most tokens, tell less (docs/generate.md).
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
        lengths = pipe.transformer.schedule.lengths
        scales = min(self.scales or max(1, len(lengths) // 2), len(lengths))
        steps = pipe.stream(
            request.ids.repeat_interleave(count, 0),
            request.settings,
            seeds=seeds,
            negative_ids=None if negative is None else negative.repeat_interleave(count, 0),
            controls=[control[order] for control in request.controls],
        )
        found = []
        for step in islice(steps, scales):
            if step.unconditional is not None:
                p, q = (x.log_softmax(-1) for x in (step.conditional, step.unconditional))
                found.append((p.exp() * (p - q)).sum(dim=(1, 2)))
        if not found:
            raise UserError(
                "MG-Select compares what guidance computes, and guidance is off at the scales that "
                "count: raise guidance_scale (linear guidance begins at the second scale)"
            )
        values = torch.stack(found).sum(0).view(-1, count)
        ties = values >= values.amax(1, keepdim=True) - _ROUNDING  # equal beginnings have one value
        best = ties.int().argmax(1)
        chosen = [seeds[row * count + number] for row, number in enumerate(best.tolist())]
        final = list(
            pipe.stream(
                request.ids,
                request.settings,
                seeds=chosen,
                negative_ids=negative,
                controls=request.controls,
            )
        )
        self.cost.samples += len(seeds)
        self.cost.passes += len(seeds) * sum(lengths[:scales]) / sum(lengths) + rows
        self.cost.pictures += rows
        return torch.cat([step.tokens for step in final], dim=1), pipe.decode(final[-1].f_hat)
