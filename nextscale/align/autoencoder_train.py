"""The first stage of `nextscale train diffusion`: pictures <-> latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from nextscale import processes, storage
from nextscale.data.images import to_float
from nextscale.data.sources import ImageSource
from nextscale.streams import stream
from nextscale.tokenizers.tokenizer import psnr
from nextscale.training import adamw, decay_groups, fit, save_grid
from nextscale.training.session import resolve_precision

if TYPE_CHECKING:
    from nextscale.align.diffusion_train import DiffusionTrainingConfig

GROUPS = 8  # of the norms
SQUARED_WEIGHT = 4.0  # of the squared error beside the absolute one
SCALED_BY = 1024  # pictures that say how large latents are
BATCH = 64


class Autoencoder(nn.Module):
    """An `AutoencoderKL` whose forward is what training needs.

    Args:
        config: The run.
    """

    def __init__(self, config: DiffusionTrainingConfig) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        super().__init__()
        levels = len(config.autoencoder_channels)
        settings: dict[str, Any] = {
            "sample_size": config.resolution,
            "latent_channels": config.latent_channels,
            "block_out_channels": config.autoencoder_channels,
            "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "norm_num_groups": GROUPS,
            "mid_block_add_attention": False,
            "force_upcast": False,
        }
        self.vae: Any = AutoencoderKL(**settings)
        # Nearly linear at first, every residual branch at 0: colours appear much sooner than with
        # torch's default, a third of the variance per layer.
        for name, module in self.vae.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
                if name.endswith("conv2"):
                    nn.init.zeros_(module.weight)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1], drawn through the posterior; and its KL in nats per cell."""
        posterior = self.vae.encode(pixels).latent_dist
        cells = posterior.mean.shape[-2] * posterior.mean.shape[-1]
        return self.vae.decode(posterior.sample()).sample, posterior.kl().mean() / cells


def train_autoencoder(
    config: DiffusionTrainingConfig,
    source: ImageSource,
    validation: ImageSource,
    *,
    progress: bool = True,
) -> tuple[Any, float]:
    """Train the autoencoder in `output_dir/autoencoder`, or read it if a former session did.

    Its loss is L1 + 4 L2 + `kl_weight` KL (Rombach et al., arXiv 2112.10752, without its
    perceptual and adversarial terms). The scaling factor is 1 / the deviation of its latents.

    Args:
        config: The run.
        source: Training pictures.
        validation: Others.
        progress: Show a bar.

    Returns:
        The `AutoencoderKL`, frozen, and its PSNR on validation pictures (dB).
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = Path(config.output_dir, "autoencoder")
    done = folder / "quality.json"
    if config.resume_from_checkpoint and done.is_file():
        vae: Any = AutoencoderKL.from_pretrained(folder / "model")
        quality = storage.read_json(done)["psnr"]
    else:
        network, quality = _fit(config, folder, source, validation, progress)
        vae = network.vae
        if processes.is_main():
            with storage.replace_folder(folder / "model") as written:
                vae.save_pretrained(written)
            storage.write_json(done, {"psnr": quality})
    place = f"cuda:{processes.local_rank()}" if torch.cuda.is_available() else "cpu"
    return vae.requires_grad_(False).eval().to(place), quality


def _fit(
    config: DiffusionTrainingConfig,
    folder: Path,
    source: ImageSource,
    validation: ImageSource,
    progress: bool,
) -> tuple[Autoencoder, float]:
    torch.manual_seed(stream(config.seed).initial_seed())
    network = Autoencoder(config)
    count = min(config.num_validation_images, len(validation))
    own = replace(
        config,
        output_dir=str(folder),
        max_train_steps=config.autoencoder_steps,
        max_train_minutes=None,
        train_batch_size=config.autoencoder_batch_size,
        learning_rate=config.autoencoder_learning_rate,
        lr_scheduler="cosine",
        lr_final=0.02,
        lr_warmup_steps=min(30, config.autoencoder_steps // 2),
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_ema=False,
        resume_from_checkpoint="latest" if config.resume_from_checkpoint else None,
    )

    def load_batch(indices: np.ndarray, step: int) -> Tensor:
        return source.load(indices, step=step).images

    def losses(
        modules: Mapping[str, nn.Module], batch: Tensor, step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        pixels = to_float(batch)
        drawn, kl = modules["autoencoder"](pixels)
        drawn = drawn.float()
        l1, l2 = F.l1_loss(drawn, pixels), F.mse_loss(drawn, pixels)
        loss = l1 + SQUARED_WEIGHT * l2 + config.kl_weight * kl.float()
        report = {"l1": l1.detach(), "kl": kl.detach()}
        yield "autoencoder", loss, report | {"psnr": psnr(drawn.detach(), pixels).mean()}

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        found = []
        for first in range(0, count, BATCH):
            indices = np.arange(first, min(first + BATCH, count))
            pixels = to_float(validation.load(indices).images).to(network.vae.device)
            with precision(config, network.vae.device):
                drawn = network.vae.decode(network.vae.encode(pixels).latent_dist.mode()).sample
            found.append(psnr(drawn.float(), pixels))
            if first == 0 and processes.is_main():
                pair = torch.cat([pixels[:8], drawn[:8].float()]).cpu()
                path = folder / "samples" / f"step_{step:08d}.png"
                save_grid((pair + 1) / 2, path, columns=len(pair) // 2)
        return {"psnr": torch.cat(found).mean().item()}

    result = fit(
        own,
        modules={"autoencoder": network},
        optimizers={"autoencoder": adamw(decay_groups(network.named_parameters()), own)},
        load_batch=load_batch,
        dataset_size=len(source),
        losses=losses,
        validate=validate,
        progress=progress,
    )
    network.eval()
    clean, _ = encode_all(network.vae, source, SCALED_BY, config)
    # encode_all has multiplied by the factor of a fresh autoencoder.
    factor = network.vae.config.scaling_factor / clean.std().item()
    network.vae.register_to_config(scaling_factor=factor)
    return network, result.metrics["val/psnr"]


@torch.no_grad()
def encode_all(
    vae: Any,
    source: ImageSource,
    count: int,
    config: DiffusionTrainingConfig,
    *,
    progress: bool = False,
) -> tuple[Float[Tensor, "n c h w"], list[str]]:
    """The first pictures of a source as latents of the denoiser, with their captions.

    Args:
        vae: An `AutoencoderKL` in eval mode.
        source: Pictures with captions.
        count: How many, or all if there are fewer.
        config: The run; for its precision.
        progress: Show a bar.

    Returns:
        Modes of the posterior times the scaling factor, float32 on the CPU, and the captions.
    """
    count = min(count, len(source))
    latents, captions = [], []
    with tqdm(total=count, unit="image", desc="latents", disable=not progress) as bar:
        for first in range(0, count, BATCH):
            batch = source.load(np.arange(first, min(first + BATCH, count)))
            pixels = to_float(batch.images).to(vae.device)
            with precision(config, vae.device):
                mode = vae.encode(pixels).latent_dist.mode()
            latents.append(mode.float().cpu() * vae.config.scaling_factor)
            captions += batch.captions or []
            bar.update(len(pixels))
    return torch.cat(latents), captions


def precision(config: DiffusionTrainingConfig, device: torch.device) -> torch.autocast:
    """Mixed precision outside the networks that the training loop wraps."""
    half = resolve_precision(config.mixed_precision)
    dtype = torch.float16 if half == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=half != "no")


__all__ = ["Autoencoder", "encode_all", "precision", "train_autoencoder"]
