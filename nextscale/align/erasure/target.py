"""What is attacked, and how often the concept came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.align.erasure.pairs import ConceptPair
from nextscale.align.erasure.recognisers import Recognise
from nextscale.data.checker import wilson_interval
from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.var import SamplingConfig, sample
from nextscale.var.conditioning import Condition


@dataclass(frozen=True)
class Outcome:
    """How often the concept came back.

    Attributes:
        attack: Which.
        shown: Pictures that show it.
        n: Pictures drawn.
        detail: Settings of the attack, such as {"scales": 2}.
        shares: Of each prompt, the share of its pictures that shows it.
        without: The share of pictures of the same prompts without attack; None: unknown.
    """

    attack: str
    shown: int
    n: int
    detail: dict[str, Any]
    shares: Sequence[float]
    without: float | None = None

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {
            "attack": self.attack, **self.detail, "success": self.shown / self.n, "n": self.n,
            "interval": list(self.interval()), "without": self.without,
        }  # fmt: skip

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for as many pictures as these are worth, at least one a prompt.

        Pictures of one prompt resemble each other: n' = p (1 - p) / Var(mean of the prompts'
        shares), at most n (Korn and Graubard 1998).
        """
        share, prompts = self.shown / self.n, len(self.shares)
        variance = float(np.var(self.shares, ddof=1)) / prompts if prompts > 1 else 0.0
        worth = share * (1 - share) / variance if variance else float(prompts)
        worth = min(max(worth, prompts), self.n)
        return wilson_interval(share * worth, worth)


@dataclass(frozen=True)
class Target:
    """What is attacked.

    Attributes:
        pipe: The edited model.
        pairs: Held-out prompts of the concept, one picture each.
        recognise: Sees the concept.
        tokens: What the base draws for the original prompts, [n, t]: pictures of the concept.
        without: Whether each prompt shows it without attack, once that is known.
        seed: Picture i is drawn with seed + i.
        batch_size: Pictures at once.
        half: Draw in bfloat16.
    """

    pipe: NextScalePipeline
    pairs: list[ConceptPair]
    recognise: Recognise
    tokens: Int[Tensor, "n t"]
    without: Sequence[bool] | None = None
    seed: int = 0
    batch_size: int = 64
    half: bool = False

    def settings(self, **changes: Any) -> SamplingConfig:
        """Those of the model, without candidates."""
        return replace(self.pipe.generation, num_candidates=1, **changes)

    @property
    def ids(self) -> Tensor:
        """Of the original prompts."""
        conditioner = self.pipe.transformer.conditioner
        return conditioner.tokenize([pair.original for pair in self.pairs]).to(self.pipe.device)

    def outcome(self, attack: str, images: Tensor, **detail: Any) -> Outcome:
        """Of one picture per pair, or several rounds of them."""
        rounds = len(images) // len(self.pairs)
        shown = np.asarray(self.recognise(images, self.pairs * rounds), bool)
        shares = shown.reshape(rounds, -1).mean(axis=0).tolist()
        without = None if self.without is None else float(np.mean(self.without))
        return Outcome(attack, int(shown.sum()), len(images), detail, shares, without)

    def part(self, rows: Sequence[int], pairs: Sequence[ConceptPair] | None = None) -> Target:
        """Some of the prompts, or others in their place."""
        chosen = [self.pairs[i] for i in rows] if pairs is None else list(pairs)
        without = None if self.without is None else [self.without[i] for i in rows]
        return replace(self, pairs=chosen, tokens=self.tokens[list(rows)], without=without)

    @torch.no_grad()
    def draw(
        self,
        condition: Callable[[slice], Condition],
        settings: SamplingConfig,
        *,
        seed: int = 0,
        prefix: Int[Tensor, "n p"] | None = None,
        added: int = 0,
    ) -> Float[Tensor, "n 3 H W"]:
        """One picture per pair.

        Args:
            condition: Rows -> what they are drawn for.
            settings: Sampling settings.
            seed: Added to the target's.
            prefix: Tokens of the first scales.
            added: Context tokens that `condition` has more than a prompt of the model.
        """
        model, tokenizer, parts = self.pipe.transformer, self.pipe.tokenizer, []
        for start in range(0, len(self.pairs), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(self.pairs)))
            seeds = [self.seed + seed + i for i in range(rows.start, rows.stop)]
            given = None if prefix is None else prefix[rows].to(self.pipe.device)
            with torch.autocast(self.pipe.device.type, torch.bfloat16, enabled=self.half):
                null = _padded(model.null_condition(len(seeds)), added)
                *_, last = sample(
                    model, tokenizer, condition(rows), settings,
                    seeds=seeds, negative=null, prefix=given,
                )  # fmt: skip
                parts.append(self.pipe.decode(last.f_hat).float().cpu())
        return torch.cat(parts)

    def cross_entropy(self, condition: Condition, rows: Tensor) -> Float[Tensor, ""]:
        """Of the base's pictures of some prompts under the edited model, teacher-forced."""
        tokens = self.tokens[rows].to(self.pipe.device)
        logits = self.pipe.transformer(self.pipe.tokenizer.teacher_inputs(tokens), condition)
        return F.cross_entropy(logits.transpose(1, 2), tokens)

    def plain(self, rows: slice) -> Condition:
        """The original prompts."""
        return self.pipe.transformer.condition(self.ids[rows])


def true_pictures(
    pairs: Sequence[ConceptPair], images: Tensor, tokens: Tensor, recognise: Recognise
) -> tuple[list[ConceptPair], Tensor]:
    """Those pairs, and the tokens of their pictures, whose picture by the base shows the concept.

    Raises:
        UserError: If none does.
    """
    shown = torch.from_numpy(np.asarray(recognise(images, pairs), bool))
    if not shown.any():
        raise UserError(
            f'none of {len(pairs)} pictures by the base shows "{pairs[0].concept}": there is '
            "nothing to attack with"
        )
    return [pair for pair, own in zip(pairs, shown.tolist(), strict=True) if own], tokens[shown]


def _padded(condition: Condition, count: int) -> Condition:
    """As many context tokens more, masked."""
    if condition.context is None or not count:
        return condition
    context = F.pad(condition.context, (0, 0, 0, count))
    mask = condition.mask
    if mask is None:
        mask = torch.ones(condition.context.shape[:2], dtype=torch.bool, device=context.device)
    return Condition(condition.pooled, context, F.pad(mask, (0, count)))
