"""GenARM: the tokens of one model, weighed by another while they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.search.search import Cost
from nextscale.errors import UserError, require
from nextscale.pipeline import NextScalePipeline, Request
from nextscale.var import SamplingConfig, ScaleStep, sample
from nextscale.var.filtering import ImageDraws


class GenARM:
    """Draws from p(y) pi_r(y)^weight token by token, p the base (GenARM, arXiv 2410.08193).

    pi_r is a next-scale model of the same tokens, whose log-probabilities are rewards; the weight
    is the paper's 1 / beta. Differences from the paper: p is the guided base after its filters,
    while pi_r judges without guidance, at the temperature of the draw; pi_r may be any model, such
    as one that `nextscale align` left: the paper's own training (DPO without a reference) is not
    here.

    Args:
        reward_model: pi_r.
        weight: 0 draws as the base does.

    Raises:
        UserError: If the weight is negative.
    """

    def __init__(self, reward_model: NextScalePipeline, weight: float = 1.0) -> None:
        require("weight", weight, weight >= 0, "be 0 or more")
        self.reward_model, self.weight, self.cost = reward_model, weight, Cost()

    @torch.no_grad()
    def __call__(
        self, pipe: NextScalePipeline, request: Request
    ) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b 3 H W"]]:
        """Tokens and pictures in [0, 1] of a pipeline's batch.

        Raises:
            UserError: With controls or `more_smooth`, or if the models have other tokens.
        """
        base, judge = pipe.transformer, self.reward_model.transformer
        codebooks = [p.tokenizer.quantizer.codebook.weight for p in (pipe, self.reward_model)]
        if base.schedule != judge.schedule or not torch.equal(*codebooks):
            raise UserError("the reward model has another tokenizer than the base: train one on it")
        if request.controls or request.settings.more_smooth:
            raise UserError("GenARM draws from prompts alone: leave out controls and more_smooth")
        settings = replace(request.settings, control_guidance_scale=None, control_in_negative=False)
        temperatures = settings.temperatures(base.schedule.num_scales)
        weigh = _Weigh(ImageDraws(request.seeds, base.schedule.lengths), self.weight)
        asked = judge.condition(judge.conditioner.tokenize(request.conditions))
        plain = SamplingConfig(temperature=temperatures)
        weigh.judge = sample(judge, pipe.tokenizer, asked, plain, draw=_Answer(weigh))
        negative, ids = request.negative_ids, base.condition(request.ids)
        other = None if negative is None else base.condition(negative)
        steps = list(sample(base, pipe.tokenizer, ids, settings, draw=weigh, negative=other))
        guidance = settings.guidance(base.schedule.num_scales)
        rows = zip(base.schedule.lengths, guidance, strict=True)
        own = sum(length * (1 if scale == 1 else 2) for length, scale in rows)
        self.cost.samples += len(request.seeds)
        self.cost.passes += len(request.seeds) * (1 + base.schedule.num_tokens / own)
        self.cost.pictures += len(request.seeds)
        return torch.cat([step.tokens for step in steps], dim=1), pipe.decode(steps[-1].f_hat)


class _Weigh:
    """The base's source of tokens: it lets the judge take the same step, which draws for both."""

    def __init__(self, draws: ImageDraws, weight: float) -> None:
        self.draws, self.weight = draws, weight
        self.judge: Iterator[ScaleStep] = iter(())
        self.logits: Tensor = torch.empty(0)

    def tokens(self, scale: int, logits: Float[Tensor, "b l v"]) -> Int[Tensor, "b l"]:
        """See `Draws`."""
        self.logits = logits
        return next(self.judge).tokens

    def gumbel(self, scale: int, logits: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """See `Draws`."""
        return self.draws.gumbel(scale, logits)


class _Answer:
    """The judge's source of tokens: those of base and judge together."""

    def __init__(self, weigh: _Weigh) -> None:
        self.weigh = weigh

    def tokens(self, scale: int, logits: Float[Tensor, "b l v"]) -> Int[Tensor, "b l"]:
        """See `Draws`."""
        weigh = self.weigh
        return weigh.draws.tokens(scale, weigh.logits + weigh.weight * logits)

    def gumbel(self, scale: int, logits: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """See `Draws`."""
        return self.weigh.gumbel(scale, logits)
