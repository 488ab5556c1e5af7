"""Which kernels training takes where torch's choice is slow."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def trained_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For the forward pass of what is trained: attention by plain products on the CPU.

    The backward pass of torch's fused kernel takes twice as long there in bfloat16. Where no
    gradient is wanted the fused kernel stays.
    """
    if device.type == "cpu" and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
