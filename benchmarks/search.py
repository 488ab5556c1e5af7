"""Search at inference time on `hard` captions: what is right, against transformer evaluations.

    python benchmarks/search.py

Every row draws one picture for each of --prompts captions at temperature 1 with the same seeds: by
plain sampling, by the likeliest of N (`num_candidates`), by MG-Select, by the best of N and by tree
search, the last two judged by the checker (a verifier that knows) and by the bundled CLIP (one that
guesses); a picture that the checker calls right takes no more samples, but of Diffusion Tree
Sampling ("dts"), which draws from the samples by their rewards. Costs are counted in
evaluations of one whole picture, kept prefixes included each time that samples go on from them.
`--model` takes a tuned model for the stacked case, with another --output and --plot; `--judge` one
by which GenARM weighs the tokens of the base. Rows that are in the results are not drawn again.
Writes benchmarks/results/search.json and docs/images/search.png, and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from record import earlier, save_record

from nextscale.align.rewards import open_reward
from nextscale.align.search import BestOf, GenARM, MGSelect, TreeSearch
from nextscale.data.benchmark import load_benchmark
from nextscale.data.checker import check_batch, wilson_interval
from nextscale.data.images import to_uint8
from nextscale.pipeline import NextScalePipeline

BUDGETS = (2, 4, 8, 16)
TEMPERATURES = (0.7, 0.5)
WEIGHTS = (0.5, 1.0, 2.0)  # of GenARM
Rows = tuple[int, Callable[[int], dict[str, Any]]]


def rows(judge: NextScalePipeline | None, itself: NextScalePipeline) -> dict[str, Rows]:
    """Name -> number of samples, and the call's settings, made anew for each row.

    With the model itself as judge GenARM only sharpens.
    """
    checker, clip = open_reward("checker_statements"), open_reward("clip")
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "likeliest": lambda n: {"num_candidates": n},
        "best, checker": lambda n: {"search": BestOf(checker, n)},
        "tree, checker": lambda n: {"search": TreeSearch(checker, n)},
        "best, CLIP": lambda n: {"search": BestOf(clip, n)},
        "tree, CLIP": lambda n: {"search": TreeSearch(clip, n)},
        "dts, checker": lambda n: {"search": TreeSearch(checker, n, greedy=False)},
        "dts, CLIP": lambda n: {"search": TreeSearch(clip, n, greedy=False)},
        "MG-Select": lambda n: {"search": MGSelect(n)},
        "MG-Select, all scales": lambda n: {"search": MGSelect(n, scales=6)},  # of 6
    }
    found: dict[str, Rows] = {"plain, 1": (1, lambda n: {})}
    for temperature in TEMPERATURES:
        found[f"temperature {temperature:g}, 1"] = (1, partial(_cooler, temperature))
    found |= {f"{name}, {n}": (n, make) for name, make in makers.items() for n in BUDGETS}
    for name, model in (("itself", itself), ("judge", judge)):
        for weight in WEIGHTS if model is not None else ():
            found[f"GenARM, {name} x {weight:g}, 1"] = (1, partial(_genarm, model, weight))
    return found


def _cooler(temperature: float, _: int) -> dict[str, Any]:
    return {"temperature": temperature}


def _genarm(judge: NextScalePipeline, weight: float, _: int) -> dict[str, Any]:
    return {"search": GenARM(judge, weight)}


def plot(table: dict[str, Any], path: Path) -> None:
    """Right pictures against evaluations, a line per kind of search with several budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, plain = figure.subplots(), table["plain, 1"]
    kinds = Counter(name.rpartition(", ")[0] for name in table)
    for number, kind in enumerate(kind for kind, count in kinds.items() if count > 1):
        own = [row for name, row in table.items() if name.rpartition(", ")[0] == kind]
        points = [(1.0, plain["accuracy"]), *((r["passes"], r["accuracy"]) for r in own)]
        x, y = zip(*sorted(points), strict=True)
        style = "--" if kind.startswith("tree") else "-"  # it lies on that of the best
        y = [100 * value for value in y]
        axes.plot(x, y, style, marker="o", color=f"C{number}", label=kind)
    axes.set(xlabel="evaluations of a whole picture, each picture", ylabel="right, %", xscale="log")
    axes.set_xticks([1, *BUDGETS], [str(n) for n in (1, *BUDGETS)])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def markdown(table: dict[str, Any]) -> str:
    """As docs/generate.md has it: right pictures and, where they are others, evaluations."""
    budgets = (1, *BUDGETS)
    heads = " | ".join(str(n) for n in budgets)
    lines = [f"| samples | {heads} |", "|---" * (1 + len(budgets)) + "|"]
    for kind in dict.fromkeys(name.rpartition(", ")[0] for name in table):
        cells = []
        for n in budgets:
            row = table.get(f"{kind}, {n}")
            text = "" if row is None else f"{100 * row['accuracy']:.1f} %"
            other = row is not None and row["passes"] != n
            cells.append(f"{text} ({row['passes']:.2f})" if other else text)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--judge", help="a tuned model, by which GenARM weighs tokens")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rows", nargs="+", help="some of them; otherwise all")
    parser.add_argument("--output", default="benchmarks/results/search.json")
    parser.add_argument("--plot", default="docs/images/search.png")
    options = parser.parse_args()
    judge = None if options.judge is None else NextScalePipeline.from_pretrained(options.judge)
    pipe = NextScalePipeline.from_pretrained(options.model)
    every = rows(judge, pipe)
    if unknown := set(options.rows or ()) - set(every):
        parser.error(f"--rows {', '.join(unknown)}: there are {', '.join(every)}")
    captions = load_benchmark("hard")[: options.prompts]
    output = Path(options.output)
    command = f"python benchmarks/search.py --model {options.model} --prompts {options.prompts}"
    table = earlier(output, command=command)
    for name in options.rows or every:
        if name in table:
            print(f"{name}: in {output} already; another --output draws it anew")
            continue
        count, make = every[name]
        settings = {"temperature": 1.0, "num_candidates": 1, **make(count)}
        search, began = settings.get("search"), time.perf_counter()
        out = pipe(captions, seed=0, **settings, batch_size=25, output_type="pt", progress=True)
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
    table = {name: table[name] for name in every if name in table} | table  # in the rows' order
    print(markdown(table))
    plot(table, Path(options.plot))


if __name__ == "__main__":
    main()
