"""Images -> numbers with their protocol."""

from nextscale.eval.feature_network import small_features
from nextscale.eval.frechet import frechet_distance
from nextscale.eval.measure import evaluate
from nextscale.eval.pairwise import kernel_distance, precision_recall, vendi_score
from nextscale.eval.scores import inception_score

__all__ = [
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "small_features",
    "vendi_score",
]
