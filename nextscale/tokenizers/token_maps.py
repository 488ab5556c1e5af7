"""Token maps on disk: images encoded once, read by many trainings.

index.json                      what, by which tokenizer, how many per split; written last
train-00000.safetensors         tokens int16 or int32 [n, L], labels int64 [n] where there are
train-00000.captions.jsonl      one JSON string per line, where there are captions
validation-00000.safetensors    likewise
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from nextscale import processes, storage
from nextscale.data.images import to_float
from nextscale.data.sources import ImageSource
from nextscale.errors import UserError
from nextscale.tokenizers.schedule import ScaleSchedule
from nextscale.tokenizers.tokenizer import MultiscaleVQ

FORMAT_VERSION = 1
SHARD_SIZE = 10_000
INDEX = "index.json"
_DTYPES = {"I16": np.int16, "I32": np.int32, "I64": np.int64}


def write_token_maps(
    folder: str | Path,
    tokenizer: MultiscaleVQ,
    sources: Mapping[str, ImageSource],
    *,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> TokenMaps:
    """Encode images and write them shard by shard; every process of a run takes its share.

    Args:
        folder: Where to. Without `index.json` the folder is unfinished, and readers refuse it.
        tokenizer: The encoder.
        sources: Images by split, "train" and perhaps "validation".
        batch_size: Images encoded at a time.
        shard_size: Images per file.
        facts: Further entries for the index, such as the name of the dataset.
        progress: Show a bar over this process's images.
    """
    from tqdm import tqdm

    folder = Path(folder)
    shards = [
        _Shard(split, number, range(start, min(start + shard_size, len(source))))
        for split, source in sources.items()
        for number, start in enumerate(range(0, len(source), shard_size))
    ]
    own = [shards[i] for i in processes.own_range(len(shards))]
    total = sum(len(shard.rows) for shard in own)
    with tqdm(total=total, unit="image", desc="encode", disable=not progress) as bar:
        for shard in own:
            _write_shard(folder, shard, tokenizer, sources[shard.split], batch_size, bar)
    processes.barrier()
    if processes.is_main():
        first = next(iter(sources.values()))
        counts = {s: _count(folder / f"{s.name}.safetensors") for s in shards}
        index = {
            "format_version": FORMAT_VERSION,
            "class": "TokenMaps",
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "scales": tokenizer.schedule.to_list(),
            "codebook_size": tokenizer.config.codebook_size,
            "num_classes": first.num_classes,
            "class_names": first.class_names,
            "has_captions": first.has_captions,
            "splits": {
                split: [[s.name, n] for s, n in counts.items() if s.split == split and n]
                for split in sources
            },
            "facts": dict(facts or {}),
        }
        storage.write_json(folder / INDEX, index)
    processes.barrier()
    return TokenMaps(folder, split=next(iter(sources)))


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _write_shard(
    folder: Path,
    shard: _Shard,
    tokenizer: MultiscaleVQ,
    source: ImageSource,
    batch_size: int,
    bar: Any,
) -> None:
    device = tokenizer.quant_conv.weight.device
    small = tokenizer.config.codebook_size <= 2**15
    tokens, labels, captions = [], [], []
    for start in range(0, len(shard.rows), batch_size):
        batch = source.load(np.asarray(shard.rows[start : start + batch_size]))
        codes = tokenizer.encode(to_float(batch.images).to(device))
        bar.update(len(codes))
        # A picture that cannot be read has no tokens: no other one stands in for it here.
        read = torch.ones(len(codes), dtype=torch.bool)
        if batch.stand_in is not None:
            read = torch.from_numpy(~batch.stand_in)
        tokens.append(codes.cpu()[read].to(torch.int16 if small else torch.int32))
        if batch.labels is not None:
            labels.append(batch.labels[read])
        captions += [c for c, good in zip(batch.captions or (), read, strict=False) if good]
    tensors = {"tokens": torch.cat(tokens)}
    if labels:
        tensors["labels"] = torch.cat(labels)
    if captions:
        lines = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in captions)
        storage.write_bytes(folder / f"{shard.name}.captions.jsonl", lines.encode())
    storage.write_tensors(folder / f"{shard.name}.safetensors", tensors)


def _count(path: Path) -> int:
    """How many token maps a shard holds."""
    with safe_open(path, framework="numpy") as file:
        return file.get_slice("tokens").get_shape()[0]


def is_token_maps(path: str | Path) -> bool:
    """Whether `path` is a folder of token maps."""
    return (Path(path) / INDEX).is_file()


class TokenMaps:
    """Reads a split of a folder of token maps; the tokens stay on disk, mapped into memory.

    Args:
        folder: Written by `write_token_maps` (`nextscale encode`).
        split: "train" or "validation".
        num_images: Only the first so many.

    Attributes:
        schedule: Scales of the token maps.
        fingerprint: Of the tokenizer that made them.
        codebook_size: V.
        num_classes: Labels lie in [0, num_classes); None without labels.
        class_names: Their names, or None.
        has_captions: Whether there are captions.

    Raises:
        UserError: If the folder is unfinished or damaged, or has no such split.
    """

    def __init__(
        self, folder: str | Path, *, split: str = "train", num_images: int | None = None
    ) -> None:
        self.folder = folder = Path(folder)
        if not is_token_maps(folder):
            raise UserError(
                f"{folder} holds no finished token maps (no {INDEX}). Make them with: "
                f"nextscale encode --output_dir {folder}"
            )
        index = storage.read_config(folder / INDEX, FORMAT_VERSION, "TokenMaps")
        if not index["splits"].get(split):
            raise UserError(
                f'{folder} has no images of the split "{split}", only '
                f"{', '.join(index['splits'])}. Encode again with --num_validation_images above 0."
            )
        self.schedule = ScaleSchedule(index["scales"])
        self.fingerprint: str = index["fingerprint"]
        self.codebook_size: int = index["codebook_size"]
        self.num_classes: int | None = index["num_classes"]
        self.class_names: list[str] | None = index["class_names"]
        self.has_captions: bool = index["has_captions"]
        self.split = split
        shards = index["splits"][split]
        self._starts = np.cumsum([0, *(count for _, count in shards)])
        total = int(self._starts[-1])
        self._length = total if num_images is None else min(num_images, total)
        shape = (self.schedule.num_tokens,)
        self._tokens = [
            _map(folder / f"{name}.safetensors", "tokens", (count, *shape))
            for name, count in shards
        ]
        self._labels = None
        if self.num_classes is not None:
            self._labels = [
                _map(folder / f"{name}.safetensors", "labels", (count,)) for name, count in shards
            ]
        self._captions: list[str] | None = None
        if self.has_captions:
            self._captions = [c for n, count in shards for c in _captions(folder, n, count)]

    def __len__(self) -> int:
        return self._length

    def load(
        self, indices: np.ndarray
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"] | None, list[str] | None]:
        """Tokens [b, L], labels [b] or None, captions or None."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices must lie in 0..{len(self) - 1}")
        captions = self._captions
        return (
            self._gather(self._tokens, indices),
            None if self._labels is None else self._gather(self._labels, indices),
            None if captions is None else [captions[i] for i in indices],
        )

    def captions(self, indices: np.ndarray) -> list[str]:
        """The captions of images `indices`; empty if there are none."""
        return [] if self._captions is None else [self._captions[i] for i in indices]

    def check_tokenizer(self, tokenizer: MultiscaleVQ) -> None:
        """Refuse another tokenizer than the one that made the maps.

        Raises:
            UserError: If the fingerprints differ.
        """
        if tokenizer_fingerprint(tokenizer) != self.fingerprint:
            raise UserError(
                f"the token maps in {self.folder} were made by another tokenizer (fingerprint "
                f"{self.fingerprint[:12]}). Encode the images again with this one."
            )

    def _gather(self, shards: list[np.ndarray], indices: np.ndarray) -> Tensor:
        where = np.searchsorted(self._starts, indices, side="right") - 1
        result = np.empty((len(indices), *shards[0].shape[1:]), dtype=np.int64)
        for shard in np.unique(where):
            rows = where == shard
            result[rows] = shards[shard][indices[rows] - self._starts[shard]]
        return torch.from_numpy(result)


def tokenizer_fingerprint(tokenizer: MultiscaleVQ) -> str:
    """Hash of what decides the tokens: encoder and quantizer, in bfloat16 whatever is loaded."""
    state = {
        name: tensor.detach().to(torch.bfloat16)
        for name, tensor in tokenizer.state_dict().items()
        if name.startswith(("encoder.", "quant_conv.", "quantizer."))
        and name != "quantizer.usage"  # statistics, not weights
    }
    return storage.fingerprint(state)


def _map(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a safetensors file as an array that is read on demand."""
    storage.read_metadata(path)  # refuses a missing or truncated file
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    entry = header.get(name)
    if entry is None or tuple(entry["shape"]) != shape or entry["dtype"] not in _DTYPES:
        raise UserError(f"{path} holds no {name} of shape {list(shape)}. Encode the images again.")
    start = 8 + size + entry["data_offsets"][0]
    return np.memmap(path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=start, shape=shape)


def _captions(folder: Path, name: str, count: int) -> list[str]:
    path = folder / f"{name}.captions.jsonl"
    try:
        captions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. Encode the images again.") from error
    if len(captions) != count:
        raise UserError(f"{path} has {len(captions)} captions for {count} images. Encode again.")
    return captions
