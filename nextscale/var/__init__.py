"""The next-scale transformer: model, conditioning, cache, sampling, editing."""

from nextscale.var.conditioning import (
    ClassConditioner,
    Condition,
    Conditioner,
    PretrainedTextConditioner,
    WordConditioner,
)
from nextscale.var.sampling import SamplingConfig, ScaleStep, sample
from nextscale.var.transformer import NextScaleTransformer, TransformerConfig

__all__ = [
    "ClassConditioner",
    "Condition",
    "Conditioner",
    "NextScaleTransformer",
    "PretrainedTextConditioner",
    "SamplingConfig",
    "ScaleStep",
    "TransformerConfig",
    "WordConditioner",
    "sample",
]
