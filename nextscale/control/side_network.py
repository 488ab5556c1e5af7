"""A half-depth side network: CAR (arXiv 2410.04671), made additive.

CAR replaces the stream of the base's second half by a projection of stream and side output, so
that an untrained CAR is no longer its base. Here the projection is added and begins at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.control.module import ControlConfig, ControlModule, ControlRecord, ControlState
from nextscale.errors import UserError, require
from nextscale.var import NextScaleTransformer, TransformerConfig
from nextscale.var.block import Block, Prepared
from nextscale.var.cache import KeyValueCache


@dataclass(frozen=True, kw_only=True)
class SideNetworkConfig(ControlConfig):
    """CAR: blocks beside the base whose outputs are added to its second half."""

    num_blocks: int | None = None
    """Blocks of the side network; None: half of the base's."""
    kernel: int = 3
    """Side of the convolution that mixes image and control at the start, odd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_blocks
        require("num_blocks", count, count is None or count > 0, "be above 0")
        require("kernel", self.kernel, self.kernel > 0 and self.kernel % 2 == 1, "be odd")
        if self.sites is not None:
            raise UserError("sites: a side network acts on the base's last blocks; use num_blocks")


class SideNetworkControl(ControlModule):
    """T(conv(h_0) + u), whose last output enters the first of the base's last blocks (a mirror).

    Before base block d - n + i: h <- h + strength Out_i(LN(T_{n-1-i})), with Out_i zero at the
    start. Differs from CAR: added, not concatenated; u comes from the module's encoder, resized to
    every scale as features (`encoder.resize=image` is CAR's way).
    """

    architecture = "side_network"
    config_class = SideNetworkConfig
    config: SideNetworkConfig

    def __init__(
        self, config: SideNetworkConfig, base: TransformerConfig, record: ControlRecord
    ) -> None:
        super().__init__(config, base, record)
        width = base.resolved_width
        count = config.num_blocks or max(base.depth // 2, 1)
        require("num_blocks", count, count <= base.depth, f"be at most {base.depth}")
        self.sites = tuple(range(base.depth - count, base.depth))
        sizes = replace(
            base, depth=count, width=width, num_heads=base.resolved_heads, drop_path=0.0,
            context_dim=None, shared_modulation=False,
        )  # fmt: skip
        self.input = nn.Linear(self.encoder.width, width)
        self.mix = nn.Conv2d(width, width, config.kernel, padding=config.kernel // 2)
        self.blocks = nn.ModuleList(Block(sizes, i) for i in range(count))
        self.output = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for linear in self.output:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def state(
        self, features: Float[Tensor, "m t e"], base: NextScaleTransformer, *, cached: bool
    ) -> ControlState:
        """The side network on control features."""
        return _Side(self, self.input(features.to(self.input.weight.dtype)).float(), cached)


class _Side(ControlState):
    """Outputs of the side blocks at the positions at work, and their keys and values."""

    def __init__(self, module: SideNetworkControl, start: Tensor, cached: bool) -> None:
        self.module, self.start, self.cached = module, start, cached
        self.cache: KeyValueCache | None = None
        self.outputs: list[Tensor] = []

    def contribution(
        self,
        block: int,
        where: slice,
        x: Float[Tensor, "r l d"],
        pooled: Float[Tensor, "r 1 d"],
        pictures: Int[Tensor, " r"],
    ) -> Float[Tensor, "r l d"] | None:
        """Out_i(LN(T_{n-1-i})); at block 0 the side network itself runs."""
        module = self.module
        if block == 0:
            self.outputs = self._run(where, x, pooled, pictures)
        if block not in module.sites:
            return None
        number = module.sites.index(block)
        side = module.norm(self.outputs[-1 - number].to(module.norm.weight.dtype))
        return module.output[number](side)

    def _run(self, where: slice, x: Tensor, pooled: Tensor, pictures: Tensor) -> list[Tensor]:
        module = self.module
        dtype = module.mix.weight.dtype
        if self.cached and self.cache is None:
            self.cache = module.new_cache(len(module.blocks), len(x))
        slices = module.schedule.slices
        mixed = [
            module.mix(
                x[:, part.start - where.start : part.stop - where.start]
                .transpose(1, 2)
                .unflatten(2, module.schedule.sides[k])
                .to(dtype)
            )
            .flatten(2)
            .transpose(1, 2)
            for k, part in enumerate(slices)
            if where.start <= part.start and part.stop <= where.stop
        ]
        h = torch.cat(mixed, dim=1).float() + self.start[:, where][pictures]
        active = F.silu(pooled[:, 0]).to(dtype)
        modulation = [
            block.modulation(active).view(-1, 1, 6, h.shape[-1])  # pyright: ignore[reportCallIssue]
            for block in module.blocks
        ]
        nothing = active.new_zeros(())
        prepared = Prepared(pooled, modulation, (nothing, nothing), None, None, pooled)
        outputs = []
        for side_block in module.blocks:
            h = side_block(
                h,
                prepared,
                mask=module.block_mask(where, x.device),
                cache=self.cache,
                where=where,
                visible=slice(0, where.stop),
                backend="sdpa",
            )
            outputs.append(h)
        return outputs

    def select(self, rows: Tensor | slice) -> None:
        """Keep the caches of these rows."""
        if self.cache is not None:
            self.cache.select(rows)
