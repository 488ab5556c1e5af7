"""Methods: what a rollout teaches. Each is a small file of parts that the others share."""

from __future__ import annotations

from nextscale.align.methods.b2 import B2
from nextscale.align.methods.dpo import DPO
from nextscale.align.methods.dragon import DRAGON
from nextscale.align.methods.find import FIND
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.method import Method
from nextscale.align.methods.raft import RAFT

METHODS: dict[str, type[Method]] = {
    "grpo": GRPO,
    "dpo": DPO,
    "raft": RAFT,
    "b2": B2,
    "dragon": DRAGON,
    "find": FIND,
}

__all__ = ["B2", "DPO", "DRAGON", "FIND", "GRPO", "METHODS", "RAFT", "Method"]
