"""What brings an erased concept back, and how often? All attacks on finished runs.

    nextscale erase --config erase-scenes --concepts "red circle" --output_dir runs/red_circle
    python benchmarks/erasure_attacks.py --runs runs/red_circle

For each run the same attacks on the model as it was before (what a share of pictures with the
concept looks like where nothing was erased) and on the edited one. Writes
benchmarks/results/erasure_attacks.json and prints it as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from record import earlier, save_record

from nextscale.align.erasure.attacks import attack
from nextscale.align.erasure.config import EraseConfig
from nextscale.align.erasure.data import draw
from nextscale.align.erasure.pairs import read_pairs
from nextscale.align.erasure.target import Target, true_pictures
from nextscale.align.erasure.train import open_held_out, open_recognisers
from nextscale.pipeline import NextScalePipeline

SEED = 1_500_000_000  # apart from training and from the report


def attacked(folder: Path, prompts: int) -> dict[str, Any]:
    """Attacks by concept, before and after."""
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    kept = ("model", "concepts", "method", "seed", "recognisers", "pairs", "eval_pairs")
    kept += ("eval_prompts",)
    config = EraseConfig(
        output_dir=str(folder),
        num_eval_prompts=prompts,
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in kept},
    )
    base = NextScalePipeline.from_pretrained(config.model, dtype="float32")
    edited = NextScalePipeline.from_pretrained(config.model, dtype="float32")
    edited.load_lora(folder / "adapter")
    about = base.transformer.conditioner
    classes = None if about.prompts else about.config()["num_classes"]
    pairs = read_pairs(folder / "pairs.jsonl", num_classes=classes)
    recognise = next(iter(open_recognisers(config, base, pairs).values()))
    held_out = open_held_out(config, base, pairs, recognise)
    assert held_out is not None
    found: dict[str, Any] = {"method": config.method, "concepts": {}}
    for name, own in held_out.targets.items():
        asked = [p.original for p in own]
        images, tokens = draw(base, asked, seed=SEED, half=config.half, progress=True)
        own, tokens = true_pictures(own, images, tokens, recognise)
        found["concepts"][name] = {}
        for side, pipe in (("before", base), ("after", edited)):
            target = Target(pipe, own, recognise, tokens, seed=SEED, half=config.half)
            found["concepts"][name][side] = [o.record() for o in attack(target, progress=True)]
    return found


def markdown(runs: dict[str, Any]) -> str:
    """Attack, then the share with the concept before and after, of each run."""
    lines = []
    for run in runs.values():
        for name, sides in run["concepts"].items():
            lines += ["", f"**{name}**, {run['method']}", ""]
            lines += ["| attack | | as it was | erased | 95 % | n |", "|---|---|---|---|---|---|"]
            known = ("attack", "success", "n", "interval", "without")
            for before, after in zip(sides["before"], sides["after"], strict=True):
                detail = ", ".join(f"{k} {v}" for k, v in after.items() if k not in known)
                low, high = (f"{100 * x:.0f}" for x in after["interval"])
                shares = (f"{100 * row['success']:.1f} %" for row in (before, after))
                cells = (after["attack"], detail, *shares, f"{low} to {high}", str(after["n"]))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of `nextscale erase`")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts of each concept")
    parser.add_argument("--output", default="benchmarks/results/erasure_attacks.json")
    options = parser.parse_args()
    output, called = Path(options.output), "python benchmarks/erasure_attacks.py"
    runs = earlier(output, "runs")
    for folder in map(Path, options.runs):
        runs[str(folder)] = attacked(folder, options.prompts)
        command = f"{called} --prompts {options.prompts} --runs {' '.join(runs)}"
        save_record(output, command, runs=runs)
    print(markdown(runs))


if __name__ == "__main__":
    main()
