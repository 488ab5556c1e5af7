"""Methods: what a rollout teaches. Each is a small file of parts that the others share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nextscale.align.methods.b2 import B2
from nextscale.align.methods.d2o import D2O
from nextscale.align.methods.diffusion_nft import DiffusionNFT
from nextscale.align.methods.dpo import DPO
from nextscale.align.methods.dragon import DRAGON
from nextscale.align.methods.fdpg import FDPG
from nextscale.align.methods.find import FIND
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.method import Method
from nextscale.align.methods.nft import NFT
from nextscale.align.methods.r0 import R0
from nextscale.align.methods.raft import RAFT
from nextscale.align.methods.reg_grpo import RegGRPO
from nextscale.align.methods.seppo import SePPO
from nextscale.align.methods.sibling import Sibling
from nextscale.align.trajectory import Policy

METHODS: dict[str, Callable[[Any, Policy], Method]] = {
    "grpo": GRPO,
    "dpo": DPO,
    "raft": RAFT,
    "b2": B2,
    "dragon": DRAGON,
    "find": FIND,
    "fdpg": FDPG,
    "reg_grpo": RegGRPO,
    "nft": NFT,
    "diffusion_nft": DiffusionNFT,
    "d2o": D2O,
    "r0": R0,
    "sibling": Sibling,
    "seppo": SePPO,
}

__all__ = [
    "B2",
    "D2O",
    "DPO",
    "DRAGON",
    "FDPG",
    "FIND",
    "GRPO",
    "METHODS",
    "NFT",
    "R0",
    "RAFT",
    "DiffusionNFT",
    "Method",
    "RegGRPO",
    "SePPO",
    "Sibling",
]
