"""Adapter control: ECM (arXiv 2510.05610), context-aware adapters with a shared, gated FFN.

No code of the authors is public: what the paper leaves open follows methods/control.md 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.control.module import (
    ControlConfig,
    ControlModule,
    ControlRecord,
    ControlState,
    evenly,
)
from nextscale.errors import require
from nextscale.var import NextScaleTransformer, TransformerConfig
from nextscale.var.block import FeedForward, SelfAttention, modulated_norm
from nextscale.var.cache import KeyValueCache

GATE_INIT = 0.1


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ControlConfig):
    """ECM: adapters with attention of their own over image and control."""

    num_sites: int | None = None
    """Adapters, evenly spaced over the blocks; None: depth / 4."""
    mlp_ratio: float = 4.0
    """Hidden width of the FFN in units of the base's width."""
    share_ffn: bool = True
    """One FFN for all adapters, behind each one's own gate; otherwise one each."""
    gate: Literal["vector", "scalar", "none"] = "vector"
    """Gate on the FFN's residual: tanh(gamma) with gamma a vector, a number, or no gate."""
    context: Literal["image", "control"] = "image"
    """image: adapters see the live image tokens mixed with control; control: control alone."""
    inject: Literal["input", "output"] = "input"
    """Add to the input or to the output of the block."""
    modulation_rank: int | None = None
    """Rank of each adapter's AdaLN projection; None: full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_sites", "modulation_rank"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        require("mlp_ratio", self.mlp_ratio, self.mlp_ratio > 0, "be above 0")
        choices = {
            "gate": ("vector", "scalar", "none"),
            "context": ("image", "control"),
            "inject": ("input", "output"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")


class AdapterControl(ControlModule):
    """A control stream z of its own, refined by what has been drawn and added to the base.

    At site j: x = h + z; y = z + g1 Attn_j(AdaLN(x)); z' = y + g2 tanh(gamma_j) FFN(AdaLN(y));
    h <- h + strength Out_j(z'), with Out_j zero at the start. gamma_j begins at 0.1, not at zero:
    both at zero would leave the FFN without gradients.
    """

    architecture = "adapter"
    config_class = AdapterConfig
    config: AdapterConfig

    def __init__(
        self, config: AdapterConfig, base: TransformerConfig, record: ControlRecord
    ) -> None:
        super().__init__(config, base, record)
        width = base.resolved_width
        self.sites = config.sites or evenly(config.num_sites or max(base.depth // 4, 1), base.depth)
        self.point = "before" if config.inject == "input" else "after"
        sizes = replace(base, drop_path=0.0, context_dim=None)
        self.input = nn.Linear(self.encoder.width, width)
        self.adapters = nn.ModuleList(_Adapter(config, sizes) for _ in self.sites)
        count = 1 if config.share_ffn else len(self.sites)
        hidden = round(width * config.mlp_ratio)
        self.feed_forward = nn.ModuleList(FeedForward(width, hidden) for _ in range(count))

    def state(
        self, features: Float[Tensor, "m t e"], base: NextScaleTransformer, *, cached: bool
    ) -> ControlState:
        """The stream z at the start: features plus the base's position and scale embeddings."""
        index = self.schedule.scale_index().to(base.device)
        fixed = base.position + base.scale_embedding(index)
        start = self.input(features.to(self.input.weight.dtype)).float() + fixed.detach().float()
        return _Stream(self, start, cached)


class _Adapter(nn.Module):
    """Attention, AdaLN, gate and output projection of one site."""

    def __init__(self, config: AdapterConfig, base: TransformerConfig) -> None:
        super().__init__()
        width = base.resolved_width
        self.attention = SelfAttention(base)
        self.modulation: nn.Module = nn.Linear(width, 6 * width)
        if config.modulation_rank is not None:
            self.modulation = nn.Sequential(
                nn.Linear(width, config.modulation_rank, bias=False),
                nn.Linear(config.modulation_rank, 6 * width),
            )
        size = {"vector": width, "scalar": 1}.get(config.gate)
        self.gate = None if size is None else nn.Parameter(torch.full((size,), GATE_INIT))
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        last = self.modulation if config.modulation_rank is None else self.modulation[1]  # pyright: ignore
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.02)
        with torch.no_grad():  # gates about 1, scales and shifts about 0
            last.bias.copy_(torch.tensor([1.0, 1, 0, 0, 0, 0]).repeat_interleave(width))


class _Stream(ControlState):
    """The control stream of the positions at work, and the adapters' keys and values."""

    def __init__(self, module: AdapterControl, start: Tensor, cached: bool) -> None:
        self.module, self.start, self.cached = module, start, cached
        self.cache: KeyValueCache | None = None
        self.z: Tensor | None = None

    def contribution(
        self,
        block: int,
        where: slice,
        x: Float[Tensor, "r l d"],
        pooled: Float[Tensor, "r 1 d"],
        pictures: Int[Tensor, " r"],
    ) -> Float[Tensor, "r l d"] | None:
        """Out_j(z) of the adapter at this block."""
        module = self.module
        if block not in module.sites:
            return None
        number = module.sites.index(block)
        if number == 0:
            self.z = self.start[:, where][pictures]
        z = self.z
        assert z is not None
        if self.cached and self.cache is None:
            self.cache = module.new_cache(len(module.sites), len(x))
        adapter = module.adapters[number]
        feed_forward = module.feed_forward[number if len(module.feed_forward) > 1 else 0]
        assert isinstance(adapter, _Adapter)
        dtype = adapter.output.weight.dtype
        six = adapter.modulation(F.silu(pooled).to(dtype)).unflatten(-1, (6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        mixed = x.float() + z if module.config.context == "image" else z
        y = adapter.attention(
            modulated_norm(mixed, scale1, shift1).to(dtype),
            mask=module.block_mask(where, x.device),
            cache=self.cache,
            block=number,
            where=where,
            visible=slice(0, where.stop),
            backend="sdpa",
        )
        z = torch.addcmul(z, gate1.to(z.dtype), y.to(z.dtype))
        v = feed_forward(modulated_norm(z, scale2, shift2).to(dtype))
        gate = gate2 if adapter.gate is None else gate2 * adapter.gate.tanh()
        self.z = z = torch.addcmul(z, gate.to(z.dtype), v.to(z.dtype))
        return adapter.output(z.to(dtype))

    def select(self, rows: Tensor | slice) -> None:
        """Keep the caches of these rows."""
        if self.cache is not None:
            self.cache.select(rows)
