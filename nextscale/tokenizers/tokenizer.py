"""`MultiscaleVQ`: images <-> tokens on a schedule of scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale import storage
from nextscale.errors import UserError, require
from nextscale.tokenizers.autoencoder import Decoder, Encoder, channels_last
from nextscale.tokenizers.quantizer import MultiscaleQuantizer, QuantizerOutput
from nextscale.tokenizers.schedule import ScaleSchedule, as_schedule

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Exactly what `tokenizer/config.json` stores; the defaults are the released tokenizer."""

    scales: tuple[int | tuple[int, int], ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Sides of the token maps in latent cells, coarse to fine."""
    codebook_size: int = 4096
    """V."""
    codebook_dim: int = 32
    """Z, channels of the latents."""
    channels: int = 160
    """Width of the finest level of the autoencoder."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level in units of `channels`; n levels shrink the image by 2^(n-1)."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level (the decoder has one more)."""
    norm_groups: int = 32
    """Groups of the group norms; must divide every width."""
    dropout: float = 0.0
    """Dropout inside residual blocks, training only."""
    num_phi: int = 4
    """phi convolutions shared among the scales; 0 = identity."""
    phi_ratio: float = 0.5
    """rho of phi(h) = (1 - rho) h + rho conv(h)."""
    commitment_weight: float = 0.25
    """beta of the quantizer loss."""
    cosine: bool = False
    """Search by cosine instead of Euclidean distance."""

    def __post_init__(self) -> None:
        for field in ("scales", "channel_multipliers"):  # JSON gives lists
            value = tuple(tuple(v) if isinstance(v, list) else v for v in getattr(self, field))
            object.__setattr__(self, field, value)
        for field in ("codebook_size", "codebook_dim", "channels", "num_res_blocks", "norm_groups"):
            require(field, getattr(self, field), getattr(self, field) > 0, "be above 0")
        multipliers = self.channel_multipliers
        positive = bool(multipliers) and all(m > 0 for m in multipliers)
        require("channel_multipliers", multipliers, positive, "hold numbers above 0")
        for field in ("num_phi", "commitment_weight"):
            require(field, getattr(self, field), getattr(self, field) >= 0, "be 0 or more")
        for field in ("phi_ratio", "dropout"):
            require(field, getattr(self, field), 0 <= getattr(self, field) <= 1, "lie in [0, 1]")
        for multiplier in (1, *self.channel_multipliers):
            if self.channels * multiplier % self.norm_groups:
                raise UserError(
                    f"norm_groups {self.norm_groups} does not divide the width "
                    f"{self.channels * multiplier}; choose channels as a multiple of norm_groups"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.channel_multipliers) - 1)


class MultiscaleVQ(nn.Module):
    """Multi-scale VQ autoencoder (VAR, arXiv 2404.02905, section 3.2).

    The encoder and decoder may run in any dtype; the quantizer stays float32.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = ScaleSchedule(config.scales)
        sizes: dict[str, Any] = {
            "channels": config.channels,
            "multipliers": config.channel_multipliers,
            "num_res_blocks": config.num_res_blocks,
            "latent_channels": config.codebook_dim,
            "dropout": config.dropout,
            "groups": config.norm_groups,
        }
        self.encoder = Encoder(**sizes)
        self.decoder = Decoder(**sizes)
        self.quantizer = MultiscaleQuantizer(
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            num_phi=config.num_phi,
            phi_ratio=config.phi_ratio,
            commitment_weight=config.commitment_weight,
            num_scales=len(config.scales),
            cosine=config.cosine,
        )
        z = config.codebook_dim
        self.quant_conv = nn.Conv2d(z, z, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z, z, 3, padding=1)
        channels_last(self)

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of the configured schedule."""
        h, w = self.schedule.grid
        return h * self.config.stride, w * self.config.stride

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which encoder and decoder compute."""
        return self.quant_conv.weight.dtype

    def to_dtype(self, dtype: torch.dtype) -> MultiscaleVQ:
        """Cast encoder and decoder; the quantizer stays float32. Returns self."""
        self.to(dtype)
        self.quantizer.float()
        return self

    def latents(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """The latents f = quant_conv(encoder(images)), float32, of images in [-1, 1].

        Raises:
            UserError: If they are no floats, or their sides no multiples of the stride.
        """
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3 or any(s % stride for s in images.shape[2:]):
            raise UserError(
                f"images must be [b, 3, H, W] with sides divisible by {stride}, "
                f"got {tuple(images.shape)}; resize them first"
            )
        if not images.is_floating_point():
            raise UserError(f"images must be floats in [-1, 1], got {images.dtype}; scale them")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight))).float()

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "b 3 H W"],
        scales: ScaleSchedule | Iterable[int | Sequence[int]] | None = None,
    ) -> Int[Tensor, "b t"]:
        """Tokens of images; never resizes.

        Args:
            images: In [-1, 1].
            scales: Another schedule whose last entry is the latent grid; default the model's own.
        """
        return self.quantizer.encode(self.latents(images), as_schedule(scales) or self.schedule)

    @torch.no_grad()
    def decode(
        self,
        tokens: Int[Tensor, "b t"],
        scales: ScaleSchedule | Iterable[int | Sequence[int]] | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Images in [-1, 1] (float32) of tokens."""
        *_, (f_hat, _) = self.quantizer.accumulate(tokens, as_schedule(scales) or self.schedule)
        return self.decode_latents(f_hat)

    @torch.no_grad()
    def decode_latents(self, f_hat: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Images of an accumulated latent F_k (any k: a preview), clamped to [-1, 1], float32."""
        f_hat = f_hat.to(self.post_quant_conv.weight)
        return self.decoder(self.post_quant_conv(f_hat)).float().clamp(-1, 1)

    @torch.no_grad()
    def teacher_inputs(
        self,
        tokens: Int[Tensor, "b t"],
        scales: ScaleSchedule | Iterable[int | Sequence[int]] | None = None,
    ) -> Float[Tensor, "b u c"]:
        """The transformer's inputs of scales 1..K-1: A_{k+1}(F_k), [B, L - n_0^2, Z], float32."""
        schedule = as_schedule(scales) or self.schedule
        steps = self.quantizer.accumulate(tokens, schedule)
        inputs = [following.flatten(2).transpose(1, 2) for _, following in steps]
        # The last step's map is the picture's; its empty slice keeps one scale alone well-defined.
        return torch.cat([*inputs[:-1], inputs[-1][:, :0]], dim=1)

    def forward(
        self,
        images: Float[Tensor, "b 3 H W"],
        *,
        num_scales: Int[Tensor, " b"] | None = None,
        quantize: bool = True,
    ) -> tuple[Float[Tensor, "b 3 H W"], QuantizerOutput | None]:
        """Training forward: reconstruction (not clamped) and the quantizer's output.

        Args:
            images: In [-1, 1].
            num_scales: Scale dropout, see `MultiscaleQuantizer.forward`.
            quantize: False passes the latents through, as a plain autoencoder; then the second
                value is None.
        """
        f = self.quant_conv(self.encoder(images))
        quantized = None
        if quantize:
            quantized = self.quantizer(f, self.schedule, num_scales=num_scales)
            f = quantized.f_hat
        return self.decoder(self.post_quant_conv(f)), quantized

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; `dtype` casts all but the quantizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format_version": FORMAT_VERSION, "class": "MultiscaleVQ", **asdict(self.config)}
        state = {
            name: tensor if dtype is None or name.startswith("quantizer.") else tensor.to(dtype)
            for name, tensor in self.state_dict().items()
        }
        storage.write_tensors(folder / "model.safetensors", state)
        storage.write_json(folder / "config.json", config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MultiscaleVQ:
        """Read what `save_pretrained` wrote (float32 on the CPU)."""
        folder = Path(folder)
        config = storage.read_config(folder / "config.json", FORMAT_VERSION, "MultiscaleVQ")
        model = cls(storage.build(TokenizerConfig, config, folder))
        state = storage.read_tensors(folder / "model.safetensors")
        storage.load_state(model, {k: v.float() for k, v in state.items()}, folder)
        return model.eval()

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        scales: Sequence[int] | None = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    ) -> MultiscaleVQ:
        """Load a released VAR tokenizer (`vae_ch160v4096z32.pth`) or its state dict.

        All sizes are inferred from the shapes. The 512 px models use the same file with the scales
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32).

        Args:
            source: Path of a .pth or .safetensors file, or a state dict: flat, nested or prefixed.
            scales: Sides of the token maps.
        """
        from nextscale.tokenizers.official import read_tokenizer

        config, state = read_tokenizer(source, scales)
        model = cls(config)
        storage.load_state(model, state, "the official tokenizer")
        return model.eval()


def psnr(images: Float[Tensor, "b 3 H W"], others: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB per image; both in [-1, 1] (peak-to-peak 2)."""
    mse = F.mse_loss(images.float(), others.float(), reduction="none").mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))
