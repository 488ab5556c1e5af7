"""`nextscale train var`: token maps and conditions -> a next-scale transformer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale import processes, storage
from nextscale.data.config import DataConfig, open_dataset
from nextscale.errors import UserError, require
from nextscale.streams import stream
from nextscale.tokenizers import MultiscaleVQ
from nextscale.tokenizers.token_maps import TokenMaps, is_token_maps
from nextscale.training import FitResult, TrainingConfig, adamw, decay_groups, fit, save_grid
from nextscale.var.conditioning import (
    ClassConditioner,
    Conditioner,
    PretrainedTextConditioner,
    WordConditioner,
    WordEncoderConfig,
)
from nextscale.var.examples import (
    Batch,
    Examples,
    batch_tokens,
    replace_some,
    self_corrected,
    vocabulary,
    warn_of_lost_words,
)
from nextscale.var.lora import DEFAULT_TARGETS, add_lora, save_lora
from nextscale.var.model_folder import read_generation, save_model
from nextscale.var.sampling import SamplingConfig, sample
from nextscale.var.transformer import NextScaleTransformer, TransformerConfig, initialize

logger = logging.getLogger(__name__)
Evaluate = Callable[[NextScaleTransformer, MultiscaleVQ, int], Mapping[str, float]]

# Where Muon takes over: matrices between activations, not embeddings and not the head.
_MUON = ("blocks.", "modulation.", "conditioner.encoder.", "conditioner.pool.")
# Tensors besides 1-D ones that weight decay leaves alone (next-scale.md section 4).
_NOT_DECAYED = ("start", "position", "scale_embedding.weight", "modulation_offset", "log_scale")


@dataclass(frozen=True, kw_only=True)
class TransformerTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train var`; `dataset` may also be a folder of `nextscale encode`."""

    tokenizer: str = "scenes"
    """Tokenizer: a bundled model, a model folder or hub id, or a folder of `train tokenizer`."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """Size of a new transformer; scales and codebook come from the tokenizer."""
    model: str | None = None
    """Fine-tune this model instead (bundled name, folder or hub id; it brings its tokenizer)."""
    conditioning: str = "auto"
    """class, caption, or auto: captions if the dataset has them, else classes."""
    words: WordEncoderConfig = field(default_factory=WordEncoderConfig)
    """Learned caption encoder."""
    text_encoder: str | None = None
    """A frozen transformers text encoder instead (hub id or folder)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw is the paper's; muon uses Muon for the matrices of blocks and caption encoder, AdamW
    for the rest, at the same learning rate: a lower loss after as many steps (docs/training.md)."""
    label_dropout: float = 0.1
    """Share of examples whose condition is replaced by "none", for guidance; training only."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    input_noise: float = 0.0
    """Share of tokens replaced by random codes in the inputs (not the targets); ours, for
    robustness against the model's own mistakes; 0 is the paper."""
    self_correction: float = 0.0
    """Teach later scales to mend what earlier ones got wrong (Infinity, arXiv 2412.04431, section
    3.4): up to this share of an image's tokens (uniform in [0, share]) is replaced by random codes
    in the inputs, and the targets of the following scales are what then remains to be drawn. Needs
    images: token maps have no latents. 0 is VAR."""
    progressive_fraction: float = 0.0
    """Share of the run over which scales are added one by one (pg of the released code); the
    schedule var then holds the peak as long, unless `lr_hold` says otherwise."""
    progressive_start: int = 4
    """Last scale of the first stage (pg0)."""
    progressive_warmup: int = 100
    """Steps over which the newest scale's weight rises from 0.01 to 1 (pgwp)."""

    lora_rank: int = 0
    """Train a LoRA of this rank instead of all weights; needs `model`; 0 = off."""
    lora_alpha: float | None = None
    """LoRA scale is alpha / rank; None: alpha = rank."""
    lora_dropout: float = 0.0
    """Dropout on the LoRA's input."""
    lora_target_modules: tuple[str, ...] = DEFAULT_TARGETS
    """Layers that get a LoRA."""

    num_validation_images: int = 512
    """Images of the validation split for loss and accuracy."""
    num_validation_prompts: int = 100
    """Captions of the `standard` benchmark for prompt accuracy, on models with the scenes grammar;
    0 = off."""
    cache_inputs: bool = False
    """Keep the transformer inputs of a token-map dataset in memory (bfloat16)."""
    generation: SamplingConfig = field(default_factory=lambda: SamplingConfig(guidance_scale=3.0))
    """Settings of the sample grids, stored as the model's defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"conditioning": ("auto", "class", "caption"), "optimizer": ("adamw", "muon")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
        shares = ("label_dropout", "label_smoothing", "input_noise", "self_correction")
        for name in (*shares, "lora_dropout"):
            value = getattr(self, name)
            require(name, value, 0 <= value < 1, "lie in [0, 1)")
        share = self.progressive_fraction
        require("progressive_fraction", share, 0 <= share < 1, "lie in [0, 1)")
        if share and self.lr_hold == TransformerTrainingConfig.lr_hold:
            object.__setattr__(self, "lr_hold", share)
        counts = ("progressive_start", "progressive_warmup", "lora_rank", "num_validation_prompts")
        for name in counts:
            require(name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        count = self.num_validation_images
        require("num_validation_images", count, count > 0, "be above 0")
        if self.lora_rank and self.model is None:
            raise UserError("lora_rank needs a base: pass --model NAME or FOLDER")


def train_transformer(
    config: TransformerTrainingConfig, *, evaluate: Evaluate | None = None, progress: bool = True
) -> FitResult:
    """Train or fine-tune a transformer and save the model (or LoRA) in `output_dir/model`.

    Args:
        config: The run.
        evaluate: Further validation, (model, tokenizer, step) -> metrics; on every process.
        progress: Show a bar.

    Returns:
        The result of the loop; `metrics` holds `val/loss` (nats per token, label dropout off),
        `val/accuracy` and `val/accuracy_last` (top-1 over all tokens and the last scale).
    """
    tokenizer, base, generation = _load_models(config)
    if generation is not None and config.generation == SamplingConfig(guidance_scale=3.0):
        config = replace(config, generation=generation)  # fine-tuning keeps the base's defaults
    examples = _open_examples(config, tokenizer, "train")
    validation = _open_examples(config, tokenizer, "validation")
    if config.self_correction and isinstance(examples.source, TokenMaps):
        raise UserError("self_correction needs images: pass the dataset itself, not token maps")
    model = base if base is not None else _new_model(config, tokenizer, examples)
    model = _fit_classes(model, examples, lora=config.lora_rank > 0)
    lora = None
    if config.lora_rank:
        lora = add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_target_modules,
        )
    _check_scales(config, model.schedule.num_scales)
    examples.conditioner = validation.conditioner = model.conditioner
    if base is not None and isinstance(model.conditioner, WordConditioner):
        warn_of_lost_words(model.conditioner, examples.source)
    schedule = model.schedule
    scale_index = schedule.scale_index()

    def load_batch(indices: np.ndarray, step: int) -> Batch:
        batch = examples.load(indices, step)
        # The third key keeps these draws apart from those of the random crops.
        noise = [torch.rand(1, generator=stream(config.seed, step, int(i), 1)) for i in indices]
        dropped = torch.cat(noise) < config.label_dropout
        ids = batch["ids"]
        assert ids is not None
        shape = (-1,) + (1,) * (ids.ndim - 1)
        null = model.conditioner.null(len(indices))
        return {**batch, "ids": torch.where(dropped.view(shape), null, ids)}

    def losses(
        modules: Mapping[str, nn.Module], batch: Batch, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        if config.self_correction:
            tokens, inputs = self_corrected(batch, tokenizer, config.self_correction)
        else:
            tokens, inputs = batch_tokens(batch, tokenizer), batch["inputs"]
        if inputs is None or config.input_noise:
            noisy = replace_some(tokens, config.input_noise, tokenizer.config.codebook_size)
            inputs = tokenizer.teacher_inputs(noisy)
        scales, newest = _progress_at(config, step, schedule.num_scales)
        length = schedule.slices[scales - 1].stop
        inputs = inputs[:, : length - schedule.lengths[0]]
        logits = modules["transformer"](inputs, ids=batch["ids"], num_scales=scales)
        entropy = F.cross_entropy(
            logits.flatten(0, 1).float(),
            tokens[:, :length].flatten(),
            label_smoothing=config.label_smoothing,
            reduction="none",
        ).view(len(tokens), length)
        weights = torch.where(scale_index[:length] == scales - 1, newest, 1.0).to(entropy.device)
        loss = (entropy * weights).sum(dim=1).mean() / schedule.num_tokens
        with torch.no_grad():
            hits = (logits.argmax(-1) == tokens[:, :length]).float()
        yield "transformer", loss, {"accuracy": hits.mean()}

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        network = modules["transformer"]
        assert isinstance(network, NextScaleTransformer)
        report = _measure(network, tokenizer, validation, config)
        if processes.is_main():
            _save_samples(network, tokenizer, validation, config, step)
        if evaluate is not None:
            report |= evaluate(network, tokenizer, step)
        return report

    modules: dict[str, nn.Module] = {"transformer": model, "tokenizer": tokenizer}
    result = fit(
        config,
        modules=modules,
        optimizers={"transformer": _optimizer(model, config)},
        load_batch=load_batch,
        dataset_size=len(examples),
        losses=losses,
        validate=validate,
        progress=progress,
    )
    final = result.ema_modules.get("transformer", model)
    assert isinstance(final, NextScaleTransformer)
    folder = Path(config.output_dir) / "model"
    if not processes.is_main():
        return result
    if lora is not None:
        settings = {
            "rank": config.lora_rank,
            "alpha": config.lora_alpha,
            "target_modules": list(config.lora_target_modules),
        }
        save_lora(final, folder, settings)
    else:
        save_model(folder, tokenizer, final, config.generation)
    return result


def _check_scales(config: TransformerTrainingConfig, scales: int) -> None:
    """Refuse what fits another number of scales before the first step, not at a validation."""
    config.generation.guidance(scales)
    config.generation.temperatures(scales)
    if config.progressive_fraction:
        first = config.progressive_start
        require("progressive_start", first, first < scales - 1, f"be below {scales - 1}, the last")


def _load_models(
    config: TransformerTrainingConfig,
) -> tuple[MultiscaleVQ, NextScaleTransformer | None, SamplingConfig | None]:
    """Frozen tokenizer, the base of a fine-tuning, and its generation settings."""
    base, generation = None, None
    if config.model is not None:
        folder = storage.check_model(storage.resolve_model(config.model))
        base = NextScaleTransformer.from_pretrained(folder)
        generation = read_generation(folder)
    else:
        folder = storage.resolve_model(config.tokenizer)
    inner = folder / "tokenizer"
    tokenizer = MultiscaleVQ.from_pretrained(inner if inner.exists() else folder)
    return tokenizer.requires_grad_(False), base, generation


def _open_examples(
    config: TransformerTrainingConfig, tokenizer: MultiscaleVQ, split: Any
) -> Examples:
    if is_token_maps(config.dataset):
        maps = TokenMaps(config.dataset, split=split, num_images=config.num_images)
        maps.check_tokenizer(tokenizer)
        return Examples(maps, tokenizer, config.cache_inputs and split == "train")
    expected = (config.resolution, config.resolution)
    if tokenizer.resolution != expected:
        raise UserError(
            f"resolution {config.resolution} does not fit the tokenizer, which is made for "
            f"{tokenizer.resolution[0]} x {tokenizer.resolution[1]} pixels"
        )
    return Examples(open_dataset(config, split, seed=config.seed), tokenizer, False)


def _new_model(
    config: TransformerTrainingConfig, tokenizer: MultiscaleVQ, examples: Examples
) -> NextScaleTransformer:
    source = examples.source
    shape = replace(
        config.transformer,
        scales=tokenizer.config.scales,
        codebook_size=tokenizer.config.codebook_size,
        codebook_dim=tokenizer.config.codebook_dim,
    )
    captions = config.conditioning == "caption"
    if config.conditioning == "auto":
        captions = source.has_captions
    width = shape.resolved_width
    torch.manual_seed(stream(config.seed).initial_seed())
    conditioner: Conditioner
    if captions and config.text_encoder is not None:
        conditioner = PretrainedTextConditioner(width=width, model=config.text_encoder)
    elif captions:
        words = config.words.words or vocabulary(config.words, source)
        settings = replace(config.words, words=tuple(words))
        conditioner = WordConditioner(width=width, **vars(settings))
    else:
        if source.num_classes is None:
            raise UserError("the dataset has neither captions nor class labels to train on")
        conditioner = ClassConditioner(
            width=width, num_classes=source.num_classes, class_names=source.class_names
        )
    model = NextScaleTransformer(shape, conditioner)
    initialize(model)
    return model


def _fit_classes(
    model: NextScaleTransformer, examples: Examples, *, lora: bool
) -> NextScaleTransformer:
    """Give a class-conditional base as many classes as the dataset has."""
    conditioner, classes = model.conditioner, examples.source.num_classes
    if not isinstance(conditioner, ClassConditioner) or classes in (None, conditioner.num_classes):
        return model
    if lora:
        raise UserError(
            f"the model has {conditioner.num_classes} classes and the dataset {classes}: a LoRA "
            "cannot hold a new class table; fine-tune all weights (lora_rank 0)"
        )
    logger.warning(
        "the model has %d classes, the dataset %d: the class table starts anew",
        conditioner.num_classes,
        classes,
    )
    width = model.config.resolved_width
    model.conditioner = ClassConditioner(
        width=width, num_classes=classes, class_names=examples.source.class_names
    )
    nn.init.trunc_normal_(model.conditioner.embedding.weight, std=math.sqrt(1 / 3 / width))
    return model


def _optimizer(model: nn.Module, config: TransformerTrainingConfig) -> torch.optim.Optimizer:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = config.optimizer == "muon"
    matrices = {n: p for n, p in parameters.items() if muon and p.ndim == 2 and n.startswith(_MUON)}
    rest = [(n, p) for n, p in parameters.items() if n not in matrices]
    groups = decay_groups(rest, lambda name: name.endswith(_NOT_DECAYED))
    return adamw(groups, config, matrices=list(matrices.values()))


def _progress_at(
    config: TransformerTrainingConfig, step: int, num_scales: int
) -> tuple[int, float]:
    """Progressive training: (scales to train, weight of the newest) at a step.

    Scales 0..p are trained, p growing linearly from `progressive_start` to K - 1 over
    `progressive_fraction` of the run after the warm-up; the newest scale's weight rises from 0.01
    to 1 over `progressive_warmup` steps, except in the first stage.
    """
    first = config.progressive_start
    stages = num_scales - 1 - first
    span = config.progressive_fraction * config.max_train_steps
    if span <= 0 or stages <= 0:
        return num_scales, 1.0
    since = max(step - config.lr_warmup_steps, 0)
    stage = min(int(since / span * (stages + 1)), stages)
    begun = stage * span / (stages + 1)
    rise = min((since - begun) / max(config.progressive_warmup, 1), 1.0)
    return first + stage + 1, 1.0 if stage == 0 else 0.01 + 0.99 * rise


@torch.no_grad()
def _measure(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    validation: Examples,
    config: TransformerTrainingConfig,
) -> dict[str, float]:
    """Loss (nats per token), accuracy and per-scale loss on the validation split."""
    count = min(config.num_validation_images, len(validation))
    entropies, hits = [], []
    for start in range(0, count, config.train_batch_size):
        indices = np.arange(start, min(start + config.train_batch_size, count))
        batch = validation.load(indices)
        tokens = batch_tokens(batch, tokenizer)
        logits = model(tokenizer.teacher_inputs(tokens), ids=batch["ids"])
        entropies.append(F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none"))
        hits.append((logits.argmax(-1) == tokens).float())
    entropy, hit = torch.cat(entropies).mean(0), torch.cat(hits).mean(0)
    last = model.schedule.slices[-1]
    report = {
        "loss": entropy.mean().item(),
        "accuracy": hit.mean().item(),
        "accuracy_last": hit[last].mean().item(),
    }
    for k, where in enumerate(model.schedule.slices):
        report[f"loss_{k}"] = entropy[where].mean().item()
    return report


def _save_samples(
    model: NextScaleTransformer,
    tokenizer: MultiscaleVQ,
    validation: Examples,
    config: TransformerTrainingConfig,
    step: int,
) -> None:
    """A grid of 16 pictures of validation conditions at fixed seeds."""
    ids = validation.load(np.arange(min(16, len(validation))))["ids"]
    assert ids is not None
    seeds = list(range(len(ids)))
    condition = model.condition(ids)
    *_, last = sample(model, tokenizer, condition, config.generation, seeds=seeds)
    pictures = (tokenizer.decode_latents(last.f_hat) + 1) / 2
    save_grid(pictures.cpu(), Path(config.output_dir) / "samples" / f"step_{step:08d}.png")
