"""`nextscale train tokenizer`: images -> a multi-scale VQ tokenizer that does not collapse.

Codebook collapse, above all at the coarse scales, is what people report who train this model. The
remedies here are a k-means start, revival of unused codes, an EMA codebook, an entropy term and
scale dropout; docs/tokenizer.md has the table of what each is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nextscale import processes
from nextscale.data.config import DataConfig, open_dataset
from nextscale.data.images import to_float
from nextscale.data.sources import ImageSource
from nextscale.errors import UserError, require
from nextscale.streams import batch_indices, stream
from nextscale.tokenizers.adversarial import LPIPS, PatchDiscriminator, adaptive_weight
from nextscale.tokenizers.codebook import (
    codebook_perplexity,
    ema_update,
    entropy_loss,
    kmeans_start,
    record_usage,
    refit,
    revive,
    usage_metrics,
)
from nextscale.tokenizers.quantizer import PhiConv, phi_index
from nextscale.tokenizers.tokenizer import MultiscaleVQ, TokenizerConfig, psnr
from nextscale.training import (
    FitResult,
    TrainingConfig,
    adamw,
    decay_groups,
    fit,
    frozen,
    save_grid,
)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train tokenizer`."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    use_ema: bool = False
    """Off here: an averaged codebook lags behind revived codes; let the learning rate fall."""

    l1_weight: float = 1.0
    """Weight of the mean absolute pixel error, images in [-1, 1]."""
    l2_weight: float = 1.0
    """Weight of the mean squared pixel error."""
    quantizer_weight: float = 1.0
    """Weight of the quantizer's loss."""
    lpips_weight: float = 0.0
    """Weight of the perceptual loss LPIPS (VGG); 0 = off."""
    lpips_weights: str | None = None
    """Path of the VGG16 ImageNet weights for LPIPS; None: torchvision's cache or download."""
    discriminator_weight: float = 0.0
    """Weight of the patch discriminator's hinge loss; 0 = off."""
    discriminator_start: int = 1000
    """Step at which the discriminator sets in."""
    discriminator_channels: int = 64
    """Width of the discriminator."""

    quantizer_start: int = 300
    """Steps as a plain autoencoder before the quantizer sets in; 0 = from the first step."""
    kmeans_start: bool = True
    """Start the codebook from k-means of the latents, scale by scale, as the quantizer sets in."""
    revival_steps: int = 20
    """Replace unused codes every so many steps; 0 = never."""
    revival_threshold: float = 0.05
    """A code is unused if at every scale its usage is below this share of uniform usage."""
    revival_end: float = 0.85
    """Stop revival after this share of the run."""
    refit_share: float = 0.45
    """When revival ends, a scale that uses less than this share of the codebook gets so many codes
    from k-means; 0 = off. Best when the learning rate is small by then."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """How codes move: by the quantizer loss, or as moving averages of what they quantize."""
    codebook_decay: float = 0.99
    """Decay of the EMA codebook."""
    entropy_weight: float = 0.0
    """Weight of the term that evens out the usage of codes at each scale."""
    scale_dropout: float = 0.0
    """Share of images that are reconstructed from a random number of coarse scales."""

    num_validation_images: int = 2000
    """Images of the validation split that measure PSNR and codebook usage."""

    def __post_init__(self) -> None:
        """Refuse values that no run can work with.

        Raises:
            UserError: Naming parameter, value and fix.
        """
        super().__post_init__()
        weights = ("l1", "l2", "quantizer", "lpips", "discriminator", "entropy")
        counts = ("discriminator_start", "quantizer_start", "revival_steps")
        for name in (*(f"{w}_weight" for w in weights), *counts):
            value = getattr(self, name)
            require(name, value, value >= 0, "be 0 or more")
        for name in (
            "revival_threshold",
            "revival_end",
            "refit_share",
            "codebook_decay",
            "scale_dropout",
        ):
            value = getattr(self, name)
            require(name, value, 0 <= value <= 1, "lie in [0, 1]")
        width, count = self.discriminator_channels, self.num_validation_images
        groups = width > 0 and width % 8 == 0
        require("discriminator_channels", width, groups, "be a multiple of 8, such as 64")
        require("num_validation_images", count, count > 0, "be above 0")
        update = self.codebook_update
        require("codebook_update", update, update in ("gradient", "ema"), "be gradient or ema")


def train_tokenizer(config: TokenizerTrainingConfig, *, progress: bool = True) -> FitResult:
    """Train a tokenizer and save it in `output_dir/tokenizer`.

    Args:
        config: The run.
        progress: Show a bar.

    Returns:
        The result of the loop; `metrics` holds `val/psnr` (dB), `val/usage` (share of codes used)
        and per scale k `val/codes_k` (distinct codes) and `val/perplexity_k`. The saved tokenizer
        is the averaged one if `use_ema`.
    """
    torch.manual_seed(stream(config.seed).initial_seed())
    tokenizer = MultiscaleVQ(config.tokenizer)
    initialize(tokenizer)
    if tokenizer.resolution != (config.resolution, config.resolution):
        raise UserError(
            f"resolution {config.resolution} does not fit the tokenizer, whose scales end at "
            f"{tokenizer.schedule.grid} cells of {config.tokenizer.stride} pixels; use resolution "
            f"{tokenizer.resolution[0]} or other scales"
        )
    images = open_dataset(config, "train", seed=config.seed)
    validation = open_dataset(config, "validation", seed=config.seed)
    modules: dict[str, nn.Module] = {"tokenizer": tokenizer}
    lpips = LPIPS(config.lpips_weights) if config.lpips_weight else None
    if lpips is not None:
        modules["lpips"] = lpips
    if config.codebook_update == "ema":
        _make_buffer(tokenizer.quantizer.codebook, "weight")
    optimizers = {"tokenizer": _adamw(tokenizer, config)}
    if config.discriminator_weight:
        modules["discriminator"] = PatchDiscriminator(config.discriminator_channels)
        optimizers["discriminator"] = _adamw(modules["discriminator"], config)
    if config.kmeans_start and config.quantizer_start == 0:
        # A resumed run reads the codebook of its checkpoint afterwards.
        latents = _latents(config, tokenizer, images, 2)
        kmeans_start(tokenizer.quantizer, tokenizer.schedule, latents, stream(config.seed, 1))
    seen: list[tuple[Tensor, list[Tensor]]] = []  # tokens and residuals of each micro-batch

    def load_batch(indices: np.ndarray, step: int) -> Tensor:
        return images.load(indices, step=step).images

    def losses(
        modules: Mapping[str, nn.Module], batch: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        pixels = to_float(batch).contiguous(memory_format=torch.channels_last)
        reconstruction, quantized = modules["tokenizer"](
            pixels,
            num_scales=_scale_dropout(config, len(pixels), pixels.device),
            quantize=step >= config.quantizer_start,
        )
        reconstruction = reconstruction.float()
        l1, l2 = F.l1_loss(reconstruction, pixels), F.mse_loss(reconstruction, pixels)
        loss = config.l1_weight * l1 + config.l2_weight * l2
        metrics: dict[str, float | Tensor] = {
            "l1": l1.detach(),
            "psnr": psnr(reconstruction.detach(), pixels).mean(),
        }
        if lpips is not None:
            perceptual = modules["lpips"](reconstruction, pixels)
            loss = loss + config.lpips_weight * perceptual
            metrics["lpips"] = perceptual.detach()
        if "discriminator" in modules and step >= config.discriminator_start:
            with frozen(modules["discriminator"]) as judge:
                fooled = -judge(reconstruction).float().mean()
            last_layer = tokenizer.decoder.conv_out.weight
            weight = adaptive_weight(loss, fooled, last_layer)
            loss = loss + config.discriminator_weight * weight * fooled
            metrics["discriminator_weight"] = weight
        if quantized is not None:
            seen.append((quantized.tokens, quantized.residuals))
            loss = loss + config.quantizer_weight * quantized.loss
            metrics["quantizer_loss"] = quantized.loss.detach()
            if (step + 1) % config.logging_steps == 0:
                metrics |= usage_metrics(tokenizer.quantizer)
        if quantized is not None and config.entropy_weight:
            term = entropy_loss(tokenizer.quantizer, quantized, tokenizer.schedule)
            loss = loss + config.entropy_weight * term
            metrics["entropy_loss"] = term.detach()
        yield "tokenizer", loss, metrics
        if "discriminator" in modules and step >= config.discriminator_start:
            both = torch.cat([pixels, reconstruction.detach()])
            real, fake = modules["discriminator"](both).float().chunk(2)
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            yield "discriminator", hinge / 2, {"real": real.mean(), "fake": fake.mean()}

    def after_step(modules: Mapping[str, nn.Module], step: int) -> None:
        quantizer = tokenizer.quantizer
        if step == config.quantizer_start and config.kmeans_start:
            latents = _latents(config, tokenizer, images, 2)
            kmeans_start(quantizer, tokenizer.schedule, latents, stream(config.seed, 1))
        if not seen:
            return
        tokens = torch.cat([part for part, _ in seen])
        residuals = [torch.cat(parts) for parts in zip(*(r for _, r in seen), strict=True)]
        seen.clear()
        record_usage(quantizer, tokenizer.schedule, tokens)
        if config.codebook_update == "ema":
            ema_update(quantizer, tokens, residuals, config.codebook_decay)
        if config.refit_share and step == round(config.revival_end * config.max_train_steps):
            latents = _latents(config, tokenizer, images, 16)
            generator = stream(config.seed, step, 3)
            refit(quantizer, tokenizer.schedule, latents, config.refit_share, generator)
        due = config.revival_steps and step % config.revival_steps == 0
        if due and step < config.revival_end * config.max_train_steps:
            revive(
                quantizer,
                residuals,
                config.revival_threshold,
                stream(config.seed, step, 2),
                optimizers["tokenizer"],
            )

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        model = modules["tokenizer"]
        assert isinstance(model, MultiscaleVQ)
        count = min(config.num_validation_images, len(validation))
        report = measure(model, validation, count, config.train_batch_size)
        if processes.is_main():
            path = Path(config.output_dir, "samples", f"step_{step:08d}.png")
            _save_pictures(model, validation, path)
        return report

    num_phi = config.tokenizer.num_phi
    used_phi = set(phi_index(tokenizer.schedule.num_scales, num_phi)) if num_phi else ()
    result = fit(
        config,
        modules=modules,
        optimizers=optimizers,
        load_batch=load_batch,
        dataset_size=len(images),
        losses=losses,
        validate=validate,
        after_step=after_step,
        # Before the quantizer sets in, codes and phi get no gradient; few scales use few phi.
        find_unused_parameters=config.quantizer_start > 0 or len(used_phi) < num_phi,
        progress=progress,
    )
    if processes.is_main():
        best = result.ema_modules.get("tokenizer", tokenizer)
        assert isinstance(best, MultiscaleVQ)
        best.eval().save_pretrained(Path(config.output_dir) / "tokenizer")
    return result


def _make_buffer(module: nn.Module, name: str) -> None:
    """Turn a parameter into a buffer: no optimizer and no gradient, but part of checkpoints."""
    value = getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, value)


def initialize(tokenizer: MultiscaleVQ) -> None:
    """Fresh weights that start as a nearly linear autoencoder, and a small uniform codebook.

    Convolutions keep the variance of their input and every residual branch starts at zero. With
    torch's default initialisation (a third of the variance per layer) colour took ten times as
    long to appear. phi starts as the identity: otherwise it halves a code, the code moves to twice
    the vector that chose it, and that vector chooses another code.
    """
    for phi in tokenizer.quantizer.phi:
        assert isinstance(phi, PhiConv)
        nn.init.dirac_(phi.weight)
        assert phi.bias is not None
        nn.init.zeros_(phi.bias)
    for name, module in tokenizer.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("quantizer."):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
    size = tokenizer.quantizer.codebook_size
    nn.init.uniform_(tokenizer.quantizer.codebook.weight, -1 / size, 1 / size)


@torch.no_grad()
def _latents(
    config: TokenizerTrainingConfig, tokenizer: MultiscaleVQ, images: ImageSource, multiple: int
) -> Tensor:
    """Latents of `multiple` V training images (1024 at least, or all there are)."""
    count = min(len(images), max(1024, multiple * config.tokenizer.codebook_size))
    indices = batch_indices(config.seed, 0, count, len(images))
    training = tokenizer.training
    tokenizer.eval()
    chunks = [indices[i : i + 64] for i in range(0, count, 64)]
    latents = torch.cat([tokenizer.latents(to_float(images.load(c).images)) for c in chunks])
    tokenizer.train(training)
    return latents


@torch.no_grad()
def measure(
    tokenizer: MultiscaleVQ,
    source: ImageSource,
    count: int,
    batch_size: int,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """PSNR and codebook usage on the first `count` images of a source.

    Args:
        tokenizer: In eval mode.
        source: Images of its resolution.
        count: How many images.
        batch_size: Images at a time.
        progress: Show a bar.

    Returns:
        `psnr` (dB, mean over images), `usage` (share of the codebook that any scale used), and per
        scale k `codes_k` (distinct codes), `share_k` (of min(V, count n_k^2)), `perplexity_k`.
    """
    device = tokenizer.quant_conv.weight.device
    decibels, tokens = [], []
    with tqdm(total=count, unit="image", disable=not progress) as bar:
        for start in range(0, count, batch_size):
            batch = source.load(np.arange(start, min(start + batch_size, count)))
            pixels = to_float(batch.images).to(device)
            codes = tokenizer.encode(pixels)
            decibels.append(psnr(tokenizer.decode(codes), pixels))
            tokens.append(codes)
            bar.update(len(pixels))
    all_tokens = torch.cat(tokens)
    size = tokenizer.quantizer.codebook_size
    report = {
        "psnr": torch.cat(decibels).mean().item(),
        "usage": all_tokens.unique().numel() / size,
    }
    for k, part in enumerate(tokenizer.schedule.split(all_tokens)):
        counts = torch.bincount(part.flatten(), minlength=size)
        distinct = int((counts > 0).sum())
        report[f"codes_{k}"] = distinct
        report[f"share_{k}"] = distinct / min(size, part.numel())
        report[f"perplexity_{k}"] = codebook_perplexity(counts)
    return report


def _scale_dropout(
    config: TokenizerTrainingConfig, count: int, device: torch.device
) -> Tensor | None:
    if not config.scale_dropout:
        return None
    scales = len(config.tokenizer.scales)
    kept = torch.randint(1, scales + 1, (count,), device=device)
    return torch.where(torch.rand(count, device=device) < config.scale_dropout, kept, scales)


def _adamw(module: nn.Module, config: TokenizerTrainingConfig) -> torch.optim.Optimizer:
    """AdamW whose biases, norms and codes do not decay."""
    groups = decay_groups(module.named_parameters(), lambda name: "codebook" in name)
    return adamw(groups, config)


def _save_pictures(tokenizer: MultiscaleVQ, source: ImageSource, path: Path) -> None:
    """Originals, their reconstruction, and the picture after each scale, one column per image."""
    pixels = to_float(source.load(np.arange(min(8, len(source)))).images)
    pixels = pixels.to(tokenizer.quant_conv.weight.device)
    tokens = tokenizer.encode(pixels)
    steps = tokenizer.quantizer.accumulate(tokens, tokenizer.schedule)
    rows = [pixels, *(tokenizer.decode_latents(f_hat) for f_hat, _ in steps)]
    save_grid((torch.cat(rows).cpu() + 1) / 2, path, columns=len(pixels))


__all__ = ["TokenizerTrainingConfig", "measure", "train_tokenizer"]
