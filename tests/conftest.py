"""What the tests of several rooms share: tiny random models and the reference tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.var import ClassConditioner, Conditioner, NextScaleTransformer, TransformerConfig

# The same examples in every run, and no time limit for one of them: CI machines are slow and busy.
settings.register_profile("nextscale", deadline=None, derandomize=True)
settings.load_profile("nextscale")

GOLDEN = Path(__file__).parent / "golden" / "var"

SCALES = (1, 2, 3, 4)
CLASSES, VOCABULARY, CHANNELS, WIDTH = 5, 32, 8, 32


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Tensors of a file of tests/golden/var by its stem, as stored; do not change them."""
    return lru_cache(lambda name: load_file(GOLDEN / f"{name}.safetensors"))


@pytest.fixture(scope="session")
def golden_config() -> dict[str, Any]:
    """tests/golden/var/config.json."""
    return json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> MultiscaleVQ:
    """A random tokenizer for 8x8 images, scales 1 2 3 4, 32 codes; shared, do not change it."""
    config = TokenizerConfig(
        scales=SCALES,
        codebook_size=VOCABULARY,
        codebook_dim=CHANNELS,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
    )
    tokenizer = MultiscaleVQ(config)
    _fill(tokenizer, seed=1)
    return tokenizer.eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., NextScaleTransformer]:
    """Build a random transformer that fits `tiny_tokenizer`.

    Takes `conditioner` (default: 5 classes), `seed`, and fields of `TransformerConfig`.
    """

    def build(
        conditioner: Conditioner | None = None, *, seed: int = 2, **changes: Any
    ) -> NextScaleTransformer:
        sizes: dict[str, Any] = {
            "scales": SCALES,
            "codebook_size": VOCABULARY,
            "codebook_dim": CHANNELS,
            "depth": 2,
            "width": WIDTH,
            "num_heads": 2,
        }
        if conditioner is None:
            conditioner = ClassConditioner(width=WIDTH, num_classes=CLASSES)
        model = NextScaleTransformer(TransformerConfig(**{**sizes, **changes}), conditioner)
        _fill(model, seed)
        with torch.no_grad():
            model.head.weight.mul_(2)  # clear preferences among the codes
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_model(build_model: Callable[..., NextScaleTransformer]) -> NextScaleTransformer:
    """A random class-conditional transformer for `tiny_tokenizer`; shared, do not change it."""
    return build_model()


def _fill(module: nn.Module, seed: int) -> None:
    """Random weights that let every part matter; the global random state stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("log_scale"):
            continue
        plain = parameter.ndim < 2 or "embedding" in name or "codebook" in name
        fan_in = 4 if plain else parameter[0].numel()
        nn.init.normal_(parameter, std=1 / math.sqrt(fan_in), generator=generator)
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
