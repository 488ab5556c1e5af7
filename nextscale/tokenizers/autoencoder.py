"""The convolutional encoder and decoder (VQGAN, arXiv 2012.09841, as released with VAR).

Module names follow the released checkpoint `vae_ch160v4096z32.pth`: its tensors load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), 1x1 convolution on the skip if widths differ."""

    def __init__(self, c_in: int, c_out: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, h, w]."""
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(self.dropout(_silu(self.norm2(h))))
        h += self.nin_shortcut(x)
        return h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c, h, w]."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 after zero-padding the bottom and the right by one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _mid(channels: int, dropout: float, groups: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResBlock(channels, channels, dropout, groups),
            "attn_1": AttentionBlock(channels, groups),
            "block_2": ResBlock(channels, channels, dropout, groups),
        }
    )


def _run_level(level: nn.ModuleDict, h: Tensor) -> Tensor:
    attention = list(level["attn"])  # pyright: ignore[reportArgumentType]
    for i, block in enumerate(level["block"]):  # pyright: ignore[reportArgumentType]
        h = block(h)
        if attention:
            h = attention[i](h)
    return h


class Encoder(nn.Module):
    """Images to latents; the side shrinks by 2^(len(multipliers) - 1).

    Args:
        channels: Width of the finest level.
        multipliers: Width of each level in units of `channels`, finest first.
        num_res_blocks: Residual blocks per level; the coarsest level attends after each.
        latent_channels: Channels of the output.
        dropout: Dropout inside residual blocks.
        groups: Groups of the group norms.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, last = channels, len(multipliers) - 1
        for i, multiplier in enumerate(multipliers):
            level = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(num_res_blocks):
                level["block"].append(ResBlock(width, channels * multiplier, dropout, groups))  # pyright: ignore
                width = channels * multiplier
                if i == last:
                    level["attn"].append(AttentionBlock(width, groups))  # pyright: ignore
            if i != last:
                level["downsample"] = Downsample(width)
            self.down.append(level)
        self.mid = _mid(width, dropout, groups)
        self.norm_out = _norm(width, groups)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Latents of images in [-1, 1], before `quant_conv`."""
        h = self.conv_in(images)
        for level in self.down:
            assert isinstance(level, nn.ModuleDict)
            h = _run_level(level, h)
            if "downsample" in level:
                h = level["downsample"](h)
        for block in self.mid.values():
            h = block(h)
        return self.conv_out(_silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to images, the mirror of `Encoder` with one more block per level; not clamped."""

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        width, last = channels * multipliers[-1], len(multipliers) - 1
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid = _mid(width, dropout, groups)
        levels: list[nn.ModuleDict] = []
        for i in range(last, -1, -1):
            level = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
            for _ in range(num_res_blocks + 1):
                level["block"].append(ResBlock(width, channels * multipliers[i], dropout, groups))  # pyright: ignore
                width = channels * multipliers[i]
                if i == last:
                    level["attn"].append(AttentionBlock(width, groups))  # pyright: ignore
            if i != 0:
                level["upsample"] = Upsample(width)
            levels.append(level)
        # Stored finest first although the coarsest runs first: the order of the released file.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Images of latents that went through `post_quant_conv`."""
        h = self.conv_in(latents)
        for block in self.mid.values():
            h = block(h)
        for level in reversed(self.up):
            assert isinstance(level, nn.ModuleDict)
            h = _run_level(level, h)
            if "upsample" in level:
                h = level["upsample"](h)
        return self.conv_out(_silu(self.norm_out(h)))


def _silu(x: Tensor) -> Tensor:
    """In place where no gradient needs the input: large new tensors are slow on the CPU."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def channels_last(module: nn.Module) -> nn.Module:
    """Store 4-D weights channels-last, which CPU and GPU convolutions prefer; values are equal."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
