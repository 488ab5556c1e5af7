"""Two tiny random models on disk, one per kind of condition, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.cli import main
from nextscale.data.captions import VOCABULARY
from nextscale.pipeline import NextScalePipeline
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.var import (
    ClassConditioner,
    NextScaleTransformer,
    SamplingConfig,
    TransformerConfig,
    WordConditioner,
)

SCALES = (1, 2, 4)
PROMPT = "a red circle left of a blue square"


def tiny_pipeline(kind: str) -> NextScalePipeline:
    """32x32 pixels, 21 tokens of 16 codes, weights drawn from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiscaleVQ(
            TokenizerConfig(
                scales=SCALES,
                codebook_size=16,
                codebook_dim=8,
                channels=32,
                channel_multipliers=(1, 1, 1, 1),
                num_res_blocks=1,
                norm_groups=32,
            )
        )
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
        width = 16
        conditioner = (
            ClassConditioner(width=width, num_classes=4, class_names=["cat", "dog", "hen", "owl"])
            if kind == "class"
            else WordConditioner(
                width=width,
                words=VOCABULARY,
                grammar="scenes",
                encoder_width=16,
                encoder_depth=1,
                encoder_heads=2,
            )
        )
        config = TransformerConfig(
            scales=SCALES, codebook_size=16, codebook_dim=8, depth=2, width=width, num_heads=2
        )
        transformer = NextScaleTransformer(config, conditioner)
    generation = SamplingConfig(guidance_scale=2.0, top_k=8)
    return NextScalePipeline(tokenizer, transformer, generation)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the class-conditional and of the prompt-conditional model."""
    folders = {}
    for kind in ("class", "words"):
        folder = tmp_path_factory.mktemp("models") / kind
        tiny_pipeline(kind).save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process."""

    def call(*words: str | int | float | Path) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def generate(run: Run, models: dict[str, str], tmp_path: Path) -> Run:
    """`nextscale generate` with the tiny prompt model, into tmp_path/out unless told otherwise."""

    def call(*words: str | int | float | Path) -> Result:
        given = [str(word) for word in words]
        defaults = ["--device", "cpu", "--dtype", "float32", "--batch_size", "2"]
        if "--model" not in given:
            defaults += ["--model", models["words"]]
        if "--output_dir" not in given:
            defaults += ["--output_dir", str(tmp_path / "out")]
        positional = list(takewhile(lambda word: not word.startswith("-"), given))
        return run("generate", *positional, *defaults, *given[len(positional) :])

    return call
