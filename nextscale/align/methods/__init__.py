"""Methods: what a rollout teaches. Each is a small file of parts that the others share."""

from __future__ import annotations

from nextscale.align.methods.dpo import DPO
from nextscale.align.methods.grpo import GRPO
from nextscale.align.methods.method import Method
from nextscale.align.methods.raft import RAFT

METHODS: dict[str, type[Method]] = {"grpo": GRPO, "dpo": DPO, "raft": RAFT}

__all__ = ["DPO", "GRPO", "METHODS", "RAFT", "Method"]
