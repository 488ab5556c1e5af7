"""Several processes under torchrun or accelerate launch: meet, agree, wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from nextscale import processes
from nextscale.cli.console import Failed
from nextscale.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """A group of all processes for the block; nothing happens in a run of one process."""
    if processes.world_size() == 1:
        yield
        return
    import torch.distributed as dist

    # Shards of a bulk run can take days, and a dead process breaks its connections at once.
    dist.init_process_group("gloo", timeout=timedelta(days=14))
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_main(work: Callable[[], T]) -> T:
    """Do something in the main process alone; every process gets the result, or the error."""
    if processes.world_size() == 1:
        return work()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if processes.is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            failed = error
            outcome[1] = (str(error), getattr(error, "exit_code", 1))
    dist.broadcast_object_list(outcome)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise Failed(outcome[1][0], exit_code=outcome[1][1])
    return outcome[0]


def pick_device(name: str | None) -> str:
    """The device of this process: as named, else its GPU, else the CPU.

    Raises:
        UserError: If there is no such device.
    """
    import torch

    if name is None:
        return f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'device "{name}" is unknown. Use cpu, cuda or cuda:0.') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device "{name}" is not available: PyTorch finds no GPU. Use cpu.')
    if device.type not in ("cpu", "cuda") and not _usable(device):
        raise UserError(f'device "{name}" cannot be used here. Use cpu, cuda or cuda:0.')
    if device.type == "cuda" and device.index is None:
        return f"cuda:{processes.local_rank()}"
    return name


def _usable(device: torch.device) -> bool:
    """Whether an accelerator other than CUDA computes: Apple's mps, Intel's xpu."""
    import torch

    try:
        return device.type != "meta" and bool(torch.ones(1, device=device).item())
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return False
