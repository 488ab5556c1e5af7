"""How near pictures are to their originals, pair by pair, by torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nextscale import storage
from nextscale.errors import UserError, missing_extra
from nextscale.eval.images import Images

PAIRED = ("psnr", "ssim", "ms_ssim", "lpips")
MS_SSIM_SIDE = 161  # its five scales of 11 x 11 windows need more than 160 pixels


def pair_scores(
    originals: Float[Tensor, "b c h w"], pictures: Float[Tensor, "b c h w"], metric: str
) -> Float[Tensor, " b"]:
    """Score each pair of pictures in [0, 1] by "mse", "ssim" or "ms_ssim".

    SSIM is the one with a Gaussian window of 11 pixels and sigma 1.5 (Wang et al., 2004), not
    scikit-image's default, which is another number.
    """
    if metric == "mse":
        return (originals - pictures).square().mean(dim=(1, 2, 3))
    try:
        from torchmetrics.functional import image as functional
    except ImportError as error:
        raise missing_extra(f"{metric} needs torchmetrics", "eval") from error
    if metric == "ssim":
        scores = functional.structural_similarity_index_measure(
            pictures, originals, data_range=1.0, reduction="none"
        )
        assert isinstance(scores, Tensor)
        return scores
    if min(originals.shape[2:]) < MS_SSIM_SIDE:
        side = min(originals.shape[2:])
        raise UserError(f"ms_ssim needs pictures of {MS_SSIM_SIDE} pixels or more, got {side}")
    return functional.multiscale_structural_similarity_index_measure(
        pictures, originals, data_range=1.0, reduction="none"
    )


def psnr(errors: np.ndarray) -> np.ndarray:
    """PSNR in dB of mean squared errors [n] of pictures in [0, 1], by torchmetrics."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio
    except ImportError as error:
        raise missing_extra("psnr needs torchmetrics", "eval") from error
    roots = torch.from_numpy(errors).sqrt()[:, None]
    return peak_signal_noise_ratio(
        roots, torch.zeros_like(roots), data_range=1.0, reduction="none", dim=1
    ).numpy()


class Paired:
    """Picture i against original i, as a network with one feature for each score.

    Args:
        originals: As many as there are pictures.
        taps: "mse", "ssim", "ms_ssim", "lpips".
        lpips: The network of `load_lpips`, for the tap of that name.
    """

    def __init__(
        self, originals: Images, taps: Sequence[str], lpips: torch.nn.Module | None = None
    ) -> None:
        self.originals, self.lpips = originals, lpips
        self.taps: Mapping[str, int] = dict.fromkeys(taps, 1)
        self.labels: Mapping[str, str] = {}

    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int]
    ) -> dict[str, Float[Tensor, "b 1"]]:
        """Scores of pictures `indices` in float64 (LPIPS in float32).

        Raises:
            UserError: If a picture has not the size of its original.
        """
        found: dict[str, list[Tensor]] = {tap: [] for tap in self.taps}
        pairs = zip(indices, images, self.originals.load(indices), strict=True)
        for index, picture, original in pairs:
            if picture.shape != original.shape:
                raise UserError(
                    f"picture {index} is {picture.shape[1]}x{picture.shape[0]}, its original "
                    f"{self.originals.name(index)} {original.shape[1]}x{original.shape[0]}"
                )
            x, y = (_unit(p) for p in (picture, original))
            for tap, scores in found.items():
                if tap == "lpips":
                    scores.append(self._lpips(x, y))
                else:
                    scores.append(pair_scores(y, x, tap))
        return {tap: torch.stack(scores) for tap, scores in found.items()}

    @torch.inference_mode()
    def _lpips(self, x: Tensor, y: Tensor) -> Float[Tensor, " 1"]:
        assert self.lpips is not None  # loaded before the pass
        device = next(self.lpips.parameters()).device
        pair = (2 * p.float().to(device) - 1 for p in (x, y))
        return self.lpips(*pair).flatten().cpu()

    def fingerprint(self) -> dict[str, str]:
        """Nothing that features of another set would have to share."""
        return {}


def load_lpips(weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """LPIPS with AlexNet (Zhang et al., arXiv 1801.03924), as torchmetrics computes it.

    Args:
        weights: State dict of torchvision's AlexNet (alexnet-owt-7be5be79.pth); the linear layers
            come with torchmetrics.

    Raises:
        UserError: If they are another network's.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise missing_extra("lpips needs torchmetrics and torchvision", "eval") from error
    network: Any = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    # Theirs are called sliceK.N.weight, torchvision's features.N.weight.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
    missing = [theirs for theirs in names.values() if theirs not in weights]
    if missing:
        raise UserError(f"these are no weights of torchvision's AlexNet: {missing[0]} is missing")
    state = {name: weights[theirs] for name, theirs in names.items()}
    storage.load_state(network.net, state, "the AlexNet file")
    return network


def _unit(picture: np.ndarray) -> Float[Tensor, "1 3 h w"]:
    """uint8 [h, w, 3] to [0, 1] in float64."""
    return torch.from_numpy(picture.astype(np.float64) / 255).permute(2, 0, 1)[None]
