"""Adaptive guidance: which evaluations can be left out at equal accuracy and fd_scenes?

    python benchmarks/guidance.py

Every row draws the `standard` benchmark captions with equal seeds, without candidates: with
guidance at all scales, without it, with it up to a scale (`guidance_end`), and until it moves the
distributions of a picture by no more than a threshold (`guidance_threshold`). Evaluations are
tokens through the transformer, in units of unguided sampling. Rows that are in the results are not
drawn again. Writes benchmarks/results/guidance.json and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from record import earlier, save_record
from torch import Tensor, nn

from nextscale.data.benchmark import load_benchmark
from nextscale.data.checker import check_batch, wilson_interval
from nextscale.data.images import to_uint8
from nextscale.data.sources import open_source
from nextscale.eval import evaluate
from nextscale.eval.feature_network import small_features
from nextscale.pipeline import NextScalePipeline

THRESHOLDS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
ROWS: dict[str, dict[str, Any]] = {
    "all scales": {},
    "none": {"guidance_scale": 1.0},
    **{f"first {k} scales": {"guidance_end": k} for k in range(1, 6)},
    **{f"threshold {t}": {"guidance_threshold": t} for t in THRESHOLDS},
}


def draw(pipe: NextScalePipeline, captions: list[str], **settings: Any) -> tuple[np.ndarray, int]:
    """Pictures, and the tokens that went through the transformer."""
    count = 0

    def counted(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += given[0].shape[0] * given[0].shape[1]

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(counted)
    out = pipe(
        captions, seed=0, num_candidates=1, batch_size=64, output_type="pt", progress=True,
        **settings,
    )  # fmt: skip
    handle.remove()
    return to_uint8(out.images).permute(0, 2, 3, 1).numpy(), count


def markdown(rows: dict[str, Any]) -> str:
    """The table of docs/generate.md."""
    lines = ["| guidance | evaluations | right | 95 % | `fd_scenes` |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        low, high = (f"{100 * x:.1f}" for x in row["interval"])
        lines.append(
            f"| {name} | {row['evaluations']:.2f} | {100 * row['accuracy']:.1f} % "
            f"| {low} to {high} | {row['fd_scenes']:.2f} ± {row['fd_scenes_se'] or math.nan:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--images", type=int, default=2, help="of each prompt")
    parser.add_argument("--references", type=int, default=5000, help="true pictures")
    parser.add_argument("--output", default="benchmarks/results/guidance.json")
    options = parser.parse_args()
    pipe = NextScalePipeline.from_pretrained(options.model)
    captions = load_benchmark("standard")[: options.prompts]
    captions = [caption for caption in captions for _ in range(options.images)]
    count = options.references
    data = open_source("scenes", resolution=64, split="validation", num_images=count)
    true = data.load(np.arange(count)).images.permute(0, 2, 3, 1).numpy()
    network = small_features("scenes-features", device="cpu")
    unit = len(captions) * pipe.transformer.schedule.num_tokens
    output = Path(options.output)
    command = f"python benchmarks/guidance.py --model {options.model} "
    command += f"--prompts {options.prompts} --images {options.images}"
    table = earlier(output, command=command)
    for name, settings in ROWS.items():
        if name in table:
            continue
        pixels, tokens = draw(pipe, captions, **settings)
        reports = check_batch(pixels, captions)
        right = sum(report.holds for report in reports)
        low, high = wilson_interval(right, len(captions))
        (distance,) = evaluate(pixels, true, network=network, metrics=["fd_scenes"])[
            "metrics"
        ].values()
        table[name] = {
            "settings": settings,
            "evaluations": tokens / unit,
            "accuracy": right / len(captions),
            "interval": [low, high],
            "statements": sum(report.score for report in reports) / len(reports),
            "fd_scenes": distance["value"],
            "fd_scenes_se": distance["se"],
        }
        print(name, json.dumps(table[name]), flush=True)
        save_record(output, command, rows=table)
    print(markdown(table))


if __name__ == "__main__":
    main()
