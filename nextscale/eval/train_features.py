"""`nextscale train features`: the small network behind `fd_scenes`, or one for other pictures."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from nextscale import processes
from nextscale.data.config import DataConfig, open_dataset
from nextscale.data.images import to_float, to_uint8
from nextscale.data.sources import ImageSource
from nextscale.errors import UserError, require
from nextscale.eval.feature_network import FeatureNetwork, FeatureNetworkConfig
from nextscale.streams import stream
from nextscale.training import FitResult, TrainingConfig, adamw, decay_groups, fit

CAPTIONS = 20_000  # of the dataset, that are read to learn its words
# Largest faults that features learn to measure: Gaussian blur (pixels of 64), noise and colour
# shift (of the range [0, 1]).
MAX_BLUR, MAX_NOISE, MAX_SHIFT = 2.0, 0.2, 0.15


@dataclass(frozen=True, kw_only=True)
class FeaturesTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train features`: pictures with captions or class labels."""

    channels: tuple[int, int, int, int] = FeatureNetworkConfig.channels
    """Channels of each stage; the last is the features' d, at most 128."""
    blocks: tuple[int, int, int, int] = FeatureNetworkConfig.blocks
    """Residual blocks of each stage."""
    num_phrases: int = 256
    """The most frequent words and pairs of neighbouring words of the captions are what the
    features must tell."""
    degraded: float = 0.5
    """Share of pictures that are blurred; likewise noisy, and shifted in colour. The features must
    tell how much, so that a Fréchet distance on them sees faults of the pictures."""
    num_validation_images: int = 2000
    """Pictures of the validation split."""
    use_ema: bool = False
    """Off: averaged weights would not fit the statistics of the batch norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("use_ema", self.use_ema, not self.use_ema, "be false: there are batch norms")
        require("degraded", self.degraded, 0 <= self.degraded <= 1, "lie in [0, 1]")
        for name in ("num_phrases", "num_validation_images"):
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")


class _Targets(nn.Module):
    """The feature network with a linear layer for what it has to tell."""

    def __init__(self, network: FeatureNetwork, num_targets: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.dim, num_targets)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.network(images))


def train_features(config: FeaturesTrainingConfig, *, progress: bool = True) -> FitResult:
    """Train a feature network and save it in `output_dir/model`.

    The network learns which phrases a picture's caption holds (or its class), and how blurred,
    noisy and shifted in colour the picture was made.

    Returns:
        The result of the loop; `metrics` holds `val/loss`, `val/phrases` (balanced accuracy, mean
        over phrases) and `val/faults` (R^2 of the faults' sizes).
    """
    source = open_dataset(config, "train", seed=config.seed)
    validation = open_dataset(config, "validation", seed=config.seed)
    phrases = _phrases(source, config.num_phrases)
    torch.manual_seed(stream(config.seed).initial_seed())
    shape = FeatureNetworkConfig(
        resolution=config.resolution, channels=config.channels, blocks=config.blocks
    )
    model = _Targets(FeatureNetwork(shape), len(phrases) + 5)

    def load_batch(indices: np.ndarray, step: int, data: ImageSource = source) -> dict[str, Tensor]:
        batch = data.load(indices, step=step)
        found = [
            _degrade(image, config.degraded, stream(config.seed, step, int(i), 1))
            for image, i in zip(batch.images, indices, strict=True)
        ]
        held = [_phrases_of(batch.captions, batch.labels, row) for row in range(len(indices))]
        told = torch.tensor([[phrase in have for phrase in phrases] for have in held])
        images, faults = (torch.stack(part) for part in zip(*found, strict=True))
        return {"images": images, "told": told.float(), "faults": faults}

    def losses(
        modules: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        told, faults = (
            modules["model"](to_float(batch["images"])).float().split([len(phrases), 5], dim=1)
        )
        phrase_loss = F.binary_cross_entropy_with_logits(told, batch["told"])
        fault_loss = F.mse_loss(faults, batch["faults"])
        yield "model", phrase_loss + fault_loss, {"phrases": phrase_loss, "faults": fault_loss}

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        network, parts = modules["model"], []
        device = next(network.parameters()).device
        count = min(config.num_validation_images, len(validation))
        for start in range(0, count, 256):
            rows = np.arange(start, min(start + 256, count))
            batch = load_batch(rows, 0, validation)
            found = network(to_float(batch["images"]).to(device)).float().cpu()
            parts.append((found, batch["told"], batch["faults"]))
        found, told, faults = (torch.cat(part) for part in zip(*parts, strict=True))
        logits, sizes = found.split([len(phrases), 5], dim=1)
        true = told > 0.5
        # Rare phrases: held true from their own frequency on.
        hits = (logits.sigmoid() > told.mean(dim=0)) == true
        balanced = [
            (hits[true[:, i], i].float().mean() + hits[~true[:, i], i].float().mean()) / 2
            for i in range(len(phrases))
            if 0 < int(true[:, i].sum()) < count
        ]
        rest = (sizes - faults).square().sum() / (faults - faults.mean(0)).square().sum()
        loss = F.binary_cross_entropy_with_logits(logits, told) + F.mse_loss(sizes, faults)
        return {
            "loss": float(loss),
            "phrases": float(torch.stack(balanced).mean()),
            "faults": float(1 - rest),
        }

    result = fit(
        config,
        modules={"model": model},
        optimizers={"model": adamw(decay_groups(model.named_parameters()), config)},
        load_batch=load_batch,
        dataset_size=len(source),
        losses=losses,
        validate=validate,
        progress=progress,
    )
    if processes.is_main():
        model.network.save_pretrained(Path(config.output_dir) / "model")
    return result


def _phrases(source: ImageSource, count: int) -> list[str]:
    """What pictures are told apart by: the captions' most frequent phrases, or the classes."""
    rows = np.arange(min(len(source), CAPTIONS))
    if source.has_captions:
        met = Counter(
            phrase for caption in source.captions(rows) for phrase in _phrases_in(caption)
        )
        # A phrase that (nearly) all or no pictures have tells nothing.
        found = [p for p, n in met.most_common() if len(rows) / 1000 <= n <= 0.999 * len(rows)]
        return found[:count]
    if source.num_classes is None:
        raise UserError("the dataset has neither captions nor class labels to train on")
    return [str(label) for label in range(source.num_classes)]


def _phrases_of(captions: Sequence[str] | None, labels: Tensor | None, row: int) -> set[str]:
    if captions is not None:
        return _phrases_in(captions[row])
    assert labels is not None
    return {str(int(labels[row]))}


def _phrases_in(caption: str) -> set[str]:
    words = re.findall(r"\w+", caption.lower())
    return {*words, *(" ".join(pair) for pair in itertools.pairwise(words))}


def _degrade(
    image: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Float[Tensor, " 5"]]:
    """Blur, noise and colour shift, each with probability `share`; and their sizes in [-1, 1]."""
    given = torch.rand(3, generator=generator) < share
    blur, noise = torch.rand(2, generator=generator).tolist()
    shift = torch.rand(3, generator=generator) * 2 - 1
    faults = torch.tensor([blur * given[0], noise * given[1], *(shift * given[2])])
    x = image.float() / 255
    if given[0]:
        sigma = blur * MAX_BLUR * image.shape[-1] / 64
        x = torch.from_numpy(gaussian_filter(x.numpy(), (0, sigma, sigma)))
    if given[1]:
        x = x + noise * MAX_NOISE * torch.randn(x.shape, generator=generator)
    if given[2]:
        x = x + MAX_SHIFT * shift[:, None, None]
    return to_uint8(x), faults
