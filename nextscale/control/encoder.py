"""Control maps -> features per scale: a vision transformer, its output resized to every scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.errors import UserError, missing_extra, require
from nextscale.tokenizers import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which network reads the control map."""

    kind: Literal["vit", "timm", "dinov2"] = "vit"
    """vit: a small vision transformer of our own, from random weights; timm: a model of timm, such
    as ControlAR's ViT-S; dinov2: DINOv2 by transformers, ControlAR's for text."""
    name: str | None = None
    """Model of timm (None: vit_small_patch16_224.augreg_in21k_ft_in1k) or folder or hub id of
    transformers (None: facebook/dinov2-small)."""
    pretrained: bool = True
    """timm and dinov2: begin with the published weights."""
    grid: int | None = None
    """Side of the feature map of a square picture; None: that of the finest scale. Kinds with a
    fixed patch resize the picture to it."""
    width: int = 128
    """vit: channels."""
    depth: int = 3
    """vit: layers."""
    heads: int = 4
    """vit: attention heads."""
    resize: Literal["feature", "image"] = "feature"
    """feature: encode once, resize the features to every scale; image: resize the map to every
    scale and encode each (CAR), which loses thin lines at coarse scales."""

    def __post_init__(self) -> None:
        choices = {"kind": ("vit", "timm", "dinov2"), "resize": ("feature", "image")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(name, value, value in allowed, f"be one of {', '.join(allowed)}")
        for name in ("grid", "width", "depth", "heads"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "be above 0")
        require("heads", self.heads, self.width % self.heads == 0, f"divide width {self.width}")


class ControlEncoder(nn.Module):
    """Features of control maps at every scale.

    Args:
        config: Which network.
        schedule: Scales of the base.
        resolution: (height, width) of its pictures.
    """

    def __init__(
        self, config: EncoderConfig, schedule: ScaleSchedule, resolution: tuple[int, int]
    ) -> None:
        super().__init__()
        self.config, self.schedule = config, schedule
        height, width = schedule.sides[-1]
        if config.grid is not None:
            height, width = config.grid, config.grid * width // height
        self.grid = (height, width)
        if config.kind == "vit":
            self.network = SmallViT(config, self.grid, resolution)
            self.width, self._patch = config.width, None
        else:
            self.network, self.width, self._patch = _published(config)

    def forward(self, maps: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b t e"]:
        """Features of maps in [0, 1] at the cells of all scales, coarse to fine.

        Maps enter in [-1, 1] (ControlAR), not by ImageNet's mean and deviation.
        """
        if self.config.resize == "image":
            pixels = [self.network_input(maps, side) for side in self.schedule.sides]
            features = [self._features(p) for p in pixels]
        else:
            features = [self._features(self.network_input(maps, self.grid))] * len(
                self.schedule.sides
            )
        cells = [
            resized(f, side).flatten(2).transpose(1, 2)
            for f, side in zip(features, self.schedule.sides, strict=True)
        ]
        return torch.cat(cells, dim=1)

    def network_input(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps in [-1, 1] at the size whose feature map is `grid`."""
        size = maps.shape[-2:]
        if self._patch is not None:
            size = (grid[0] * self._patch, grid[1] * self._patch)
        elif grid != self.grid:
            assert isinstance(self.network, SmallViT)
            size = tuple(g * p for g, p in zip(grid, self.network.patch, strict=True))
        if tuple(size) != tuple(maps.shape[-2:]):
            shrink = size[0] < maps.shape[-2]
            maps = F.interpolate(maps, size=size, mode="area" if shrink else "nearest")
        return maps * 2 - 1

    def _features(self, pixels: Tensor) -> Float[Tensor, "b e h w"]:
        """The network's patch tokens as a map."""
        if self.config.kind == "vit":
            return self.network(pixels)
        assert self._patch is not None
        pixels = pixels.to(next(self.network.parameters()).dtype)
        if self.config.kind == "timm":
            tokens = self.network.forward_features(pixels)  # pyright: ignore[reportCallIssue]
            tokens = tokens[:, self.network.num_prefix_tokens :]  # pyright: ignore
        else:
            network: Any = self.network
            before = 1 + getattr(network.config, "num_register_tokens", 0)
            output: Any = network(pixels, interpolate_pos_encoding=True)
            tokens = output.last_hidden_state[:, before:]
        height, width = (side // self._patch for side in pixels.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


class SmallViT(nn.Module):
    """Patches, learned positions, pre-norm layers; features [b, e, h, w]."""

    def __init__(
        self, config: EncoderConfig, grid: tuple[int, int], resolution: tuple[int, int]
    ) -> None:
        super().__init__()
        if any(side % cells for side, cells in zip(resolution, grid, strict=True)):
            raise UserError(
                f"encoder.grid {grid[0]} x {grid[1]} does not divide pictures of "
                f"{resolution[0]} x {resolution[1]} pixels"
            )
        self.patch = (resolution[0] // grid[0], resolution[1] // grid[1])
        self.embed = nn.Conv2d(3, config.width, self.patch, stride=self.patch)
        self.position = nn.Parameter(torch.randn(1, config.width, *grid) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(config.width)
        self.layers = nn.TransformerEncoder(layer, config.depth, norm, enable_nested_tensor=False)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b e h w"]:
        """Features of pictures in [-1, 1]."""
        x = self.embed(pixels.to(self.embed.weight.dtype))
        x = x + resized(self.position, (x.shape[2], x.shape[3]))
        tokens = self.layers(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def resized(features: Float[Tensor, "b e h w"], side: tuple[int, int]) -> Float[Tensor, "b e H W"]:
    """Features at another size: means of areas when shrinking, bilinear when growing."""
    if tuple(features.shape[2:]) == tuple(side):
        return features
    if side[0] <= features.shape[2] and side[1] <= features.shape[3]:
        return F.interpolate(features, size=side, mode="area")
    return F.interpolate(features, size=side, mode="bilinear")


def _published(config: EncoderConfig) -> tuple[nn.Module, int, int]:
    """A published network, its channels and its patch."""
    if config.kind == "timm":
        try:
            import timm
        except ImportError as error:
            raise missing_extra("a control encoder of timm needs timm", "control") from error
        name = config.name or "vit_small_patch16_224.augreg_in21k_ft_in1k"
        try:
            network: Any = timm.create_model(
                name, pretrained=config.pretrained, num_classes=0, dynamic_img_size=True
            )
        except (RuntimeError, TypeError, OSError) as error:
            raise _not_loaded(name, error) from error
        if not hasattr(network, "num_prefix_tokens"):
            raise UserError(f'encoder.name "{name}" is no vision transformer; give a timm vit_...')
        return network, network.num_features, network.patch_embed.patch_size[0]
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise missing_extra("DINOv2 needs transformers", "control-aux") from error
    name = config.name or "facebook/dinov2-small"
    try:
        if config.pretrained:
            network = AutoModel.from_pretrained(name)
        else:
            network = AutoModel.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error) from error
    return network, network.config.hidden_size, network.config.patch_size


def _not_loaded(name: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0]
    return UserError(
        f'encoder.name "{name}" cannot be loaded ({reason}); give a folder, or a name and a network'
    )
