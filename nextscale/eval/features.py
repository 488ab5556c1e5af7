"""One pass over a set of pictures: features once, and of them what the metrics need."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nextscale import processes
from nextscale.errors import UserError
from nextscale.eval.frechet import Moments
from nextscale.eval.images import Images
from nextscale.eval.scores import SplitProbabilities

T = TypeVar("T")

_BUFFER = 256  # rows of a block that are merged at once: a merge costs d^2, whatever its size


class Network(Protocol):
    """Features of pictures.

    Attributes:
        taps: Width of each kind of features, by name.
        labels: What stands in brackets behind figures on a tap, such as the protocol.
    """

    taps: Mapping[str, int]
    labels: Mapping[str, str]

    def __call__(self, images: Sequence[np.ndarray], indices: Sequence[int]) -> dict[str, Tensor]:
        """float32 (scores of pairs: float64) [b, d] per tap, of pictures `indices` of the set."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        ...


def exact_convolutions() -> AbstractContextManager[None]:
    """CuDNN without TF32, whose ten bits a figure would show."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Joined:
    """Several networks over the same pictures."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self.networks = networks
        self.taps: Mapping[str, int] = {k: v for n in networks for k, v in n.taps.items()}
        self.labels: Mapping[str, str] = {k: v for n in networks for k, v in n.labels.items()}

    def __call__(self, images: Sequence[np.ndarray], indices: Sequence[int]) -> dict[str, Tensor]:
        """The taps of all."""
        return {k: v for n in self.networks for k, v in n(images, indices).items()}

    def fingerprint(self) -> dict[str, str]:
        """Of all."""
        return {k: v for n in self.networks for k, v in n.fingerprint().items()}


@dataclass
class Features:
    """What a pass leaves.

    Attributes:
        count: Pictures.
        blocks: Moments of each part of the set, by tap.
        rows: Features [n, d] in the order of the pictures, for taps that were asked for.
        probabilities: For the Inception score, of each part of the set.
        shapes: (height, width) of each picture.
        kinds: Format and mode of each file, such as "PNG RGB"; empty where there are no files.
        digests: Hash of each picture's pixels.
        part: In which of the `blocks` each picture is, int64 [n].
    """

    count: int
    blocks: dict[str, list[Moments]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    probabilities: list[SplitProbabilities] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    part: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many pictures have which (height, width)."""
        return Counter(self.shapes)

    def moments(self, tap: str) -> Moments:
        """Of all pictures."""
        first, *others = self.blocks[tap]
        for block in others:
            first = first.merge(block)
        return first


def extract(
    images: Images,
    network: Network,
    *,
    moments: Sequence[str] = (),
    rows: Sequence[str] = (),
    blocks: int = 1,
    splits: np.ndarray | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = False,
    label: str = "features",
) -> Features:
    """Run the network once over the pictures; each process of a run takes its share.

    Args:
        images: The set.
        network: Gives the taps.
        moments: Taps whose moments are kept (memory does not grow with the set).
        rows: Taps whose features are kept.
        blocks: Parts of the set whose moments and probabilities are kept apart, for the
            delete-block jackknife; each has as many of every class (of `images.labels`).
        splits: For the Inception score, from the tap "logits": the split of each picture, [n].
        batch_size: Pictures at once.
        num_workers: Processes that decode; 0 = this one.
        progress: Show a bar.
        label: Of the bar.

    Returns:
        The same on every process, whatever their number and the batch size: counts, sums and order
        go by the pictures' indices, and none is counted twice.

    Raises:
        UserError: For a picture that cannot be read, and features that are not finite.
    """
    total = len(images)
    own = processes.own_range(total)
    part = parts_of(total, blocks, images.labels)
    found = Features(
        len(own), {tap: [Moments.empty(network.taps[tap])] * blocks for tap in moments}
    )
    if splits is not None:
        number = int(splits.max()) + 1
        classes = network.taps["logits"]
        found.probabilities = [SplitProbabilities.empty(number, classes) for _ in range(blocks)]
    kept: dict[str, list[np.ndarray]] = {tap: [] for tap in rows}
    buffers = {tap: [[] for _ in range(blocks)] for tap in moments}
    with tqdm(total=len(own), desc=label, unit="image", disable=not progress) as bar:
        for indices, pictures, digests, kinds in _batches(images, own, batch_size, num_workers):
            taps = network(pictures, indices)
            found.shapes += [(picture.shape[0], picture.shape[1]) for picture in pictures]
            found.digests += digests
            found.kinds += kinds
            for tap in {*moments, *rows}:
                _check_finite(taps[tap], indices, images, tap)
            for tap in rows:
                kept[tap].append(taps[tap].cpu().numpy())
            for tap in moments:
                _buffer(buffers[tap], found.blocks[tap], taps[tap], part[indices])
            if splits is not None:
                logits = taps["logits"].cpu()
                for block in np.unique(part[indices]):
                    here = part[indices] == block
                    inside = logits[torch.from_numpy(here)]
                    found.probabilities[block].add(inside, splits[indices][here])
            bar.update(len(indices))
    for tap in moments:
        for block in range(blocks):
            _flush(buffers[tap], found.blocks[tap], block)
    width = network.taps
    found.rows = {
        tap: np.concatenate(parts) if parts else np.zeros((0, width[tap]), np.float32)
        for tap, parts in kept.items()
    }
    whole = _merge(processes.gather(found))
    assert whole.count == len(whole.digests) == total
    whole.part = part
    return whole


def parts_of(count: int, blocks: int, labels: np.ndarray | None = None) -> np.ndarray:
    """The part of each of `count` pictures, int64 [count]: in turn, class by class."""
    order = np.arange(count) if labels is None else np.argsort(labels, kind="stable")
    part = np.empty(count, np.int64)
    part[order] = np.arange(count) % blocks
    return part


def _buffer(
    buffers: list[list[Tensor]], blocks: list[Moments], features: Tensor, part: np.ndarray
) -> None:
    for row, block in zip(features.cpu().double(), part.tolist(), strict=True):
        buffers[block].append(row)
        if len(buffers[block]) == _BUFFER:
            _flush(buffers, blocks, block)


def _flush(buffers: list[list[Tensor]], blocks: list[Moments], block: int) -> None:
    if buffers[block]:
        blocks[block] = blocks[block].merge(Moments.of(torch.stack(buffers[block])))
        buffers[block].clear()


def _merge(parts: list[Features]) -> Features:
    """The parts of all processes, in the order of the ranks."""
    whole = parts[0]
    for part in parts[1:]:
        whole.count += part.count
        for tap, blocks in part.blocks.items():
            pairs = zip(whole.blocks[tap], blocks, strict=True)
            whole.blocks[tap] = [a.merge(b) for a, b in pairs]
        for tap, rows in part.rows.items():
            whole.rows[tap] = np.concatenate([whole.rows[tap], rows])
        both = zip(whole.probabilities, part.probabilities, strict=True)
        whole.probabilities = [a.merge(b) for a, b in both]
        whole.shapes += part.shapes
        whole.kinds += part.kinds
        whole.digests += part.digests
    return whole


def _batches(
    images: Images, own: range, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], list[np.ndarray], list[bytes], list[str]]]:
    plan = [list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)]
    if num_workers and images.parallel and len(plan) > 1:
        # One item is one batch: workers decode whole batches.
        loader = torch.utils.data.DataLoader(
            _Plan(images, plan),
            batch_size=None,
            num_workers=min(num_workers, len(plan), processes.cores()),
            collate_fn=_as_it_is,
        )
    else:
        reading = _Plan(images, plan)
        loader = (reading[i] for i in range(len(plan)))
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Plan(torch.utils.data.Dataset[Any]):
    """Batch i of the pictures, for a DataLoader."""

    def __init__(self, images: Images, plan: list[list[int]]) -> None:
        self.images, self.plan = images, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(
        self, i: int
    ) -> tuple[list[int], list[np.ndarray], list[bytes], list[str]] | UserError:
        try:
            pictures = self.images.load(self.plan[i])
        except UserError as error:  # raised by the reader: a worker would wrap it
            return error
        kinds = [self.images.kinds[row] for row in self.plan[i] if row in self.images.kinds]
        return self.plan[i], pictures, [_digest(picture) for picture in pictures], kinds


def _as_it_is(batch: T) -> T:
    """In place of torch's own conversion to tensors."""
    return batch


def _digest(picture: np.ndarray) -> bytes:
    shape = np.asarray(picture.shape, dtype=np.int64).tobytes()
    pixels = np.ascontiguousarray(picture).data
    return hashlib.blake2b(pixels, digest_size=16, salt=shape[:16]).digest()


def _check_finite(features: Tensor, indices: Sequence[int], images: Images, tap: str) -> None:
    bad = ~features.isfinite().all(dim=1)
    if bool(bad.any()):
        index = indices[int(bad.nonzero()[0])]
        raise UserError(f"the features ({tap}) of {images.name(index)} are not finite", exit_code=1)


def fingerprint_of(features: Features) -> str:
    """SHA-256 over the hashes of all pictures' pixels, in order."""
    return hashlib.sha256(b"".join(features.digests)).hexdigest()
