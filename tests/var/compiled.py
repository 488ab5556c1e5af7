"""Compiled = eager for the model in FOLDER; a process of its own, without the shape checker, which
Dynamo cannot trace: python compiled.py FOLDER BACKEND."""

from __future__ import annotations

import sys

import torch

from nextscale.pipeline import NextScalePipeline


@torch.no_grad()
def main(folder: str, backend: str) -> None:
    """Compare the teacher-forced logits of one graph, and the tokens of compiled blocks."""
    pipe = NextScalePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    model, labels = pipe.transformer, [0, 1]
    inputs = torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(2))
    condition = model.condition(labels)
    logits = model(inputs, condition)
    tokens = pipe(class_labels=labels, seed=3, guidance_scale=2.0).tokens
    traced = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(traced(inputs, condition), logits, atol=2e-5, rtol=0)
    torch._dynamo.config.recompile_limit = 64  # one graph per scale
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    again = pipe(class_labels=labels, seed=3, guidance_scale=2.0).tokens
    assert torch.equal(again, tokens), "the compiled sampler draws other tokens"


if __name__ == "__main__":
    main(*sys.argv[1:])
