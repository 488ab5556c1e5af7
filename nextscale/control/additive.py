"""Additive control: ControlAR (arXiv 2410.02705) carried over to next-scale prediction.

ControlAR adds the control token of the token to be predicted to the stream of the one before
(conditional decoding). Here the inputs of a scale lie on its grid already, so that control and
stream meet cell by cell, without a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
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


@dataclass(frozen=True, kw_only=True)
class AdditiveConfig(ControlConfig):
    """ControlAR: projected features are added to the stream before some blocks."""

    num_sites: int = 3
    """Blocks that get an addition, evenly spaced; `sites` names them instead."""
    projection: Literal["mlp", "per_scale"] = "mlp"
    """mlp: two shared MLPs, then one per site (ControlAR); per_scale: one linear map per site and
    scale (SCALAR, arXiv 2507.19946)."""
    hidden: int | None = None
    """Channels between the layers of the MLPs; None: the base's width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_sites", "hidden"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        allowed = ("mlp", "per_scale")
        value = self.projection
        require("projection", value, value in allowed, f"be one of {', '.join(allowed)}")


class AdditiveControl(ControlModule):
    """h <- h + strength * P_j(u) before the blocks j of `sites` (section 3.2 of the paper).

    u = A(E(c)) at the cells of each scale, P_j = M_j(B(u)), all MLPs Linear, tanh-GELU, Linear
    without biases, so that a control of zeros adds exactly zero. Differs from the released code:
    the last layers of the M_j begin at zero and stay so until training (a later initialisation
    overwrites theirs), and the sites are explicit.
    """

    architecture = "additive"
    config_class = AdditiveConfig
    config: AdditiveConfig

    def __init__(
        self, config: AdditiveConfig, base: TransformerConfig, record: ControlRecord
    ) -> None:
        super().__init__(config, base, record)
        width = base.resolved_width
        self.sites = config.sites or evenly(config.num_sites, base.depth)
        self.output: nn.ModuleList
        if config.projection == "mlp":
            hidden = config.hidden or width
            self.inner = nn.Sequential(
                bias_free_mlp(self.encoder.width, hidden, hidden),
                bias_free_mlp(hidden, hidden, hidden),
            )
            self.output = nn.ModuleList(bias_free_mlp(hidden, hidden, width) for _ in self.sites)
            last = [mlp[-1] for mlp in self.output]  # pyright: ignore[reportIndexIssue]
        else:
            scales = range(self.schedule.num_scales)
            self.inner = nn.Identity()
            self.output = nn.ModuleList(
                nn.ModuleList(nn.Linear(self.encoder.width, width, bias=False) for _ in scales)
                for _ in self.sites
            )
            last = [linear for site in self.output for linear in site]  # pyright: ignore
        for linear in last:
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)

    def state(
        self, features: Float[Tensor, "m t e"], base: NextScaleTransformer, *, cached: bool
    ) -> ControlState:
        """All additions at once, before the first scale."""
        inner = self.inner(features)
        if self.config.projection == "mlp":
            return _Additions({j: f(inner) for j, f in zip(self.sites, self.output, strict=True)})
        parts = [inner[:, where] for where in self.schedule.slices]
        added = [
            torch.cat([linear(part) for linear, part in zip(site, parts, strict=True)], dim=1)  # pyright: ignore
            for site in self.output
        ]
        return _Additions(dict(zip(self.sites, added, strict=True)))


class _Additions(ControlState):
    """The additions of every site, [m, t, d] each."""

    def __init__(self, added: dict[int, Tensor]) -> None:
        self.added = added

    def contribution(
        self,
        block: int,
        where: slice,
        x: Float[Tensor, "r l d"],
        pooled: Float[Tensor, "r 1 d"],
        pictures: Int[Tensor, " r"],
    ) -> Float[Tensor, "r l d"] | None:
        """P_j(u) of each row's map."""
        return self.added[block][:, where][pictures] if block in self.added else None


def bias_free_mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, tanh-GELU, Linear; zero stays zero.

    Features keep their size at initialisation: with torch's own, five layers in a row would shrink
    them a hundredfold, and what is added to the stream would take thousands of steps to count.
    """
    mlp = nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Linear(hidden, out, bias=False),
    )
    for layer, gain in ((mlp[0], 1.0), (mlp[2], 2**0.5)):  # GELU about halves the squares
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
    return mlp
