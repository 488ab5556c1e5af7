"""What the tests of several rooms share: tiny random models and the reference tensors."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import yaml
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale import processes
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.var import ClassConditioner, Conditioner, NextScaleTransformer, TransformerConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # each of the two workers has a core, not both of them
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, and no time limit for one of them: CI machines are slow and busy.
settings.register_profile("nextscale", deadline=None, derandomize=True)
settings.load_profile("nextscale")

GOLDEN = Path(__file__).parent / "golden" / "var"

SCALES = (1, 2, 3, 4)
CLASSES, VOCABULARY, CHANNELS, WIDTH = 5, 32, 8, 32


@pytest.fixture(autouse=True)
def process_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test runs in this process leaves nothing behind for the next test."""
    # Meant for the process of one command: that of many tests would grow to 16 GB.
    monkeypatch.setattr(processes, "keep_freed_memory", lambda: None)
    logger = logging.getLogger("nextscale")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers = handlers


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


@pytest.fixture(scope="session")
def control_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 32 x 32 pictures of the scenes' 20 classes, on disk."""
    folder = tmp_path_factory.mktemp("control") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiscaleVQ(
            TokenizerConfig(
                scales=(1, 2, 4), codebook_size=16, codebook_dim=8, channels=32,
                channel_multipliers=(1, 1, 1, 1), num_res_blocks=1,
            )
        )  # fmt: skip
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
        sizes = TransformerConfig(
            scales=(1, 2, 4), codebook_size=16, codebook_dim=8, depth=2, width=32, num_heads=2
        )
        transformer = NextScaleTransformer(sizes, ClassConditioner(width=32, num_classes=20))
    NextScalePipeline(tokenizer, transformer).save_pretrained(folder)
    return folder


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Where wrong shapes are the point, and for Dynamo, which cannot trace the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def repeat_with_two_processes() -> Callable[[str, Path, Path], None]:
    """Repeat a run's recipe under torchrun with two processes, half of its batch in each."""

    def repeat(command: str, one: Path, two: Path) -> None:
        recipe = yaml.safe_load((one / "recipe.yaml").read_text())
        recipe |= {"output_dir": str(two), "train_batch_size": recipe["train_batch_size"] // 2}
        path = two.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe))
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node=2", "-m", "nextscale", *command.split(), "--config", str(path)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=240)
        finally:
            process.terminate()  # and not kill: torchrun ends its workers
        assert process.returncode == 0, errors
        assert json.loads((two / "run.json").read_text())["processes"] == 2

    return repeat
