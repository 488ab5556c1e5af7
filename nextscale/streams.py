"""Random streams: every draw is a function of integers that can be written down.

Nothing here touches a global random state. What belongs to an image is drawn from the image's own
stream, and what belongs to training is keyed by (seed, step, index), so that neither the batch
size, nor the number of processes, nor a resume changes a draw.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from nextscale.errors import UserError

if TYPE_CHECKING:
    import torch

SEED_LIMIT = 2**32
"""Image seeds lie in [0, SEED_LIMIT): torch's CPU generator keeps no more than 32 bits."""


def stream(*key: int) -> torch.Generator:
    """Open the random stream that belongs to a key, such as (seed, step, index).

    The seed is a 64-bit BLAKE2b hash of the whole tuple, so that neighbouring keys, and keys of
    different length, share nothing. torch's CPU generator uses the lower 32 bits of it: among n
    keys about n^2 / 2^33 pairs coincide, which is harmless for training noise and for rollouts.

    Args:
        key: One or more integers of any size and sign.

    Returns:
        A fresh CPU generator at the start of its stream.

    Raises:
        UserError: If the key is empty.
        TypeError: If a part of the key is not an integer.
    """
    import torch

    if not key:
        raise UserError("stream() needs at least one integer, for example stream(seed, step).")
    text = ",".join(str(index(part)) for part in key)
    digest = blake2b(text.encode("ascii"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def image_stream(seed: int) -> torch.Generator:
    """Open the stream of one generated image; image i of a call uses its base seed + i.

    Args:
        seed: The image's own seed, in [0, 2^32).

    Returns:
        A CPU generator, seeded with `seed` itself so that others can rebuild it with torch alone.

    Raises:
        UserError: If the seed is out of range.
    """
    import torch

    if not 0 <= seed < SEED_LIMIT:
        raise UserError(
            f"seed must be in [0, 4294967295] for every image, got {seed}. Image i of a call uses "
            "seed + i: choose a smaller (and not a negative) seed."
        )
    return torch.Generator().manual_seed(index(seed))


def random_seed() -> int:
    """Pick a base seed when the person gave none.

    Returns:
        An integer in [0, 2^31), from the operating system. The upper half of the 32-bit range
        stays free, so that seed + i is valid for two thousand million images.
    """
    return secrets.randbelow(2**31)


def image_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    count: int,
) -> list[int]:
    """One seed per image (design: image i draws from seed + i).

    Raises:
        UserError: If both are given, a list has the wrong length, or a seed is out of range.
    """
    if seed is not None and generator is not None:
        raise UserError("pass seed or generator, not both")
    if isinstance(generator, list):
        if len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} images; pass one per image")
        return [_draw_seed(g) for g in generator]
    if generator is not None:
        seed = _draw_seed(generator) // 2
    if seed is None:
        seed = random_seed()
    if isinstance(seed, Sequence | np.ndarray):
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} images; pass one per image")
        return [index(s) for s in seed]
    seed = index(seed)
    if not 0 <= seed <= SEED_LIMIT - count:
        raise UserError(
            f"seed {seed} is out of range: image i uses seed + i, which must lie in [0, 2^32)"
        )
    return list(range(seed, seed + count))


def candidate_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """Seeds of `count` candidates of each picture, one after the other.

    Candidate 0 is the picture of the seed; the others have streams of (seed, candidate).
    """
    return [_draw_seed(stream(seed, j)) if j else seed for seed in seeds for j in range(count)]


def _draw_seed(generator: torch.Generator) -> int:
    import torch

    return int(torch.randint(SEED_LIMIT, (), generator=generator, device=generator.device))


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Int64[np.ndarray, " b"]:
    """Say which examples a training step sees.

    Training reads an endless sequence of shuffled epochs, and step s takes the entries
    [s * batch_size, (s + 1) * batch_size) of it. A batch may thus straddle two epochs (or more, if
    it is larger than the dataset), and no example is dropped or seen twice within an epoch.

    Args:
        seed: Seed of the data order, 0 or more.
        step: Optimizer step, counted from 0.
        batch_size: Examples per step over all processes, 1 or more.
        size: Examples in the dataset, 1 or more.

    Returns:
        `batch_size` indices in [0, size).

    Raises:
        UserError: If an argument is out of range.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("step", step, 0),
        ("batch_size", batch_size, 1),
        ("size (examples in the dataset)", size, 1),
    ):
        if value < least:
            raise UserError(f"{name} must be {least} or more, got {value}.")
    start, end = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // size, (end - 1) // size + 1):
        first = epoch * size
        order = _permutation(seed, epoch, size)
        parts.append(order[max(start - first, 0) : min(end - first, size)])
    return np.concatenate(parts)


@lru_cache(maxsize=4)  # a batch needs two at most times; an entry can hold millions of indices
def _permutation(seed: int, epoch: int, size: int) -> Int64[np.ndarray, " b"]:
    # NumPy promises stable raw bits of PCG64 over its versions, but not a stable
    # `Generator.permutation`: sorting the raw bits keeps old runs resumable.
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order
