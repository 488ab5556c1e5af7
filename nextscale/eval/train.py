"""`nextscale train features` and `train clip`: the small networks that score without a download."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextscale import processes
from nextscale.data.config import DataConfig, open_dataset
from nextscale.data.images import to_float
from nextscale.data.sources import ImageSource
from nextscale.errors import UserError, require
from nextscale.eval.clip import Clip, Vocabulary, save_clip
from nextscale.eval.contrastive import (
    PLACED,
    centre_loss,
    centres,
    contrastive_loss,
    one_change,
    rank_first,
    twins,
)
from nextscale.eval.feature_network import FeatureNetwork, FeatureNetworkConfig
from nextscale.streams import stream
from nextscale.training import FitResult, TrainingConfig, fit

CAPTIONS = 20_000  # of the dataset, that are read to learn its words
ONE_CHANGE = 8  # of the 32 captions that validation ranks, with one statement changed
# Largest faults that features learn to measure: Gaussian blur (pixels of 64), noise and colour
# shift (of the range [0, 1]).
MAX_BLUR, MAX_NOISE, MAX_SHIFT = 2.0, 0.2, 0.15


# ---- the feature network ---------------------------------------------------------------------


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

    result = _fit(config, model, load_batch, len(source), losses, validate, progress)
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
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), faults


# ---- the small CLIP --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train clip`: pictures with captions."""

    embed_dim: int = 128
    """Width of the vectors of pictures and texts."""
    image_width: int = 24
    """Channels after the stem of the residual network (CLIP's), even; the last stage has 32 times
    as many. On small pictures it learns faster than a vision transformer."""
    image_layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Residual blocks of each of its stages."""
    text_width: int = 128
    """Width of the text transformer."""
    text_layers: int = 3
    """Its blocks."""
    text_heads: int = 4
    """Its attention heads."""
    context_length: int = 32
    """Tokens per text, start and end included."""
    hard_negatives: int = 0
    """Captions with one statement changed, against which each picture is held besides the captions
    of the other pictures in its batch (as NegCLIP's, arXiv 2210.01936, but made false by the
    scene itself); scenes only."""
    centre_weight: float = 0.0
    """Weight of a further loss: a linear map of the picture's vector tells where the shapes of
    each colour and form are; scenes only. Without it "left of" and "right of" stay one to the
    model: the texts need them only once the pictures tell them, and the reverse."""
    num_validation_images: int = 1000
    """Pictures of the validation split."""
    use_ema: bool = False
    """Off: averaged weights would not fit the statistics of the batch norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("use_ema", self.use_ema, not self.use_ema, "be false: there are batch norms")
        side = self.resolution
        require("resolution", side, side % 32 == 0, "be a multiple of 32, the network's stride")
        counts = ("embed_dim", "num_validation_images", "image_width", "text_layers", "text_heads")
        for name in counts:
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")
        require("image_layers", self.image_layers, min(self.image_layers) > 0, "be above 0")
        require("image_width", self.image_width, self.image_width % 2 == 0, "be even")
        width, heads = self.text_width, self.text_heads
        require("text_width", width, width % heads == 0, f"be a multiple of {heads} heads")
        require("context_length", self.context_length, self.context_length > 2, "be above 2")
        for name in ("hard_negatives", "centre_weight"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")


class _Placing(nn.Module):
    """The CLIP with a linear layer for where shapes are, if it has to tell."""

    def __init__(self, network: nn.Module, width: int, *, told: bool) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(width, 2 * len(PLACED)) if told else None

    def forward(
        self, images: Tensor, texts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        pictures, captions, scale = self.network(images, texts)[:3]
        if self.head is None:
            return pictures, captions, scale, None
        # Unit vectors have coordinates of 1 / sqrt(width).
        centres = self.head(pictures * pictures.shape[-1] ** 0.5).unflatten(-1, (-1, 2))
        return pictures, captions, scale, centres


def train_clip(config: ClipTrainingConfig, *, progress: bool = True) -> FitResult:
    """Train a CLIP (Radford et al., arXiv 2103.00020) and save it in `output_dir/model`.

    The softmax is over the batch of one process. A caption that equals the picture's own is no
    negative of it.

    Returns:
        The result of the loop; `metrics` holds `val/loss` and, on scenes, `val/rank_1`: how often
        the right caption ranks first among 32, of which 8 have one statement changed.
    """
    import open_clip

    source = open_dataset(config, "train", seed=config.seed)
    validation = open_dataset(config, "validation", seed=config.seed)
    if not source.has_captions:
        raise UserError("train clip needs captions, and the dataset has none")
    texts = source.captions(np.arange(min(len(source), CAPTIONS)))
    vocabulary = Vocabulary.of(texts, config.context_length)
    settings = _clip_settings(config, vocabulary)
    torch.manual_seed(stream(config.seed).initial_seed())
    network = open_clip.CLIP(**settings["model_cfg"])
    model = _Placing(network, config.embed_dim, told=config.centre_weight > 0)

    def load_batch(indices: np.ndarray, step: int, data: ImageSource = source) -> dict[str, Tensor]:
        batch = data.load(indices, step=step)
        assert batch.captions is not None
        scenes = batch.extra.get("scene", ())
        for name in ("hard_negatives", "centre_weight"):
            if getattr(config, name) and not scenes:
                raise UserError(f"{name} needs scenes, whose truth is known; set it to 0")
        negatives: list[str] = []
        for scene, i in zip(scenes, indices, strict=bool(scenes)):
            rng = np.random.default_rng(stream(config.seed, step, int(i), 1).initial_seed())
            negatives += one_change(scene, config.hard_negatives, rng)
        texts = vocabulary([*batch.captions, *negatives])
        told = {"centres": centres(scenes)} if config.centre_weight else {}
        return {"images": batch.images, "texts": texts, "twins": twins(batch.captions), **told}

    def losses(
        modules: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        count = len(batch["images"])
        # The plain products: twice as fast as the fused kernel's bf16 backward pass on the CPU.
        plain = (
            sdpa_kernel(SDPBackend.MATH) if batch["texts"].device.type == "cpu" else nullcontext()
        )
        with plain:
            both = modules["model"](to_float(batch["images"]), batch["texts"])
        images, vectors, scale, places = both
        negatives = vectors[count:].unflatten(0, (count, -1)) if len(vectors) > count else None
        loss, hits = contrastive_loss(images, vectors[:count], negatives, batch["twins"], scale)
        report = {"accuracy": hits, "scale": scale.detach()}
        if places is not None:
            report["centres"] = centre_loss(places, batch["centres"])
            loss = loss + config.centre_weight * report["centres"]
        yield "model", loss, report

    def after_step(modules: Mapping[str, nn.Module], step: int) -> None:
        with torch.no_grad():  # as the paper: the temperature stays above 0.01
            network.logit_scale.clamp_(0, float(np.log(100)))

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        device = next(network.parameters()).device
        clip = Clip(network, vocabulary, _preprocess(config), "small", device=device)
        return _clip_report(clip, validation, config)

    result = _fit(config, model, load_batch, len(source), losses, validate, progress, after_step)
    if processes.is_main():
        save_clip(network, vocabulary, settings, Path(config.output_dir) / "model")
    return result


def _clip_report(
    clip: Clip, validation: ImageSource, config: ClipTrainingConfig
) -> dict[str, float]:
    count = min(config.num_validation_images, len(validation))
    images, texts, false = [], [], []
    for start in range(0, count, 250):
        batch = validation.load(np.arange(start, min(start + 250, count)))
        assert batch.captions is not None
        images.append(clip.images(list(batch.images.permute(0, 2, 3, 1).numpy())))
        texts += batch.captions
        for i, scene in enumerate(batch.extra.get("scene", ())):
            rng = np.random.default_rng(stream(0, start + i).initial_seed())
            false.append(one_change(scene, ONE_CHANGE, rng))
    vectors, captions = torch.cat(images), clip.texts(texts)
    scale = clip.model.logit_scale.exp().cpu().float()
    loss, _ = contrastive_loss(vectors, captions, None, twins(texts), scale)
    if not false:
        return {"loss": float(loss)}
    return {"loss": float(loss), "rank_1": rank_first(clip, vectors, texts, false)}


def _clip_settings(config: ClipTrainingConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """In open_clip's form."""
    preprocess = _preprocess(config)
    vision = {
        "image_size": config.resolution,
        "layers": list(config.image_layers),
        "width": config.image_width,
        "head_width": 64,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": vocabulary.size,
        "width": config.text_width,
        "layers": config.text_layers,
        "heads": config.text_heads,
    }
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocess,
    }


def _preprocess(config: ClipTrainingConfig) -> dict[str, Any]:
    return {
        "size": config.resolution,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _fit(
    config: TrainingConfig,
    model: nn.Module,
    load_batch: Any,
    size: int,
    losses: Any,
    validate: Any,
    progress: bool,
    after_step: Any = None,
) -> FitResult:
    """One module, AdamW, no weight decay on vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "decay": False},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    return fit(
        config,
        modules={"model": model},
        optimizers={"model": optimizer},
        load_batch=load_batch,
        dataset_size=size,
        losses=losses,
        validate=validate,
        after_step=after_step,
        progress=progress,
    )
