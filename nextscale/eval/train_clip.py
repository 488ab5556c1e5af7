"""`nextscale train clip`: a small CLIP of pictures with captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextscale import processes
from nextscale.data.config import DataConfig, open_dataset
from nextscale.data.images import to_float
from nextscale.data.scenes import Scene
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
from nextscale.streams import stream
from nextscale.training import FitResult, TrainingConfig, adamw, decay_groups, fit
from nextscale.training.kernels import trained_attention

CAPTIONS = 20_000  # of the dataset, that are read to learn its words
ONE_CHANGE = 8  # of the 32 captions that validation ranks, with one statement changed


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
    hard_relations: bool = False
    """Of the hard negatives, those with a false relation come first, where the caption states one:
    relations are learnt last."""
    centre_weight: float = 0.0
    """Weight of a further loss: one linear map tells from the picture's vector, and from the
    text's, where the shapes of each colour and form are; scenes only. Without it "left of" and
    "right of" stay one to the model: texts that tell them gain nothing until pictures do."""
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
    """The CLIP with a linear layer for where shapes are, if it has to tell.

    The first texts are those of the images; it tells by images and by them, [2, b, p, 2].
    """

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
        both = torch.stack([pictures, captions[: len(pictures)]]) * pictures.shape[-1] ** 0.5
        return pictures, captions, scale, self.head(both).unflatten(-1, (-1, 2))


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
            negatives += one_change(
                scene, config.hard_negatives, rng, relations=config.hard_relations
            )
        texts = vocabulary([*batch.captions, *negatives])
        told = {"centres": centres(scenes)} if config.centre_weight else {}
        return {"images": batch.images, "texts": texts, "twins": twins(batch.captions), **told}

    def losses(
        modules: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        count = len(batch["images"])
        with trained_attention(batch["texts"].device, modules["model"]):
            both = modules["model"](to_float(batch["images"]), batch["texts"])
        images, vectors, scale, places = both
        negatives = vectors[count:].unflatten(0, (count, -1)) if len(vectors) > count else None
        loss, hits = contrastive_loss(images, vectors[:count], negatives, batch["twins"], scale)
        report = {"accuracy": hits, "scale": scale.detach()}
        if places is not None:
            of_images, of_texts = (centre_loss(p, batch["centres"]) for p in places)
            report |= {"centres": of_images, "text_centres": of_texts}
            loss = loss + config.centre_weight * (of_images + of_texts)
        yield "model", loss, report

    def after_step(modules: Mapping[str, nn.Module], step: int) -> None:
        with torch.no_grad():  # as the paper: the temperature stays above 0.01
            network.logit_scale.clamp_(0, float(np.log(100)))

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        device = next(network.parameters()).device
        clip = Clip(network, vocabulary, _preprocess(config), "small", device=device)
        return _clip_report(clip, validation, config)

    result = fit(
        config,
        modules={"model": model},
        optimizers={"model": adamw(decay_groups(model.named_parameters()), config)},
        load_batch=load_batch,
        dataset_size=len(source),
        losses=losses,
        validate=validate,
        after_step=after_step,
        progress=progress,
    )
    if processes.is_main():
        save_clip(network, vocabulary, settings, Path(config.output_dir) / "model")
    return result


def _clip_report(
    clip: Clip, validation: ImageSource, config: ClipTrainingConfig
) -> dict[str, float]:
    count = min(config.num_validation_images, len(validation))
    images, texts, false = [], [], []
    scenes: list[Scene] = []
    for start in range(0, count, 250):
        batch = validation.load(np.arange(start, min(start + 250, count)))
        assert batch.captions is not None
        images.append(clip.images(list(batch.images.permute(0, 2, 3, 1).numpy())))
        texts += batch.captions
        for i, scene in enumerate(batch.extra.get("scene", ())):
            scenes.append(scene)
            rng = np.random.default_rng(stream(0, start + i).initial_seed())
            false.append(one_change(scene, ONE_CHANGE, rng))
    vectors, captions = torch.cat(images), clip.texts(texts)
    scale = clip.model.logit_scale.exp().cpu().float()
    loss, _ = contrastive_loss(vectors, captions, None, twins(texts), scale)
    if not false:
        return {"loss": float(loss)}
    return {"loss": float(loss), "rank_1": rank_first(clip, vectors, texts, false, scenes=scenes)}


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
