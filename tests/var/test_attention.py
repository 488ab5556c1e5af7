"""The attention seam: every backend computes the same formula, or says why it cannot."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.errors import UserError
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ, ScaleSchedule
from nextscale.var import NextScaleTransformer
from nextscale.var.attention import attend

BuildModel = Callable[..., NextScaleTransformer]
SCHEDULE = ScaleSchedule([1, 2, 3])


def random_qkv(queries: int = 14, keys: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def masks() -> dict[str, Tensor | None]:
    padding = torch.ones(2, 1, 1, 14, dtype=torch.bool)
    padding[1, ..., 5:] = False
    return {"none": None, "block-causal": SCHEDULE.causal_mask(), "padding": padding}


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return (weights @ v.double()).float()


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("scale", [1.0, 0.25 / math.sqrt(8)])
def test_sdpa_equals_the_formula(name: str, scale: float) -> None:
    q, k, v = random_qkv()
    mask = masks()[name]
    out = attend(q, k, v, mask=mask, scale=scale)
    torch.testing.assert_close(out, naive(q, k, v, mask, scale), atol=1e-5, rtol=0)


def test_queries_and_keys_may_differ_in_number() -> None:
    q, k, v = random_qkv(queries=9)
    out = attend(q, k, v, scale=1.0)
    torch.testing.assert_close(out, naive(q, k, v, None, 1.0), atol=1e-5, rtol=0)


# Uncompiled FlexAttention says that it is slow, which is the point of this small shape.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", masks())
@pytest.mark.usefixtures("without_shape_checks")
def test_flex_equals_sdpa(name: str) -> None:
    q, k, v = random_qkv()
    mask = masks()[name]
    out = attend(q, k, v, mask=mask, scale=0.5, backend="flex")
    expected = attend(q, k, v, mask=mask, scale=0.5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_xformers_off_cuda_is_refused_with_the_way_out() -> None:
    q, k, v = random_qkv()
    with pytest.raises(UserError, match=r"xformers runs on CUDA only, .* on cpu; use sdpa"):
        attend(q, k, v, scale=1.0, backend="xformers")


def test_an_unknown_backend_is_refused() -> None:
    q, k, v = random_qkv()
    unknown: Any = "flash"
    with pytest.raises(UserError, match='one of sdpa, flex, xformers, got "flash"'):
        attend(q, k, v, scale=1.0, backend=unknown)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("without_shape_checks")
def test_the_model_passes_its_backend_on(build_model: BuildModel) -> None:
    model = build_model()
    inputs = torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(1))
    expected = model(inputs, class_labels=[0, 1])
    model.backend = "flex"
    torch.testing.assert_close(model(inputs, class_labels=[0, 1]), expected, atol=2e-5, rtol=0)
    model.backend = "xformers"
    with pytest.raises(UserError, match="CUDA only"):
        model(inputs, class_labels=[0, 1])


CAN_COMPILE = (
    any(map(shutil.which, ("c++", "g++", "clang++")))
    and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # one graph, traced and split like a compiled one, run by torch's own kernels
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,  # a minute of a CPU core for the generated kernels
                pytest.mark.skipif(not CAN_COMPILE, reason="needs a C++ compiler and Python.h"),
            ],
        ),
    ],
)
def test_compiled_equals_eager(
    tiny_tokenizer: MultiscaleVQ, build_model: BuildModel, tmp_path: Path, backend: str
) -> None:
    NextScalePipeline(tiny_tokenizer, build_model(depth=1)).save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("compiled.py")
    words = [sys.executable, str(script), str(tmp_path / "model"), backend]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
