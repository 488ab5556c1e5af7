"""The one seam between our layers and an attention kernel."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.errors import UserError, missing_extra

Backend = Literal["sdpa", "flex", "xformers"]
BACKENDS: tuple[Backend, ...] = ("sdpa", "flex", "xformers")


def attend(
    q: Float[Tensor, "b n t e"],
    k: Float[Tensor, "b n s e"],
    v: Float[Tensor, "b n s e"],
    *,
    mask: Bool[Tensor, "*broadcast"] | None = None,
    scale: float,
    backend: Backend = "sdpa",
) -> Float[Tensor, "b n t e"]:
    """softmax(scale q k^T) v.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: True where a query may see a key, broadcastable to [b, n, t, s]; None: everywhere.
        scale: Factor of the dot products.
        backend: `sdpa` everywhere; `flex` (FlexAttention) pays only when compiled on a GPU;
            `xformers` needs CUDA and the package xformers.

    Raises:
        UserError: If the backend cannot run here.
    """
    if backend == "sdpa":
        if q.device.type == "cpu" and q.requires_grad:
            # The CPU kernel's backward is several times slower than these products at our lengths.
            scores = (q * scale) @ k.transpose(-2, -1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            return scores.softmax(dim=-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        def score_mod(score: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert mask is not None
            return torch.where(_entry(mask, b, i, j), score, -float("inf"))

        out = flex_attention(q, k, v, score_mod=None if mask is None else score_mod, scale=scale)
        assert isinstance(out, Tensor)
        return out
    if backend == "xformers":
        if q.device.type != "cuda":
            raise UserError(
                f"the attention backend xformers runs on CUDA only, the tensors are on {q.device}; "
                "use sdpa"
            )
        try:
            from xformers.ops import memory_efficient_attention  # pyright: ignore
        except ImportError as error:
            need = "the attention backend xformers needs xformers"
            raise missing_extra(need, "xformers") from error
        bias = None
        if mask is not None:
            zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
            bias = zeros.masked_fill(~mask, -float("inf")).expand(*q.shape[:3], k.shape[2])
        parts = (x.transpose(1, 2) for x in (q, k, v))
        return memory_efficient_attention(*parts, attn_bias=bias, scale=scale).transpose(1, 2)
    raise UserError(f'attention backend must be one of {", ".join(BACKENDS)}, got "{backend}"')


def _entry(mask: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """mask[i, j] of a [t, s] mask, or mask[b, 0, 0, j] of a key padding mask [b, 1, 1, s]."""
    return mask[i, j] if mask.ndim == 2 else mask[b, 0, 0, j]
