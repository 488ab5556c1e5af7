"""How near pictures are to their originals, pair by pair: PSNR, SSIM, MS-SSIM by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from nextscale import processes
from nextscale.errors import UserError, missing_extra
from nextscale.eval.images import Images

PAIRED = ("psnr", "ssim", "ms_ssim")
MS_SSIM_SIDE = 161  # its five scales of 11 x 11 windows need more than 160 pixels


@dataclass(frozen=True)
class PairScores:
    """One metric over all pairs.

    Attributes:
        values: Per picture, in order, float64 [n]; PSNR is infinite for equal pictures.
        pooled: PSNR of the mean squared error of all pictures, None for the others. Papers on
            tokenizers report the mean of the pictures' values, torchmetrics' class this one.
    """

    values: np.ndarray
    pooled: float | None = None


def pair_scores(
    originals: Float[Tensor, "b c h w"], pictures: Float[Tensor, "b c h w"], metric: str
) -> Float[Tensor, " b"]:
    """A metric of each pair of pictures in [0, 1].

    SSIM is the one with a Gaussian window of 11 pixels and sigma 1.5 (Wang et al., 2004), not
    scikit-image's default, which is another number.
    """
    try:
        from torchmetrics.functional import image as functional
    except ImportError as error:
        raise missing_extra(f"{metric} needs torchmetrics", "eval") from error
    if metric == "psnr":
        return functional.peak_signal_noise_ratio(
            pictures, originals, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )
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


def measure_pairs(
    pictures: Images,
    originals: Images,
    metrics: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, PairScores]:
    """Metrics of picture i against original i; each process of a run takes its share.

    Raises:
        UserError: If the sets have another number of pictures, or a pair other sizes.
    """
    if len(pictures) != len(originals):
        raise UserError(
            f"{', '.join(metrics)} compare picture i with original i: {len(pictures)} pictures "
            f"and {len(originals)} originals"
        )
    own = processes.own_range(len(pictures))
    found: dict[str, list[float]] = {metric: [] for metric in metrics}
    squares: list[float] = []
    with tqdm(total=len(own), desc="pairs", unit="image", disable=not progress) as bar:
        for start in range(own.start, own.stop, batch_size):
            rows = range(start, min(start + batch_size, own.stop))
            pairs = zip(rows, pictures.load(rows), originals.load(rows), strict=True)
            for index, picture, original in pairs:
                if picture.shape != original.shape:
                    raise UserError(
                        f"{pictures.name(index)} is {picture.shape[1]}x{picture.shape[0]}, its "
                        f"original {original.shape[1]}x{original.shape[0]}"
                    )
                x, y = (_unit(p) for p in (picture, original))
                squares.append(float((x - y).square().mean()))
                for metric in metrics:
                    found[metric].append(float(pair_scores(y, x, metric)[0]))
            bar.update(len(rows))
    parts = processes.gather((found, squares))
    error = np.mean(np.concatenate([part[1] for part in parts]))
    pooled = _psnr_of(float(error)) if "psnr" in metrics else None
    return {
        metric: PairScores(
            np.concatenate([part[0][metric] for part in parts]),
            pooled if metric == "psnr" else None,
        )
        for metric in metrics
    }


def _psnr_of(error: float) -> float:
    """PSNR of a mean squared error, by torchmetrics."""
    root = torch.tensor([[[[error**0.5]]]], dtype=torch.float64)
    return float(pair_scores(torch.zeros_like(root), root, "psnr")[0])


def _unit(picture: np.ndarray) -> Float[Tensor, "1 3 h w"]:
    """uint8 [h, w, 3] to [0, 1] in float64."""
    return torch.from_numpy(picture.astype(np.float64) / 255).permute(2, 0, 1)[None]
