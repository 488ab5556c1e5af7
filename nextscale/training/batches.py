"""Which examples each process sees in each micro-step, and loading them ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from nextscale.streams import batch_indices
from nextscale.training.config import TrainingConfig

LoadBatch = Callable[[np.ndarray, int], Any]


def global_batch_size(config: TrainingConfig, world_size: int) -> int:
    """Images per optimizer step over all processes and micro-batches."""
    return config.train_batch_size * config.gradient_accumulation_steps * world_size


def micro_batch(
    config: TrainingConfig, size: int, step: int, micro: int, rank: int, world_size: int
) -> np.ndarray:
    """Dataset indices of one micro-batch of one process.

    The step's global batch depends on its size alone, so that 8 = 2 processes x 4 = 2 micro x 4.
    """
    whole = batch_indices(config.seed, step, global_batch_size(config, world_size), size)
    first = (micro * world_size + rank) * config.train_batch_size
    return whole[first : first + config.train_batch_size]


def batches(
    config: TrainingConfig,
    load_batch: LoadBatch,
    size: int,
    start: int,
    rank: int,
    world_size: int,
    *,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Load this process's micro-batches in order, from optimizer step `start` on."""

    def schedule() -> Iterator[tuple[np.ndarray, int]]:
        for step in range(start, config.max_train_steps):
            for micro in range(config.gradient_accumulation_steps):
                yield micro_batch(config, size, step, micro, rank, world_size), step

    if config.dataloader_num_workers == 0:
        for indices, step in schedule():
            yield load_batch(indices, step)
        return
    yield from DataLoader(
        _Batches(load_batch),
        sampler=_Schedule(schedule),
        batch_size=None,  # an item is a whole batch already
        collate_fn=_unchanged,
        num_workers=config.dataloader_num_workers,
        pin_memory=pin_memory,
    )


class _Batches(Dataset):
    """Lets DataLoader's workers call `load_batch` with an (indices, step) pair as the key."""

    def __init__(self, load_batch: LoadBatch) -> None:
        self.load_batch = load_batch

    def __getitem__(self, key: tuple[np.ndarray, int]) -> Any:
        return self.load_batch(*key)


class _Schedule:
    """An iterable made from a generator function."""

    def __init__(self, start: Callable[[], Iterator[tuple[np.ndarray, int]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return self.start()


def _unchanged(batch: Any) -> Any:
    return batch
