"""A small feature network of one's own: the bundled one is trained on scenes.

Fréchet distances of its features are called `fd_scenes`, never FID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale import storage
from nextscale.data.images import to_float
from nextscale.errors import UserError, missing_extra, require
from nextscale.eval.features import exact_convolutions

FORMAT_VERSION = 1
MAX_DIM = 128
BUNDLED = "scenes-features"


@dataclass(frozen=True, kw_only=True)
class FeatureNetworkConfig:
    """Size of a feature network: a residual network of basic blocks by timm."""

    resolution: int = 64
    """Side of the pictures in pixels; it reads no other size."""
    channels: tuple[int, int, int, int] = (32, 64, 64, 64)
    """Channels of each stage, at 1/4, 1/8, 1/16, 1/32 of the side. The last is the features' d."""
    blocks: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Residual blocks of each stage."""

    def __post_init__(self) -> None:
        sizes = (*self.channels, *self.blocks, self.resolution)
        require("channels, blocks, resolution", sizes, min(sizes) > 0, "be above 0")
        last = self.channels[-1]
        require("channels", self.channels, last <= MAX_DIM, f"end in {MAX_DIM} or less")


class FeatureNetwork(nn.Module):
    """Pictures [b, 3, R, R] in [-1, 1] -> features [b, d]: the mean of the last feature map.

    Args:
        config: Its size.
    """

    def __init__(self, config: FeatureNetworkConfig) -> None:
        super().__init__()
        try:
            from timm.models.resnet import BasicBlock, ResNet
        except ImportError as error:
            raise missing_extra("the feature network needs timm", "eval") from error
        self.config = config
        first = config.channels[0]
        self.trunk = ResNet(
            BasicBlock,  # pyright: ignore[reportArgumentType]
            config.blocks,
            channels=config.channels,
            num_classes=0,
            stem_type="deep",
            stem_width=first // 2,
        )

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.config.channels[-1]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Features; ReLU outputs averaged over the map, hence not negative."""
        return self.trunk(images)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float16)."""
        folder = Path(folder)
        with storage.os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        storage.write_tensors(folder / "model.safetensors", state)
        about = {"format_version": FORMAT_VERSION, "class": "FeatureNetwork"}
        storage.write_json(folder / "config.json", about | asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FeatureNetwork:
        """Read what `save_pretrained` wrote (float32 on the CPU)."""
        folder = Path(folder)
        config = storage.read_config(folder / "config.json", FORMAT_VERSION, "FeatureNetwork")
        model = cls(storage.build(FeatureNetworkConfig, config, folder))
        state = storage.read_tensors(folder / "model.safetensors")
        floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        storage.load_state(model, floats, folder)
        return model.eval()


class SmallFeatures:
    """A feature network as `evaluate` reads it: the tap "scenes".

    Args:
        network: The network.
        name: What to call it.
        device: Where to run.
    """

    def __init__(
        self, network: FeatureNetwork, name: str, *, device: torch.device | str = "cpu"
    ) -> None:
        self.taps: Mapping[str, int] = {"scenes": network.dim}
        self.labels: Mapping[str, str] = {} if name == BUNDLED else {"scenes": name}
        self.name, self.device = name, torch.device(device)
        self.sha256 = storage.fingerprint(network.state_dict())
        self.network: Any = network.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Float[Tensor, "b d"]]:
        """Features of uint8 RGB pictures [R, R, 3], float32."""
        side = self.network.config.resolution
        for image in images:
            if image.shape[:2] != (side, side):
                height, width = image.shape[:2]
                raise UserError(
                    f"{self.name} reads pictures of {side}x{side}, got {width}x{height}: it was "
                    "trained on that size, and would call resizing a fault of the pictures"
                )
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        with exact_convolutions():
            return {"scenes": self.network(to_float(batch).to(self.device)).float()}

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"features": self.name, "features_weights": self.sha256}


def small_features(
    name: str | Path = BUNDLED, *, device: torch.device | str = "cpu"
) -> SmallFeatures:
    """The bundled feature network, or one from a folder of `nextscale train features`."""
    bundled = str(name) == BUNDLED
    network = FeatureNetwork.from_pretrained(storage.ASSETS / BUNDLED if bundled else name)
    return SmallFeatures(network, BUNDLED if bundled else storage.short_name(name), device=device)
