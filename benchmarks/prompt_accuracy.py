"""Share of benchmark captions whose every statement holds in the generated picture.

    python benchmarks/prompt_accuracy.py --model scenes --benchmarks standard compositional hard

500 fixed captions each (`nextscale/data/benchmarks/`), one picture per caption at the model's
default settings (or those given), judged by the checker; Wilson 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import nextscale as ns
from nextscale.data.benchmark import BENCHMARKS, load_benchmark
from nextscale.data.checker import check_batch, prompt_accuracy
from nextscale.data.images import to_uint8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--benchmarks", nargs="+", default=list(BENCHMARKS))
    parser.add_argument("--num_captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--num_candidates", type=int)
    parser.add_argument("--output")
    options = parser.parse_args()
    pipe = ns.NextScalePipeline.from_pretrained(options.model, dtype=options.dtype)
    results = {}
    for name in options.benchmarks:
        captions = load_benchmark(name)[: options.num_captions]
        images = pipe(
            captions,
            seed=options.seed,
            batch_size=options.batch_size,
            guidance_scale=options.guidance_scale,
            top_k=options.top_k,
            top_p=options.top_p,
            temperature=options.temperature,
            num_candidates=options.num_candidates,
            output_type="pt",
            progress=True,
        ).images
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        results[name] = prompt_accuracy(check_batch(pixels, captions))
        low, high = results[name]["interval"]
        print(f"{name}: {results[name]['accuracy']:.3f} [{low:.3f}, {high:.3f}]", flush=True)
        for kind, values in results[name]["kinds"].items():
            print(f"  {kind}: {values['accuracy']:.3f} (n = {values['n']})")
    if options.output:
        record = {
            "settings": {k: v for k, v in vars(options).items() if k != "output"},
            "torch": torch.__version__,
            "results": results,
        }
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
