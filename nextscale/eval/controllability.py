"""Does a picture follow its control map? The map of the picture against the one that was given.

Definitions as in the evaluations of ControlNet++ (arXiv 2404.07987) and ControlAR (arXiv
2410.02705), computed from maps in [0, 1]; values of different extractors do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8

from nextscale.errors import UserError
from nextscale.eval.reconstruction import psnr

Maps = Float[np.ndarray, "n 3 H W"]
Labels = UInt8[np.ndarray, "n H W"]


@dataclass(frozen=True)
class ControlScore:
    """How well pictures follow their maps.

    Attributes:
        metric: canny_f1, depth_rmse, ...
        value: Mean over pictures (mIoU: of the whole set).
        se: Standard error of the mean; None for mIoU.
        higher_is_better: Direction.
    """

    metric: str
    value: float
    se: float | None
    higher_is_better: bool


def control_score(
    kind: str, given: Maps, found: Maps, labels: Callable[[Maps], Labels] | None = None
) -> ControlScore:
    """Compare given maps with those found in the pictures.

    Args:
        kind: Control type.
        given: The control maps.
        found: Maps of the pictures, by the extractor that made `given`.
        labels: segmentation: colours -> classes.

    Raises:
        UserError: If shapes differ, or the type has no metric.
    """
    if given.shape != found.shape:
        raise UserError(f"{list(given.shape)} control maps against {list(found.shape)} found ones")
    if kind not in METRIC_OF:
        raise UserError(f"there is no controllability metric for the type {kind}")
    metric = METRIC_OF[kind]
    if metric == "seg_miou":
        if labels is None:
            raise UserError("seg_miou needs the classes of the colours: pass labels")
        return ControlScore(metric, mean_iou(labels(given), labels(found)), None, True)
    scores = PER_PICTURE[metric](given, found)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return ControlScore(metric, float(scores.mean()), error, metric not in ERRORS)


def agreement(
    kind: str, given: Maps, found: Maps, labels: Callable[[Maps], Labels] | None = None
) -> Float[np.ndarray, " n"]:
    """The same for each picture, in [0, 1], 1 is perfect.

    Errors e become 1 - e: RMSE in units of 255, normals of 180 degrees; PSNR counts in units of
    its 100 dB; a negative SSIM is 0. Pictures have a mIoU of their own here, over the classes in
    them.

    Args:
        kind: Control type.
        given: The control maps.
        found: Maps of the pictures.
        labels: segmentation: colours -> classes.
    """
    metric = METRIC_OF[kind]
    if metric == "seg_miou":
        assert labels is not None
        pairs = zip(labels(given), labels(found), strict=True)
        return np.array([mean_iou(a[None], b[None]) for a, b in pairs])
    scores = PER_PICTURE[metric](given, found) / UNIT.get(metric, 1)
    return np.clip(1 - scores if metric in ERRORS else scores, 0, 1)


def f1(given: Maps, found: Maps) -> Float[np.ndarray, " n"]:
    """F1 of the white pixels of each picture, maps binarised at 0.5; 1 if both are black."""
    a, b = (maps.mean(axis=1) > 0.5 for maps in (given, found))
    both = (a & b).sum(axis=(1, 2))
    total = a.sum(axis=(1, 2)) + b.sum(axis=(1, 2))
    return np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1))


def rmse(given: Maps, found: Maps) -> Float[np.ndarray, " n"]:
    """Root of the mean squared difference in units of 0..255, as released evaluators print it."""
    a, b = (maps.mean(axis=1, dtype=np.float64) for maps in (given, found))
    return np.sqrt(((a - b) ** 2).mean(axis=(1, 2))) * 255


def mean_iou(given: Labels, found: Labels, ignore: int | None = None) -> float:
    """Mean over classes of intersection over union, from the confusion matrix of all pixels.

    Args:
        given: Classes of the control maps.
        found: Classes of the pictures.
        ignore: A class of `given` whose pixels do not count (ADE20K: 0).

    Returns:
        The mean over the classes that occur in either.
    """
    a, b = given.ravel().astype(np.int64), found.ravel().astype(np.int64)
    if ignore is not None:
        a, b = a[given.ravel() != ignore], b[given.ravel() != ignore]
    size = int(max(a.max(initial=0), b.max(initial=0))) + 1
    confusion = np.bincount(a * size + b, minlength=size * size).reshape(size, size)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()
    present = union > 0
    return float((confusion.diagonal()[present] / union[present]).mean())


def normal_degrees(given: Maps, found: Maps) -> Float[np.ndarray, " n"]:
    """Mean angle between normals in degrees; maps are (n + 1) / 2."""
    a, b = (maps.astype(np.float64) * 2 - 1 for maps in (given, found))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(lengths, 1e-9)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean(axis=(1, 2))


def ssim(given: Maps, found: Maps) -> Float[np.ndarray, " n"]:
    """SSIM of soft edges (Wang et al., 2004), not the MS-SSIM of the released evaluator."""
    from nextscale.eval.reconstruction import pair_scores

    return pair_scores(torch.from_numpy(given), torch.from_numpy(found), "ssim").numpy()


def map_psnr(given: Maps, found: Maps) -> Float[np.ndarray, " n"]:
    """PSNR of low-resolution pictures in dB, at most 100."""
    errors = ((given.astype(np.float64) - found) ** 2).mean(axis=(1, 2, 3))
    return psnr(np.maximum(errors, 1e-10))


PER_PICTURE: Mapping[str, Callable[[Maps, Maps], np.ndarray]] = {
    "canny_f1": f1,
    "edge_ssim": ssim,
    "depth_rmse": rmse,
    "normal_degrees": normal_degrees,
    "lowres_psnr": map_psnr,
}
ERRORS = ("depth_rmse", "normal_degrees")
UNIT = {"depth_rmse": 255, "normal_degrees": 180, "lowres_psnr": 100}
METRIC_OF: Mapping[str, str] = {
    "canny": "canny_f1",
    "scribble": "canny_f1",
    "softedge": "edge_ssim",
    "hed": "edge_ssim",
    "lineart": "edge_ssim",
    "pidi": "edge_ssim",
    "depth": "depth_rmse",
    "zoe": "depth_rmse",
    "segmentation": "seg_miou",
    "normal": "normal_degrees",
    "normalbae": "normal_degrees",
    "lowres": "lowres_psnr",
    "inpaint": "lowres_psnr",
}
