"""Search at inference time on `hard` captions: what is right, against transformer evaluations.

    python benchmarks/search.py

Every row draws one picture for each of --prompts captions at temperature 1 with the same seeds: by
plain sampling, by the likeliest of N (`num_candidates`), by MG-Select, by the best of N and by tree
search, the last two judged by the checker (a verifier that knows) and by the bundled CLIP (one that
guesses); a picture that the checker calls right takes no more samples. Costs are counted in
evaluations of one whole picture, kept prefixes included each time that samples go on from them.
`--model` takes a tuned model for the stacked case, with another --output and --plot. Rows that are
in the results are not drawn again. Writes benchmarks/results/search.json and
docs/images/search.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import earlier, save_record

from nextscale.align.rewards import open_reward
from nextscale.align.search import BestOf, MGSelect, TreeSearch
from nextscale.data.benchmark import load_benchmark
from nextscale.data.checker import check_batch, wilson_interval
from nextscale.data.images import to_uint8
from nextscale.pipeline import NextScalePipeline

BUDGETS = (2, 4, 8, 16)


def rows() -> dict[str, tuple[int, Callable[[int], Any]]]:
    """Name -> number of samples, and what makes the search; None: candidates of the pipeline."""
    found: dict[str, tuple[int, Callable[[int], Any]]] = {}
    checker, clip = open_reward("checker_statements"), open_reward("clip")
    makers: dict[str, Callable[[int], Any]] = {
        "likeliest": lambda n: None,
        "MG-Select": MGSelect,
        "best, checker": lambda n: BestOf(checker, n),
        "tree, checker": lambda n: TreeSearch(checker, n),
        "best, CLIP": lambda n: BestOf(clip, n),
        "tree, CLIP": lambda n: TreeSearch(clip, n),
    }
    for name, make in makers.items():
        for n in BUDGETS:
            found[f"{name}, {n}"] = (n, make)
    return {"plain, 1": (1, lambda n: None), **found}


def plot(table: dict[str, Any], path: Path) -> None:
    """Right pictures against evaluations, a line per kind of search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, plain = figure.subplots(), table["plain, 1"]
    for number, kind in enumerate(dict.fromkeys(k.rpartition(", ")[0] for k in table)):
        own = [row for name, row in table.items() if name.rpartition(", ")[0] == kind]
        points = [(1.0, plain["accuracy"]), *((r["passes"], r["accuracy"]) for r in own)]
        x, y = zip(*sorted(points), strict=True)
        if kind != "plain":
            axes.plot(x, [100 * value for value in y], marker="o", color=f"C{number}", label=kind)
    axes.set(xlabel="evaluations of a whole picture, each picture", ylabel="right, %", xscale="log")
    axes.set_xticks([1, *BUDGETS], [str(n) for n in (1, *BUDGETS)])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rows", nargs="+", help="some of them; otherwise all")
    parser.add_argument("--output", default="benchmarks/results/search.json")
    parser.add_argument("--plot", default="docs/images/search.png")
    options = parser.parse_args()
    every = rows()
    if unknown := set(options.rows or ()) - set(every):
        parser.error(f"--rows {', '.join(unknown)}: there are {', '.join(every)}")
    pipe = NextScalePipeline.from_pretrained(options.model)
    captions = load_benchmark("hard")[: options.prompts]
    output = Path(options.output)
    command = f"python benchmarks/search.py --model {options.model} --prompts {options.prompts}"
    table = earlier(output, command=command)
    for name in options.rows or every:
        if name in table:
            continue
        count, make = every[name]
        search, began = make(count), time.perf_counter()
        out = pipe(
            captions, seed=0, temperature=1.0, num_candidates=count if search is None else 1,
            search=search, batch_size=25, output_type="pt", progress=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        pixels = to_uint8(out.images).permute(0, 2, 3, 1).numpy()
        reports = check_batch(pixels, captions)
        right = sum(report.holds for report in reports)
        low, high = wilson_interval(right, len(captions))
        table[name] = {
            "accuracy": right / len(captions),
            "interval": [low, high],
            "statements": sum(report.score for report in reports) / len(reports),
            "passes": float(count) if search is None else search.cost.passes / len(captions),
            "seconds": round(seconds, 1),
        }
        print(name, json.dumps(table[name]), flush=True)
        save_record(output, command, rows=table)
    plot(table, Path(options.plot))


if __name__ == "__main__":
    main()
