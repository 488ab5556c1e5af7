"""From logits to one token per position: top-k, top-p, and the inverse-CDF draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.streams import image_stream


def filter_logits(
    logits: Float[Tensor, "b l v"], top_k: int, top_p: float
) -> Float[Tensor, "b l v"]:
    """Set the codes outside top-k and top-p to -inf.

    Top-p acts on the distribution that top-k leaves, as in the released sampler. The support is
    found on the top_k largest values, so nothing of size V is sorted when top_k is on. Ours differs
    in exact ties: all codes equal to the last kept value survive.

    Args:
        logits: float32.
        top_k: Codes to keep; 0 or >= V is off.
        top_p: Smallest probability mass to keep, in (0, 1]; 1 is off.
    """
    vocabulary = logits.shape[-1]
    k = top_k if 0 < top_k < vocabulary else vocabulary
    if k == vocabulary and top_p >= 1:
        return logits
    largest = logits.topk(k, dim=-1).values
    threshold = largest[..., -1:]
    if top_p < 1:
        kept = logits.masked_fill(logits < threshold, -torch.inf)
        total = kept.logsumexp(dim=-1, keepdim=True)
        mass = (largest - total).exp()
        before = mass.cumsum(dim=-1) - mass
        last = (before < top_p).sum(dim=-1, keepdim=True) - 1
        threshold = largest.gather(-1, last.clamp_min(0))
    return logits.masked_fill(logits < threshold, -torch.inf)


@runtime_checkable
class Draws(Protocol):
    """Where the randomness of a call comes from; tests inject their own."""

    def tokens(self, scale: int, logits: Float[Tensor, "b l v"]) -> Int[Tensor, "b l"]:
        """One token per position from filtered logits."""
        ...

    def gumbel(self, scale: int, logits: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """Gumbel noise for `more_smooth`, of the shape of the logits."""
        ...


class ImageDraws:
    """The default: one CPU stream per image, L uniforms up front, inverse CDF.

    Image i's stream is `torch.Generator().manual_seed(seeds[i])`; it yields L float32 uniforms and
    then, for `more_smooth` only, exponentials [n_k^2, V] scale by scale. So an image's draws do not
    depend on the batch it is in, nor on the device.

    Args:
        seeds: One per image; or CPU generators, which are then the streams.
        lengths: Tokens per scale.
    """

    def __init__(
        self, seeds: Sequence[int] | Sequence[torch.Generator], lengths: Sequence[int]
    ) -> None:
        self._generators = [
            seed if isinstance(seed, torch.Generator) else image_stream(seed) for seed in seeds
        ]
        rows = [torch.rand(sum(lengths), generator=g) for g in self._generators]
        self._uniforms = torch.stack(rows).split(list(lengths), dim=1)

    def tokens(self, scale: int, logits: Float[Tensor, "b l v"]) -> Int[Tensor, "b l"]:
        """One token per position, from the uniforms of the scale."""
        return inverse_cdf(logits, self._uniforms[scale].to(logits.device))

    def gumbel(self, scale: int, logits: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """Gumbel noise, from the streams as they stand: call it once per scale, in order."""
        rows = [torch.empty(logits.shape[1:]).exponential_(generator=g) for g in self._generators]
        return -torch.stack(rows).log().to(logits.device)


def inverse_cdf(
    logits: Float[Tensor, "b l v"], uniforms: Float[Tensor, "b l"]
) -> Int[Tensor, "b l"]:
    """The first code, in index order, whose cumulated probability exceeds the uniform.

    Args:
        logits: Filtered, float32; -inf is never drawn.
        uniforms: In [0, 1).
    """
    cumulated = (logits - logits.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    total = cumulated[..., -1:]
    # u < 1, but u * total may round up to total, beyond the last code.
    target = torch.minimum(uniforms[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return (cumulated <= target).sum(dim=-1)
