"""Which kernels training takes where torch's choice is slow."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def trained_attention(
    device: torch.device, network: nn.Module
) -> contextlib.AbstractContextManager[Any]:
    """For the forward pass of what is trained: attention by plain products on the CPU.

    The backward pass of torch's fused kernel takes twice as long there in bfloat16. A reference
    that is compared with the network belongs under it too, so that both round alike. With gradient
    checkpointing nothing is chosen: the pass would be repeated outside of this context.
    """
    repeated = any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
    if device.type == "cpu" and not repeated:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
