"""Rewards of whole sets of pictures: Fréchet distance to a reference, and diversity (DRAGON)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nextscale import storage
from nextscale.align.rewards.reward import AnyReward, CheckedReward, Prompts, as_reward
from nextscale.data.images import to_uint8
from nextscale.errors import UserError, require
from nextscale.eval.clip import ClipFeatures
from nextscale.eval.feature_network import BUNDLED, SmallFeatures
from nextscale.eval.features import extract
from nextscale.eval.frechet import Moments, as_float64, frechet_distance
from nextscale.eval.images import open_images
from nextscale.eval.pairwise import vendi_score, vendi_without
from nextscale.eval.statistics import check_same, is_statistics, read_statistics

logger = logging.getLogger(__name__)

WORLDS = ("scenes", "scenes-all")
SIDE = 64  # of the pictures of a built-in world where the features have no size of their own
NUM_REFERENCE = 2000  # pictures of a built-in world that make its reference
_CANCELLED = 1e-6  # share of the scatter below which a downdate has lost its digits


class Thumbnails:
    """Mean colours of a grid of fields: what a picture is like without any network.

    Sets by these features are compared by palette and rough layout alone.

    Args:
        size: Fields per side; size^2 x 3 features in [0, 1].
    """

    def __init__(self, size: int = 4) -> None:
        require("size", size, size > 0, "be above 0")
        self.size = size
        self.taps: Mapping[str, int] = {"pixels": 3 * size * size}
        self.labels: Mapping[str, str] = {"pixels": f"{size}x{size}"}

    def __call__(
        self, images: Sequence[np.ndarray], indices: Sequence[int] = ()
    ) -> dict[str, Float[Tensor, "b d"]]:
        """Features of uint8 RGB pictures [h, w, 3]."""
        pixels = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in images]
        fields = [adaptive_avg_pool2d(picture, self.size) for picture in pixels]
        return {"pixels": torch.stack(fields).flatten(1)}

    def fingerprint(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"model": "thumbnails", "pixels": str(self.size)}


FeatureNetwork = SmallFeatures | ClipFeatures | Thumbnails
FeatureFunction = Callable[[Tensor], Float[Tensor, "b d"]]
"""Pictures in [0, 1] -> features."""


class FrechetReward:
    """Minus the Fréchet distance of a set of pictures to a reference (DRAGON, arXiv 2504.15217).

    A sample's contribution is how much the distance grows without it (leave-one-out FID as a
    reward: arXiv 2603.23086): FD(D without i) - FD(D). Each is exact, from moments downdated by
    one row, and costs one decomposition of [d, d]. Covariances divide by n - 1. With fewer samples
    than about ten times d the distance is biased upwards, by an amount that depends on n: compare
    sets of equal n.

    Args:
        features_of: Pictures -> features.
        mean: Of the reference's features, [d].
        covariance: Of the reference's features, [d, d].
        name: What to call it.
    """

    def __init__(
        self,
        features_of: FeatureFunction,
        mean: Tensor | np.ndarray,
        covariance: Tensor | np.ndarray,
        name: str = "frechet",
    ) -> None:
        self.name, self.features_of = name, features_of
        self.mean, self.covariance = as_float64(mean).cpu(), as_float64(covariance).cpu()

    def features(self, images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Float[Tensor, "b d"]:
        """Features of pictures in [0, 1], on their device."""
        return self.features_of(images).to(images.device)

    def score_set(self, features: Float[Tensor, "n d"]) -> float:
        """Minus the distance of a set to the reference, 0 or less.

        Raises:
            UserError: Below 2 rows.
        """
        return self.score_moments(Moments.of(features.detach().cpu()))

    def score_moments(self, moments: Moments) -> float:
        """The same from the set's moments, which can be updated row by row."""
        return -self._distance(moments)

    def contributions(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """FD(D without i) - FD(D), float64: above 0 where a row brings the set nearer.

        Raises:
            UserError: Below 3 rows.
        """
        rows = as_float64(features.detach().cpu())
        if len(rows) < 3:
            raise UserError(f'the reward "{self.name}" needs 3 pictures or more, got {len(rows)}')
        whole = Moments.of(rows)
        without = [self._distance(without_row(whole, rows, i)) for i in range(len(rows))]
        found = torch.tensor(without, dtype=torch.float64) - self._distance(whole)
        return found.to(features.device)

    def _distance(self, moments: Moments) -> float:
        return frechet_distance(moments.mean, moments.covariance, self.mean, self.covariance)


class VendiReward:
    """The Vendi score of a set: its effective number of different pictures, in [1, n].

    Friedman and Dieng, arXiv 2210.02410, with the cosine kernel; a reward without reference in
    DRAGON (arXiv 2504.15217). Alone it rewards noise: use it beside a reward of quality.

    Args:
        features_of: Pictures -> features.
        name: What to call it.
    """

    def __init__(self, features_of: FeatureFunction, name: str = "vendi") -> None:
        self.name, self.features_of = name, features_of

    def features(self, images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Float[Tensor, "b d"]:
        """Features of pictures in [0, 1], on their device."""
        return self.features_of(images).to(images.device)

    def score_set(self, features: Float[Tensor, "n d"]) -> float:
        """The Vendi score."""
        return vendi_score(features.detach().cpu())

    def contributions(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """How much the score falls without each row, float64.

        Raises:
            UserError: Below 2 rows.
        """
        rows = features.detach().cpu()
        if len(rows) < 2:
            raise UserError(f'the reward "{self.name}" needs 2 pictures or more, got {len(rows)}')
        without = torch.tensor(list(vendi_without(rows, len(rows))), dtype=torch.float64)
        return (vendi_score(rows) - without).to(features.device)


def instance_to_distribution(
    features: Float[Tensor, "n d"], mean: Tensor | np.ndarray, covariance: Tensor | np.ndarray
) -> Float[Tensor, " n"]:
    """Minus the Fréchet distance of each single row to a reference: -(|x - mu|^2 + tr S).

    The instance-to-distribution reward of DRAGON (arXiv 2504.15217) with one feature vector per
    picture, whose covariance is zero; the paper also takes several parts of a sample.

    Args:
        features: [n, d].
        mean: mu, [d].
        covariance: S, [d, d].

    Returns:
        float64, 0 or less.
    """
    rows = as_float64(features)
    squares = (rows - as_float64(mean).to(rows)).square().sum(dim=1)
    return -(squares + as_float64(covariance).trace().to(rows))


def instance_frechet_reward(reward: FrechetReward, name: str = "frechet_instance") -> CheckedReward:
    """`instance_to_distribution` as a reward of single pictures."""

    def distance(images: Float[Tensor, "b 3 h w"], prompts: Prompts) -> Tensor:
        rows = reward.features(images, prompts)
        return instance_to_distribution(rows, reward.mean, reward.covariance)

    bounds = (-float("inf"), 0.0)
    return as_reward(distance, name, range=bounds, needs_prompt=False)


def frechet_reward(reference: str, network: FeatureNetwork, name: str = "frechet") -> FrechetReward:
    """The Fréchet reward of a set of exemplars; every process of a run must call it.

    Args:
        reference: A folder or file of pictures, an .npz of statistics (`nextscale eval stats`), or
            scenes or scenes-all (2000 pictures of its validation part). With CLIP also a .txt with
            one text per line: DRAGON's exemplars of another modality.
        network: Gives the features.
        name: What to call it.

    Raises:
        UserError: If there is no such reference, it was made with another network, or it holds
            fewer than 2 exemplars. Fewer exemplars than features are warned of.
    """
    tap = next(iter(network.taps))
    if is_statistics(reference):
        statistics = read_statistics(reference)
        if tap not in statistics.values:
            raise UserError(
                f"{reference} holds statistics of {', '.join(statistics.values)} features, not of "
                f"{network.labels.get(tap, BUNDLED)}. Make them with nextscale eval stats and the "
                f"metric fd_{tap}"
            )
        check_same(statistics, network.fingerprint())
        if statistics.count is not None:
            _check_count(reference, statistics.count, network.taps[tap])
        mean, covariance = statistics.values[tap]
        return FrechetReward(features_by(network), mean, covariance, name)
    moments = _moments(reference, network, tap)
    _check_count(reference, moments.count, network.taps[tap])
    return FrechetReward(features_by(network), moments.mean, moments.covariance, name)


def _check_count(reference: str, count: int, features: int) -> None:
    if count < 2:
        raise UserError(
            f"{reference} holds one exemplar, which has no spread to compare with. Give two or "
            "more, better some hundred"
        )
    if count <= features:
        logger.warning(
            "%s holds %d exemplars, fewer than the %d features: their covariance is not of full "
            "rank, and the distance is far above its value for many exemplars",
            *(reference, count, features),
        )


def warn_of_small_sets(reward: AnyReward, count: int) -> None:
    """Say it if sets of `count` pictures are too small for a Fréchet reward's features."""
    if isinstance(reward, FrechetReward) and count <= len(reward.mean):
        logger.warning(
            'the reward "%s" compares sets of %d pictures, fewer than its %d features: distances '
            "are biased upwards, and only comparable between sets of this size. Draw more pictures "
            "per rollout",
            *(reward.name, count, len(reward.mean)),
        )


def features_by(network: FeatureNetwork) -> FeatureFunction:
    """Pictures in [0, 1] -> features of a network."""
    tap = next(iter(network.taps))

    def features_of(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return network(list(to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()))[tap]

    return features_of


def _moments(reference: str, network: FeatureNetwork, tap: str) -> Moments:
    """Of the features of exemplars."""
    if reference in WORLDS:
        images = open_images(*_world(reference, network))
        return extract(images, network, moments=[tap]).moments(tap)
    if not Path(reference).exists():
        kinds = "a folder or file of pictures, an .npz of eval stats, scenes or scenes-all"
        if isinstance(network, ClipFeatures):
            kinds += ", or a .txt with one text per line"
        raise UserError(f"there are no exemplars {reference}. Give {kinds}")
    if Path(reference).suffix == ".txt":
        if not isinstance(network, ClipFeatures):
            raise UserError(f"{reference} holds texts, which only CLIP reads: use frechet_clip")
        lines = [line.strip() for line in storage.read_lines(reference)]
        texts = [line for line in lines if line]
        if not texts:
            raise UserError(f"{reference} holds no texts; write one exemplar per line")
        return Moments.of(as_float64(network.clip.texts(texts)))
    return extract(open_images(reference), network, moments=[tap]).moments(tap)


def _world(name: str, network: FeatureNetwork) -> tuple[Any, int]:
    from nextscale.data.sources import open_source

    if isinstance(network, SmallFeatures):
        side = network.network.config.resolution
    else:
        side = network.clip.size if isinstance(network, ClipFeatures) else SIDE
    data = open_source(name, resolution=side, split="validation", num_images=NUM_REFERENCE)

    def draw(start: int, count: int) -> np.ndarray:
        pixels = data.load(np.arange(start, start + count)).images
        return pixels.permute(0, 2, 3, 1).numpy()

    return draw, NUM_REFERENCE


def without_row(whole: Moments, rows: Float[Tensor, "n d"], index: int) -> Moments:
    """Moments without one row; anew where subtraction would leave nothing but rounding."""
    rest = whole.without(Moments.of(rows[index : index + 1]))
    if rest.scatter.trace() > _CANCELLED * whole.scatter.trace():
        return rest
    return Moments.of(torch.cat([rows[:index], rows[index + 1 :]]))
