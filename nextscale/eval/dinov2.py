"""DINOv2 by timm, the network of FD-DINOv2 (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from nextscale import storage
from nextscale.errors import UserError, missing_extra
from nextscale.eval.features import exact_convolutions
from nextscale.eval.weights import HubFile

ARCHITECTURE = "vit_large_patch14_dinov2"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
WEIGHTS = HubFile(
    f"timm/{ARCHITECTURE}.lvd142m", "model.safetensors", "NEXTSCALE_DINOV2", "--dinov2_weights"
)


class DinoV2:
    """The class token after the last norm, as dgm-eval reads it: the tap "dinov2".

    Pictures are resized to 224 x 224 by Pillow's bicubic filter, whatever their shape. torch-
    fidelity resizes another way, so its values differ.

    Args:
        weights: timm's file of ViT-L/14 without registers (or of `architecture`).
        architecture: timm's name.
        device: Where to run.
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        architecture: str = ARCHITECTURE,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            import timm
            from timm.models import load_checkpoint
            from timm.models.vision_transformer import checkpoint_filter_fn
        except ImportError as error:
            raise missing_extra("DINOv2 needs timm", "eval") from error
        try:
            network: Any = timm.create_model(architecture, num_classes=0, img_size=SIDE)
            # Their filter brings the positions of 518 pixels down to 224.
            loaded: Any = load_checkpoint(
                network, str(weights), filter_fn=checkpoint_filter_fn, strict=False
            )
            if loaded.missing_keys:
                raise ValueError(f"{loaded.missing_keys[0]} is missing")
        except (
            RuntimeError,
            ValueError,
            OSError,
            pickle.UnpicklingError,
            SafetensorError,
        ) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{weights} does not hold {architecture}: {reason}") from error
        self.taps: Mapping[str, int] = {"dinov2": network.num_features}
        self.labels: Mapping[str, str] = (
            {} if architecture == ARCHITECTURE else {"dinov2": architecture}
        )
        self.sha256 = storage.fingerprint(network.state_dict())
        self.architecture, self.device = architecture, torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Float[Tensor, "b d"]]:
        """Features of uint8 RGB pictures [h, w, 3], float32."""
        size = (SIDE, SIDE)
        resized = [Image.fromarray(i).resize(size, Image.Resampling.BICUBIC) for i in images]
        x = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
        x = (x.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with exact_convolutions():
            features = self.network.forward_features(x.permute(0, 3, 1, 2).to(self.device))
        return {"dinov2": features[:, 0].float()}

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"dinov2": self.architecture, "dinov2_weights": self.sha256}
