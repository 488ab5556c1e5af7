"""What reports measure of sets of pictures: diversity within prompts, distance to true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nextscale.align.tables import compare
from nextscale.eval.feature_network import small_features
from nextscale.eval.features import Network
from nextscale.eval.pairwise import vendi_score

_TRUE_PICTURES = 2000


@dataclass(frozen=True)
class PictureSets:
    """A network that sees sets of pictures, uint8 [n, 3, H, W].

    Attributes:
        network: Gives the features.
        metric: The Fréchet distance of its features: fid or fd_scenes.
        reference: True pictures, or their statistics; None: no distance.
    """

    network: Network
    metric: str
    reference: Any

    def diversity(self, before: Tensor, after: Tensor, groups: Int[Tensor, " n"]) -> dict[str, Any]:
        """Vendi scores of each prompt's pictures, 1 if they are all alike, compared.

        Args:
            before: Pictures.
            after: Of the same prompts and seeds.
            groups: Prompt of each picture.
        """
        most = float(groups.bincount().max())
        scores = [self._vendi_within(images, groups) for images in (before, after)]
        return compare(scores[0], scores[1], None, (1.0, most))

    @torch.no_grad()
    def _vendi_within(self, images: Tensor, groups: Tensor) -> Tensor:
        pixels = list(images.permute(0, 2, 3, 1).numpy())
        starts = range(0, len(pixels), 64)
        parts = [self.network(pixels[i : i + 64], range(i, i + 64)) for i in starts]
        features = torch.cat([next(iter(part.values())) for part in parts]).cpu().numpy()
        return torch.tensor([vendi_score(features[(groups == g).numpy()]) for g in groups.unique()])

    def distances(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """`metric` with value and standard error of each side; empty without a reference."""
        if self.reference is None:
            return {}
        return {self.metric: {"before": self._distance(before), "after": self._distance(after)}}

    def _distance(self, images: Tensor) -> dict[str, Any]:
        from nextscale.eval import evaluate

        pixels = images.permute(0, 2, 3, 1).numpy()
        measured = evaluate(pixels, self.reference, network=self.network, metrics=[self.metric])
        (value,) = measured["metrics"].values()
        return {key: value[key] for key in ("value", "se")}


def open_picture_sets(
    features: str | None,
    reference: str | None,
    *,
    scenes: bool,
    side: int,
    device: torch.device,
    download: bool = False,
) -> PictureSets | None:
    """What a report measures with.

    Args:
        features: scenes-features, a folder of `train features`, or inception (the adm protocol);
            None: scenes-features for a model that draws scenes, else nothing is measured.
        reference: True pictures: a folder, .npz, or scenes; None: scenes for such a model.
        scenes: Whether the model draws scenes.
        side: Of its pictures.
        device: Where the network runs.
        download: Fetch weights that are nowhere.
    """
    features = features or ("scenes-features" if scenes else None)
    if features is None:
        return None
    true: Any = reference or ("scenes" if scenes else None)
    if true == "scenes":
        from nextscale.data.sources import open_source

        data = open_source("scenes", resolution=side, split="validation", num_images=_TRUE_PICTURES)
        true = data.load(np.arange(_TRUE_PICTURES)).images.permute(0, 2, 3, 1).numpy()
    if features != "inception":
        return PictureSets(small_features(features, device=device), "fd_scenes", true)
    from nextscale.eval.inception import Inception, read_weights
    from nextscale.eval.weights import INCEPTION, find_weights

    weights = read_weights(find_weights(INCEPTION, None, download=download))
    return PictureSets(Inception(weights, "adm", device=device), "fid", true)
