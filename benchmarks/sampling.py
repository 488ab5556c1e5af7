"""Seconds per image of the sampler beside the bare matrix products of the same shapes.

    python benchmarks/sampling.py

256 px. On a CPU: d16, 1 and 2 threads, B = 1 and 4. On CUDA: d16, d20, d24, d30, B = 1, 8, 64,
eager and compiled.

Random weights, guidance on, decoder included. The bound is the time of the linear layers,
convolutions and attention products that the call itself makes, replayed alone in the same run with
the same weights: what no sampler around the same kernels can beat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from record import save_record
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nextscale.processes import keep_freed_memory
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig
from nextscale.tokenizers.train import initialize as initialize_tokenizer
from nextscale.var import (
    ClassConditioner,
    NextScaleTransformer,
    SamplingConfig,
    TransformerConfig,
    sample,
)
from nextscale.var.transformer import initialize

# next-scale.md 3.4: lower bound in ms per image on an H200, transformer and decoder.
ROOFLINE_MS = {
    (16, 1): 2.15, (20, 1): 3.68, (24, 1): 5.95, (30, 1): 11.05,
    (16, 64): 1.26, (20, 64): 1.96, (24, 64): 2.99, (30, 64): 5.30,
}  # fmt: skip


# Seconds per image of the published implementation on 2 cores of another server CPU with AMX,
# by (dtype, batch, threads); the bound there was 6.5 s in float32 and 1.3 s in bfloat16 at B = 1
# on one thread. Compare the ratios to the bound: the machines differ.
PUBLISHED = {
    ("float32", 1, 1): 9.5, ("float32", 4, 1): 8.4, ("float32", 1, 2): 5.3, ("float32", 4, 2): 4.9,
    ("bfloat16", 1, 1): 5.1, ("bfloat16", 4, 1): 3.4, ("bfloat16", 1, 2): 2.8,
    ("bfloat16", 4, 2): 1.75,
}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Collects the heavy products of a call: operation, shapes, and the weights themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention):
            if func is F.scaled_dot_product_attention:
                kept = tuple(torch.randn_like(a) for a in args[:3])
                self.calls.append((func, kept, {"scale": kwargs.get("scale")}))
            else:
                rest = args[3:] if func is not F.linear else ()
                self.calls.append((func, (torch.randn_like(args[0]), args[1], None, *rest), {}))
        return func(*args, **kwargs)

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def build(depth: int, dtype: torch.dtype, device: str) -> tuple[NextScaleTransformer, MultiscaleVQ]:
    """A randomly initialised VAR-d`depth` and its tokenizer at the released sizes."""
    torch.manual_seed(0)
    with torch.device(device):
        tokenizer = MultiscaleVQ(TokenizerConfig())
        config = TransformerConfig(depth=depth)
        conditioner = ClassConditioner(width=config.resolved_width, num_classes=1000)
        model = NextScaleTransformer(config, conditioner)
    initialize(model)
    initialize_tokenizer(tokenizer)
    return model.to(dtype).eval(), tokenizer.to_dtype(dtype).eval()


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_megabytes(device: str) -> float:
    """Largest memory so far: of the GPU's allocator, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def measure(
    depth: int, dtype: str, batch: int, threads: int, *, repeats: int, compiled: bool, calls: int
) -> dict[str, Any]:
    """One row, in a process of its own so that the peak memory is its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command line does
    settings = SamplingConfig(guidance_scale=5.0, top_k=900, top_p=0.95)
    model, tokenizer = build(depth, getattr(torch, dtype), device)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one graph per scale
        for block in model.blocks:
            block.compile(dynamic=False)
        tokenizer.decoder.compile()

    def call() -> Tensor:
        condition = model.condition(torch.arange(batch))
        *_, last = sample(model, tokenizer, condition, settings, seeds=list(range(batch)))
        return tokenizer.decode_latents(last.f_hat)

    ours = seconds(call, repeats, device) / batch
    peak = peak_megabytes(device)
    for _ in range(calls):
        call()
    growth = peak_megabytes(device) - peak
    with Recorder() as recorder:
        call()
    bound = seconds(recorder.replay, repeats, device) / batch
    row: dict[str, Any] = {"depth": depth, "dtype": dtype, "batch": batch, "threads": threads}
    row |= {"seconds_per_image": round(ours, 4), "bound": round(bound, 4)}
    row |= {"ratio": round(ours / bound, 3), "compiled": compiled, "peak_mb": round(peak)}
    if calls:
        row |= {"calls": calls, "growth_mb": round(growth, 1)}
    if device == "cpu" and depth == 16 and (dtype, batch, threads) in PUBLISHED:
        row["published_on_another_machine"] = PUBLISHED[dtype, batch, threads]
    if device == "cuda" and (depth, batch) in ROOFLINE_MS:
        row["roofline_ms"] = ROOFLINE_MS[depth, batch]
    return row


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 20, 24, 30] if cuda else [16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64] if cuda else [1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1] if cuda else [1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", type=int, nargs="+", default=[0, 1] if cuda else [0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", type=int, default=0, help="more calls, to see memory grow")
    parser.add_argument("--output", default="benchmarks/results/sampling.json")
    options = parser.parse_args()
    rows = []
    grid = itertools.product(options.depths, options.dtypes, options.batches, options.threads)
    for case, compiled in itertools.product(grid, options.compile):
        named = {"repeats": options.repeats, "compiled": bool(compiled), "calls": options.calls}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(measure, *case, **named).result())
        print(json.dumps(rows[-1]), flush=True)
        command, device = shlex.join(["python", *sys.argv]), "cuda" if cuda else "cpu"
        save_record(options.output, command, device=device, rows=rows)


if __name__ == "__main__":
    main()
