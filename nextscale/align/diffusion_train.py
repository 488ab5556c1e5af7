"""`nextscale train diffusion`: a small Stable Diffusion of diffusers' own classes, from scratch.

First an autoencoder learns the pictures, then a text encoder and a denoiser learn the latents of
captioned pictures. The result opens with plain diffusers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import processes, storage
from nextscale.align.autoencoder_train import encode_all, precision, train_autoencoder
from nextscale.data.config import DataConfig, open_dataset
from nextscale.errors import UserError, missing_extra, require
from nextscale.streams import image_stream, stream
from nextscale.training import FitResult, TrainingConfig, adamw, decay_groups, fit, save_grid
from nextscale.training.kernels import trained_attention

logger = logging.getLogger(__name__)

Draw = Callable[[Sequence[str]], Float[Tensor, "b 3 H W"]]
"""Captions -> pictures in [0, 1] on the CPU; picture i has the seed i."""
Evaluate = Callable[[Draw, int], Mapping[str, float]]

VOCABULARY = 8192  # tokens at most, the 512 of single bytes included
SAMPLES = 16  # pictures of a sheet
DRAW_BATCH = 50  # pictures at a time at validations


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainingConfig(TrainingConfig, DataConfig):
    """Settings of `nextscale train diffusion`: pictures with captions.

    The settings of the loop are those of the text encoder and the denoiser; the autoencoder has
    its own where they differ.
    """

    autoencoder_steps: int = 3000
    """Optimizer steps of the autoencoder, before the first one of the denoiser."""
    autoencoder_batch_size: int = 16
    """Its pictures per device and step."""
    autoencoder_learning_rate: float = 2e-3
    """Its peak learning rate; it falls to 2 % along a cosine."""
    autoencoder_channels: tuple[int, ...] = (16, 32, 64, 64)
    """Its channels per level; each level but the first halves the side of the picture."""
    latent_channels: int = 8
    """Channels of the latents."""
    kl_weight: float = 1e-4
    """Weight of its Kullback-Leibler term, in nats per cell of the latents."""

    unet_channels: tuple[int, ...] = (128, 192)
    """Channels of the denoiser per level; each level but the first halves the side."""
    unet_layers: int = 1
    """Its residual and attention blocks per level."""
    unet_heads: int = 4
    """Its attention heads."""
    text_width: int = 128
    """Width of the text encoder."""
    text_layers: int = 2
    """Its blocks."""
    text_heads: int = 4
    """Its attention heads."""
    context_length: int = 24
    """Tokens per caption, start and end included; longer ones are cut."""

    num_latents: int = 40_000
    """Training pictures for the denoiser; their latents are computed once and kept in memory."""
    caption_dropout: float = 0.1
    """Share of examples whose caption is replaced by the empty one, for guidance."""
    num_validation_images: int = 512
    """Pictures of the validation split."""
    guidance_scale: float = 4.0
    """Guidance of the pictures drawn at validations."""
    num_inference_steps: int = 20
    """DDIM steps of these pictures."""
    num_validation_prompts: int = 200
    """Benchmark captions drawn and checked at validations, for scenes; 0 = none."""

    def __post_init__(self) -> None:
        """Refuse values that no run can work with.

        Raises:
            UserError: Naming parameter, value and fix.
        """
        super().__post_init__()
        positive = ("autoencoder_steps", "autoencoder_batch_size", "autoencoder_learning_rate")
        positive += ("latent_channels", "unet_layers", "unet_heads", "text_layers", "text_heads")
        positive += ("num_latents", "num_validation_images", "num_inference_steps")
        for name in positive:
            require(name, getattr(self, name), getattr(self, name) > 0, "be above 0")
        for name in ("kl_weight", "num_validation_prompts"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "be 0 or more")
        require("context_length", self.context_length, self.context_length > 2, "be above 2")
        share = self.caption_dropout
        require("caption_dropout", share, 0 <= share < 1, "lie in [0, 1); 0.1 is common")
        width, heads = self.text_width, self.text_heads
        fits = width > 0 and width % heads == 0
        require("text_width", width, fits, f"be a multiple of {heads} heads")
        for name, multiple in (("autoencoder_channels", 8), ("unet_channels", 32)):
            channels = getattr(self, name)
            fits = len(channels) > 0 and all(c > 0 and c % multiple == 0 for c in channels)
            require(name, channels, fits, f"be multiples of {multiple}, the groups of the norms")
        fits = all(channels % self.unet_heads == 0 for channels in self.unet_channels)
        require("unet_channels", self.unet_channels, fits, f"be multiples of {self.unet_heads}")
        stride = 2 ** (len(self.autoencoder_channels) + len(self.unet_channels) - 2)
        fits = self.resolution % stride == 0
        require("resolution", self.resolution, fits, f"be a multiple of {stride}, of all levels")

    @property
    def grammar(self) -> str | None:
        """scenes, if that is what the captions are, else None."""
        return "scenes" if self.dataset in ("scenes", "scenes-all") else None


class Denoiser(nn.Module):
    """Text encoder and denoiser as one network, as they are trained.

    Args:
        config: The run.
        tokenizer: Its tokens are embedded.
    """

    def __init__(self, config: DiffusionTrainingConfig, tokenizer: Any) -> None:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.context_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModel(text)
        levels = len(config.unet_channels)
        settings: dict[str, Any] = {
            "sample_size": config.resolution >> (len(config.autoencoder_channels) - 1),
            "in_channels": config.latent_channels,
            "out_channels": config.latent_channels,
            "block_out_channels": config.unet_channels,
            "layers_per_block": config.unet_layers,
            "down_block_types": ("CrossAttnDownBlock2D",) * levels,
            "up_block_types": ("CrossAttnUpBlock2D",) * levels,
            "cross_attention_dim": config.text_width,
            # diffusers' historic name: it is the number of heads.
            "attention_head_dim": config.unet_heads,
        }
        self.unet = UNet2DConditionModel(**settings)
        # The first output is 0, the mean of what it has to tell.
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, noisy: Float[Tensor, "b c h w"], timesteps: Int[Tensor, " b"], tokens: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """The prediction of noisy latents at timesteps, given the captions' tokens."""
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


def train_diffusion(
    config: DiffusionTrainingConfig, *, evaluate: Evaluate | None = None, progress: bool = True
) -> FitResult:
    """Train a latent diffusion model and save it as a diffusers pipeline in `output_dir/model`.

    The design is Stable Diffusion's (Rombach et al., arXiv 2112.10752) with its noise schedule.
    Differences: the text encoder is small and learns with the denoiser; the target is v (Salimans
    and Ho, arXiv 2202.00512, appendix D), unweighted; the autoencoder has no adversarial and no
    perceptual loss; latents are the modes of its posterior.

    The autoencoder's own run is in `output_dir/autoencoder`; a resumed run skips it if it is done.
    `max_train_minutes` counts the second stage only.

    Args:
        config: The run.
        evaluate: Further validation, (draw, step) -> metrics; on every process.
        progress: Show bars.

    Returns:
        The result of the second stage; `metrics` holds `val/loss` (mean squared error of v on
        validation pictures) and the autoencoder's `val/autoencoder_psnr` (dB).

    Raises:
        UserError: If the dataset has no captions.
    """
    _need_packages()
    source = open_dataset(config, "train", seed=config.seed)
    validation = open_dataset(config, "validation", seed=config.seed)
    if not source.has_captions:
        raise UserError(
            f"train diffusion needs captions, and {config.dataset} has none. Name their column "
            "with caption_column, or put a metadata.jsonl with file_name and text beside the images"
        )
    vae, quality = train_autoencoder(config, source, validation, progress=progress)
    clean, captions = encode_all(vae, source, config.num_latents, config, progress=progress)
    tokenizer = caption_tokenizer(captions, config.context_length)
    tokens, empty = _tokens(tokenizer, captions), _tokens(tokenizer, [""])
    _warn_of_cut(tokenizer, captions)
    others, texts = encode_all(vae, validation, config.num_validation_images, config)
    held_out, shown = (others, _tokens(tokenizer, texts)), texts[:SAMPLES]
    torch.manual_seed(stream(config.seed, 1).initial_seed())
    network, scheduler = Denoiser(config, tokenizer), _scheduler()

    def load_batch(indices: np.ndarray, step: int) -> dict[str, Tensor]:
        return {"clean": clean[indices], "tokens": tokens[indices]}

    def losses(
        modules: Mapping[str, nn.Module], batch: dict[str, Tensor], step: int
    ) -> Iterator[tuple[str, Tensor, Mapping[str, float | Tensor]]]:
        clean, tokens = batch["clean"], batch["tokens"]
        dropped = torch.rand(len(tokens), 1) < config.caption_dropout
        tokens = torch.where(dropped.to(tokens.device), empty.to(tokens), tokens)
        yield "denoiser", _velocity_loss(modules["denoiser"], scheduler, clean, tokens), {}

    def validate(modules: Mapping[str, nn.Module], step: int) -> dict[str, float]:
        network = modules["denoiser"]
        assert isinstance(network, Denoiser)
        report = {"autoencoder_psnr": quality}
        with precision(config, network.unet.device):
            report["loss"] = _validation_loss(network, scheduler, *held_out)
        draw = drawer(_pipeline(network, vae, tokenizer, scheduler), config)
        if processes.is_main():
            path = Path(config.output_dir, "samples", f"step_{step:08d}.png")
            save_grid(draw(shown), path, columns=8, captions=shown)
        return report | dict(evaluate(draw, step) if evaluate is not None else {})

    result = fit(
        config,
        modules={"denoiser": network},
        optimizers={"denoiser": adamw(decay_groups(network.named_parameters(), _plain), config)},
        load_batch=load_batch,
        dataset_size=len(clean),
        losses=losses,
        validate=validate,
        progress=progress,
    )
    if processes.is_main():
        best = result.ema_modules.get("denoiser", network)
        assert isinstance(best, Denoiser)
        save(_pipeline(best, vae, tokenizer, scheduler), config)
    return result


def _velocity_loss(network: nn.Module, scheduler: Any, clean: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared error of v at random timesteps; draws from torch's global state, on the CPU."""
    count = scheduler.config.num_train_timesteps
    timesteps = torch.randint(count, (len(clean),)).to(clean.device)
    noise = torch.randn(clean.shape).to(clean)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    with trained_attention(clean.device, network):
        return F.mse_loss(network(noisy, timesteps, tokens).float(), target)


def _validation_loss(network: Denoiser, scheduler: Any, clean: Tensor, tokens: Tensor) -> float:
    torch.manual_seed(0)  # the same noise at each validation
    device, total = network.unet.device, 0.0
    for some, theirs in zip(clean.split(DRAW_BATCH), tokens.split(DRAW_BATCH), strict=True):
        loss = _velocity_loss(network, scheduler, some.to(device), theirs.to(device))
        total += float(loss) * len(some)
    return total / len(clean)


def caption_tokenizer(captions: Sequence[str], context_length: int) -> Any:
    """CLIP's tokenizer with byte pairs learnt from these captions.

    A vocabulary that is not full makes one token of each of their words; other words are spelled.

    Args:
        captions: Texts like those that it will read.
        context_length: Tokens per text, start and end included.
    """
    from transformers import CLIPTokenizer

    return CLIPTokenizer(model_max_length=context_length).train_new_from_iterator(
        sorted(set(captions)), vocab_size=VOCABULARY, show_progress=False
    )


def drawer(pipe: Any, config: DiffusionTrainingConfig) -> Draw:
    """A pipeline as a function, with the guidance and DDIM steps of a run, eta 0."""

    def draw(captions: Sequence[str]) -> Float[Tensor, "b 3 H W"]:
        pictures = []
        for first in range(0, len(captions), DRAW_BATCH):
            few = list(captions[first : first + DRAW_BATCH])
            seeds = range(first, first + len(few))
            with precision(config, pipe.device):
                drawn = pipe(
                    few,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    generator=[image_stream(seed) for seed in seeds],
                    output_type="pt",
                )
            pictures.append(drawn.images.float().cpu())
        return torch.cat(pictures)

    return draw


def save(pipe: Any, config: DiffusionTrainingConfig) -> None:
    """Write `output_dir/model`, with what the captions are in a file beside diffusers' own."""
    with storage.replace_folder(Path(config.output_dir, "model")) as folder:
        pipe.save_pretrained(folder)
        # diffusers would warn about a key of ours in model_index.json.
        storage.write_json(folder / "nextscale.json", {"grammar": config.grammar})


def _pipeline(network: Denoiser, vae: Any, tokenizer: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> Any:
    """Stable Diffusion's noise, for v."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def _tokens(tokenizer: Any, captions: Sequence[str]) -> Int[Tensor, "b s"]:
    """As the pipeline makes them."""
    found = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids


def _warn_of_cut(tokenizer: Any, captions: Sequence[str]) -> None:
    """Say once how many captions the model cannot take in whole."""
    limit, different = tokenizer.model_max_length, sorted(set(captions))
    cut = [c for c in different if len(tokenizer(c, verbose=False).input_ids) > limit]
    if cut:
        logger.warning(
            "%d of %d different captions are longer than context_length %d and are cut, such as "
            '"%s"', len(cut), len(different), limit, cut[0],
        )  # fmt: skip


def _plain(name: str) -> bool:
    """Embeddings of words and places do not decay."""
    return "embedding" in name and "text_encoder" in name


def _need_packages() -> None:
    if any(find_spec(name) is None for name in ("diffusers", "transformers")):
        raise missing_extra("train diffusion needs diffusers and transformers", "align")


__all__ = ["Denoiser", "DiffusionTrainingConfig", "caption_tokenizer", "train_diffusion"]
