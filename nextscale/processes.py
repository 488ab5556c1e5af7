"""What a process must know of its siblings under torchrun or accelerate launch.

Thin on purpose: starting the process group is accelerate's work. Everything here also holds with
one process and without accelerate, and importing this module does not import torch.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    group = _group()
    return group.get_rank() if group else _launched("RANK", 0)


def local_rank() -> int:
    """Number of this process on its machine, from 0: also the index of its GPU."""
    return _launched("LOCAL_RANK", 0)


def world_size() -> int:
    """How many processes take part in the run, 1 without a launcher."""
    group = _group()
    return group.get_world_size() if group else _launched("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process is the one that writes, prints and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here; returns at once in a run of one process.

    Raises:
        RuntimeError: If several processes were launched but no process group exists yet: going on
            without waiting would be a race.
    """
    if world_size() == 1:
        return
    group = _group()
    if group is None:
        raise RuntimeError(
            "barrier() was called before the process group exists. "
            "Create accelerate's PartialState (or Accelerator) first."
        )
    if group.get_backend() == "nccl":
        # NCCL would otherwise guess the device from the global rank, wrongly on a second machine.
        group.barrier(device_ids=[local_rank()])
    else:
        group.barrier()


def own_range(count: int) -> range:
    """Give this process its share of the items 0..count-1.

    The shares are contiguous, in the order of the ranks, cover every item once, and differ in
    length by one at most. With fewer items than processes some shares are empty.

    Args:
        count: Number of items of the whole run, 0 or more.

    Returns:
        The items of this process.
    """
    this, total = rank(), world_size()
    return range(this * count // total, (this + 1) * count // total)


def cores() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def gather(value: T) -> list[T]:
    """What every process holds, in the order of the ranks, on every process.

    Args:
        value: Anything that can be pickled; tensors on the CPU.
    """
    if world_size() == 1:
        return [value]
    group = _group()
    if group is None:
        raise RuntimeError("gather() was called before the process group exists.")
    values: list[Any] = [None] * world_size()
    group.all_gather_object(values, value)
    return values


def cpu_prefers_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16: AMX, or AVX-512 BF16.

    With them bfloat16 takes a fifth to a half of float32's time; without them, more than float32.
    """
    import torch

    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the kernel; elsewhere a no-op.

    Every large tensor on the CPU would otherwise be mapped, faulted in and unmapped anew, which
    costs a tenth to a fifth of sampling and training. For programs, not for libraries: the setting
    holds for the whole process, whose memory then stays at its peak.
    """
    import ctypes

    if sys.platform == "linux":
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, 2**31 - 1)


def _group() -> ModuleType | None:
    """torch.distributed, if a process group is up; a group cannot be up before its import."""
    module = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return None
    return module


def _launched(variable: str, alone: int) -> int:
    # Clusters set WORLD_SIZE or LOCAL_RANK for purposes of their own; torchrun sets all of these.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return alone
    return int(os.environ.get(variable, alone))
