"""Images per second of a training step of the bundled transformer, on the CPU.

    python benchmarks/training.py

Random tokens, the sizes of the recipe `scenes-var`, forward, backward and AdamW in bf16 autocast;
eager and compiled, with glibc's own settings and with freed memory kept as the command line does
(every large tensor is otherwise mapped and faulted in anew). Each row is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from record import save_record

from nextscale.cli.recipes import read_recipe
from nextscale.data import captions as scenes_grammar
from nextscale.processes import keep_freed_memory
from nextscale.tokenizers import TokenizerConfig
from nextscale.var import NextScaleTransformer, TransformerConfig, WordConditioner
from nextscale.var.transformer import initialize

PROMPT = "a red circle left of a blue square"


def measure(compiled: bool, batch: int, steps: int) -> float:
    """Images per second, the median of some steps after warm-up."""
    recipe = read_recipe("scenes-var", "train var")
    tokenizer = TokenizerConfig(**read_recipe("scenes-tokenizer", "train tokenizer")["tokenizer"])
    torch.manual_seed(0)
    config = TransformerConfig(
        **recipe["transformer"],
        scales=tokenizer.scales,
        codebook_size=tokenizer.codebook_size,
        codebook_dim=tokenizer.codebook_dim,
    )
    words = {**recipe["words"], "words": tuple(scenes_grammar.VOCABULARY)}
    model = NextScaleTransformer(config, WordConditioner(width=config.resolved_width, **words))
    initialize(model)
    model.train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    length = model.schedule.num_tokens
    inputs = torch.randn(batch, length - 1, config.codebook_dim).bfloat16()
    tokens = torch.randint(config.codebook_size, (batch, length))
    ids = model.conditioner.tokenize([PROMPT] * batch)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, ids=ids)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--row", choices=("eager", "compiled"), help="internal: one process")
    parser.add_argument("--keep", action="store_true", help="internal")
    parser.add_argument("--output", default="benchmarks/results/training.json")
    options = parser.parse_args()
    if options.row:
        torch.set_num_threads(options.threads[0])
        if options.keep:
            keep_freed_memory()
        print(measure(options.row == "compiled", options.batch, options.steps))
        return
    rows = []
    for threads in options.threads:
        for mode in ("eager", "compiled"):
            for kept in (False, True):
                command = [sys.executable, __file__, "--row", mode, "--threads", str(threads)]
                command += ["--batch", str(options.batch), "--steps", str(options.steps)]
                command += ["--keep"] if kept else []
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                row = {"threads": threads, "mode": mode, "freed_memory_kept": kept}
                row["images_per_second"] = round(float(done.stdout.split()[-1]), 1)
                rows.append(row)
                print(json.dumps(row), flush=True)
    save_record(options.output, shlex.join(["python", *sys.argv]), rows=rows)


if __name__ == "__main__":
    main()
