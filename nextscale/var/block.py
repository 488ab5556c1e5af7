"""A block of the next-scale transformer: AdaLN, attention over scales, context, feed-forward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.errors import UserError, require
from nextscale.var.attention import Backend, attend
from nextscale.var.cache import KeyValueCache


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Exactly what `transformer/config.json` stores."""

    scales: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides of the token maps, those of the tokenizer."""
    codebook_size: int = 4096
    """V."""
    codebook_dim: int = 32
    """Z."""
    depth: int = 16
    """Blocks."""
    width: int | None = None
    """Channels; None: 64 per unit of depth, the released rule."""
    num_heads: int | None = None
    """Attention heads; None: depth."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers in units of `width`."""
    shared_modulation: bool = False
    """One AdaLN projection for all blocks plus an offset per block (d36-s)."""
    normalize_attention: bool = True
    """l2-normalised queries and keys with a learned scale per head."""
    context_dim: int | None = None
    """Channels of context tokens for cross-attention; None: no cross-attention."""
    mask_policy: Literal["causal", "diagonal", "markov"] = "causal"
    """A scale sees itself and: all coarser scales, none, or the one before."""
    drop_path: float | None = None
    """Stochastic depth of the last block, linear over depth; None: 0.1 depth / 24."""
    gate_init: float = 1e-3
    """Factor on the initial weights of the gates (alng: 1e-3 d16/d20, 1e-4 d24, 1e-5 d30)."""

    def __post_init__(self) -> None:
        scales = tuple(tuple(s) if isinstance(s, list) else s for s in self.scales)
        object.__setattr__(self, "scales", scales)
        for name in ("codebook_size", "codebook_dim", "depth", "width", "num_heads", "context_dim"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        require("mlp_ratio", self.mlp_ratio, self.mlp_ratio > 0, "be above 0")
        policies = ("causal", "diagonal", "markov")
        require(
            "mask_policy", self.mask_policy, self.mask_policy in policies, f"be one of {policies}"
        )
        drop = self.drop_path
        require("drop_path", drop, drop is None or 0 <= drop < 1, "lie in [0, 1)")
        if self.resolved_width % self.resolved_heads:
            raise UserError(
                f"num_heads {self.resolved_heads} does not divide width {self.resolved_width}"
            )

    @property
    def resolved_width(self) -> int:
        """Channels."""
        return self.width or 64 * self.depth

    @property
    def resolved_heads(self) -> int:
        """Attention heads."""
        return self.num_heads or self.depth


@dataclass
class Prepared:
    """What depends on the condition alone, computed once per picture.

    Attributes:
        start: [b, 1, d], the condition as it enters the start token.
        modulation: Per block [b, 1, 6, d]: gates, scales and shifts.
        head: (scale, shift) of the head, [b, 1, d] each.
        context: Per block keys and values of the context tokens, or None.
        mask: [b, 1, 1, s], True for real context tokens, or None.
        pooled: [b, 1, d], the condition itself, whatever is added to the start token.
    """

    start: Tensor
    modulation: list[Tensor]
    head: tuple[Tensor, Tensor]
    context: list[tuple[Tensor, Tensor]] | None
    mask: Tensor | None
    pooled: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Prepared:
        context = None if self.context is None else [(k[rows], v[rows]) for k, v in self.context]
        return Prepared(
            self.start[rows],
            [m[rows] for m in self.modulation],
            (self.head[0][rows], self.head[1][rows]),
            context,
            None if self.mask is None else self.mask[rows],
            self.pooled[rows],
        )


class FusedProjection(nn.Linear):
    """Queries, keys and values in one matrix; queries and values have biases, keys have none."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, 3 d], queries first."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(input, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head attention over scales, with l2-normalised queries and keys by default."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.resolved_width, config.resolved_heads
        self.qkv = FusedProjection(width)
        self.proj = nn.Linear(width, width)
        self.log_scale = None
        if config.normalize_attention:
            self.log_scale = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        block: int,
        where: slice,
        visible: slice,
        backend: Backend,
    ) -> Tensor:
        """Attention of the positions `where`, [b, t, d], to those that mask or cache show them."""
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if self.log_scale is None:
            factor = 0.25 / math.sqrt(d // self.heads)
        else:
            scale = self.log_scale.clamp_max(math.log(100)).exp()
            q = q * (scale / _norm(q)).to(q.dtype)
            k = k * (1 / _norm(k)).to(k.dtype)
            factor = 1.0
        if cache is not None:
            cache.update(block, where, k, v)
            k, v = cache.read(block, visible)
        y = attend(q, k, v, mask=mask, scale=factor, backend=backend)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)


class CrossAttention(nn.Module):
    """Attention to context tokens; their keys and values are computed once per picture."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.context_dim is not None
        width, self.heads = config.resolved_width, config.resolved_heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(config.context_dim, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, n, s, e] of context tokens [b, s, c]."""
        b, s, _ = context.shape
        kv = self.kv(context).view(b, s, 2, self.heads, -1)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        return k, v

    def forward(
        self, x: Tensor, context: tuple[Tensor, Tensor], mask: Tensor | None, backend: Backend
    ) -> Tensor:
        """Attention of positions [b, t, d] to keys and values of the context."""
        b, t, d = x.shape
        # The residual stream may have another dtype than the weights; the norm runs in its dtype.
        scale, shift = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        normed = F.layer_norm(x, x.shape[-1:], scale, shift, self.norm.eps)
        q = self.q(normed.to(self.q.weight.dtype))
        q = q.view(b, t, self.heads, -1).transpose(1, 2)
        k, v = context
        scale = 1 / math.sqrt(d // self.heads)
        y = attend(q.to(k.dtype), k, v, mask=mask, scale=scale, backend=backend)
        return self.proj(y.transpose(1, 2).reshape(b, t, d))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        # In place, which F.gelu does not offer: large new tensors are slow on the CPU.
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))


class Block(nn.Module):
    """x + gate1 Attn(AdaLN(x)), [x + Cross(LN(x))], x + gate2 FFN(AdaLN(x))."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        width = config.resolved_width
        self.index = index
        self.attention = SelfAttention(config)
        self.cross = None if config.context_dim is None else CrossAttention(config)
        self.feed_forward = FeedForward(width, round(width * config.mlp_ratio))
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.modulation = nn.Linear(width, 6 * width)
        last = 0.1 * config.depth / 24 if config.drop_path is None else config.drop_path
        self.drop_path = last * index / max(config.depth - 1, 1)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        prepared: Prepared,
        *,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        where: slice,
        visible: slice,
        backend: Backend,
    ) -> Tensor:
        """The residual stream of the positions `where` after this block."""
        gate1, gate2, scale1, scale2, shift1, shift2 = prepared.modulation[self.index].unbind(2)
        dtype = self.attention.proj.weight.dtype
        y = self.attention(
            modulated_norm(x, scale1, shift1).to(dtype),
            mask=mask,
            cache=cache,
            block=self.index,
            where=where,
            visible=visible,
            backend=backend,
        )
        x = self._add(x, gate1, y)
        if self.cross is not None:
            assert prepared.context is not None, "cross-attention needs context tokens"
            x = x + self.cross(x, prepared.context[self.index], prepared.mask, backend)
        y = self.feed_forward(modulated_norm(x, scale2, shift2).to(dtype))
        return self._add(x, gate2, y)

    def _add(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """Add gate * y to x, with stochastic depth per sample, rescaled by 1 / keep."""
        if self.training and self.drop_path > 0:
            keep = 1 - self.drop_path
            gate = gate * gate.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)
        return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, LN without affine, eps 1e-6."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift.to(normed.dtype), normed, (1 + scale).to(normed.dtype))
