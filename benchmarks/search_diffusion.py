"""Search and adaptive guidance on a diffusion pipeline.

    nextscale train diffusion --config scenes-diffusion --output_dir runs/scenes-diffusion
    python benchmarks/search_diffusion.py

`standard` captions with equal seeds, 20 DDIM steps, guidance 4. Adaptive guidance: without noise,
until the cosine of a picture's two predictions passes 1 - threshold (`guidance_threshold`), beside
fewer steps of the same sampler, which save evaluations too. Search: with noise (eta 1), the best of
N and tree search by the share of true statements; costs in samples with all their steps, of which a
branch computes those behind it. And, as in search_scales.py, how often a sample that is redrawn
behind some steps stays or becomes right, and how often the right one of two samples is told by the
squared gap of the two predictions that guidance computes, as MG-Select would. Writes
benchmarks/results/search_diffusion.json and docs/images/search_diffusion.png, and prints Markdown;
rows in the results are not drawn again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline  # pyright: ignore
from record import earlier, save_record
from search_scales import pairs_told, redrawn
from torch import Tensor, nn

from nextscale.align.policies.diffusion import DiffusionPolicy
from nextscale.align.rewards import open_reward
from nextscale.align.search import BestOf, Search, TreeSearch
from nextscale.data.benchmark import load_benchmark
from nextscale.data.checker import check_batch, wilson_interval
from nextscale.data.images import to_uint8
from nextscale.data.sources import open_source
from nextscale.eval import evaluate
from nextscale.eval.feature_network import small_features
from nextscale.streams import image_stream

STEPS = 20
THRESHOLDS = (0.005, 0.009, 0.02, 0.05)  # 0.009: the paper's
SHORTER = (10, 12, 15)  # steps, all of them guided
BUDGETS = (1, 2, 4, 8, 16)
HALFWAY = (8, 12, 16)  # samples, of which all but four begin like another
SEARCHES = {"best": "best of N", "tree": "tree", "halfway": "tree, 4 samples, then half way"}
FIRSTS = (0, 5, 10, 15)  # steps kept, the others redrawn
SAMPLES = 6  # of a caption, that are told apart
AT_ONCE = 50
REFERENCES = 5000  # true pictures
SHARED: dict[str, Any] = {
    "guidance_scale": 4.0, "autocast": torch.bfloat16, "batch_size": AT_ONCE,
}  # fmt: skip


def guided(pipe: Any, steps: int, threshold: float | None, captions: list[str]) -> dict[str, Any]:
    """Evaluations, verdicts and fd_scenes of deterministic pictures."""
    policy = DiffusionPolicy(
        pipe, num_inference_steps=steps, guidance_threshold=threshold, **SHARED
    )
    count = 0

    def counted(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += len(given[0])

    network: Any = policy.network
    handle = network.conv_in.register_forward_pre_hook(counted)
    streams = [image_stream(i) for i in range(len(captions))]
    drawn = policy.sample(policy.encode(captions), generators=streams, deterministic=True)
    handle.remove()
    pixels = to_uint8(policy.decode(drawn)).permute(0, 2, 3, 1).numpy()
    data = open_source("scenes", resolution=64, split="validation", num_images=REFERENCES)
    true = data.load(np.arange(REFERENCES)).images.permute(0, 2, 3, 1).numpy()
    network = small_features("scenes-features", device="cpu")
    found = evaluate(pixels, true, network=network, metrics=["fd_scenes"])["metrics"]
    (distance,) = found.values()
    return {
        **_verdicts(pixels, captions),
        "evaluations": count / len(captions),
        "fd_scenes": distance["value"],
    }


def told(policy: DiffusionPolicy, captions: list[str]) -> list[float]:
    """Share of pairs of a right and a wrong sample told by the gaps of the first steps, summed."""
    gaps: list[Tensor] = []

    def watched(layer: nn.Module, given: Any, out: tuple[Tensor, ...]) -> None:
        first, second = out[0].float().chunk(2)
        gaps.append((first - second).square().flatten(1).sum(1).cpu())

    network: Any = policy.network
    handle = network.register_forward_hook(watched)
    rights, sums = [], []
    for start in range(0, len(captions), AT_ONCE // SAMPLES):
        prompts = [c for c in captions[start : start + AT_ONCE // SAMPLES] for _ in range(SAMPLES)]
        streams = [image_stream(10**7 + start * SAMPLES + i) for i in range(len(prompts))]
        gaps.clear()
        drawn = policy.sample(policy.encode(prompts), generators=streams)
        sums.append(torch.stack(gaps[-STEPS:]).cumsum(0))  # other calls come first
        pixels = to_uint8(policy.decode(drawn)).permute(0, 2, 3, 1).numpy()
        rights += [report.holds for report in check_batch(pixels, prompts)]
    handle.remove()
    right = torch.tensor(rights).view(-1, SAMPLES)
    return [pairs_told(right, step.view(-1, SAMPLES)) for step in torch.cat(sums, dim=1)]


def searched(policy: DiffusionPolicy, name: str, count: int, captions: list[str]) -> dict[str, Any]:
    """Cost and verdicts of what a search chose."""
    reward = open_reward("checker_statements")
    search: Search = {
        "best": lambda: BestOf(reward, count),
        "tree": lambda: TreeSearch(reward, count),
        "halfway": lambda: TreeSearch(reward, count, steps=(STEPS // 2,), width=4.0, growth=0.0),
    }[name]()
    parts = []
    for start in range(0, len(captions), AT_ONCE):
        own = captions[start : start + AT_ONCE]
        chosen = search.on(policy, own, list(range(start, start + len(own))))
        parts.append(to_uint8(policy.decode(chosen)).permute(0, 2, 3, 1).numpy())
    found = _verdicts(np.concatenate(parts), captions)
    return {**found, "passes": search.cost.passes / len(captions)}


def _verdicts(pixels: np.ndarray, captions: list[str]) -> dict[str, Any]:
    reports = check_batch(pixels, captions)
    right = sum(report.holds for report in reports)
    return {
        "accuracy": right / len(captions),
        "interval": list(wilson_interval(right, len(captions))),
        "statements": sum(report.score for report in reports) / len(reports),
    }


def plot(table: dict[str, Any], path: Path) -> None:
    """Both curves, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, label in SEARCHES.items():
        rows = [row for name, row in table.items() if name.startswith(f"{kind}, ")]
        rows.sort(key=lambda row: row["passes"])
        left.plot(
            [row["passes"] for row in rows], [100 * row["accuracy"] for row in rows],
            marker="o", label=label,
        )  # fmt: skip
    left.set(xlabel="samples of all steps, each picture", ylabel="right, %", xscale="log")
    left.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
    left.minorticks_off()
    for kind, label in (("threshold", "adaptive guidance"), ("steps", "fewer steps")):
        rows = [row for name, row in table.items() if name.startswith(kind)]
        points = sorted((row["evaluations"], 100 * row["accuracy"]) for row in rows)
        right.plot(*zip(*points, strict=True), marker="o", label=label)
    right.set(xlabel="evaluations of the network, each picture", ylabel="right, %")
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/scenes-diffusion/model")
    parser.add_argument("--prompts", type=int, default=500, help="of guidance; search takes 200")
    parser.add_argument("--output", default="benchmarks/results/search_diffusion.json")
    parser.add_argument("--plot", default="docs/images/search_diffusion.png")
    options = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    captions, output = load_benchmark("standard")[: options.prompts], Path(options.output)
    command = "python benchmarks/search_diffusion.py"
    command += f" --model {options.model} --prompts {options.prompts}"
    table = earlier(output, command=command)
    rows = {f"steps {n}": (n, None) for n in (STEPS, *SHORTER)}
    rows |= {f"threshold {t:g}": (STEPS, t) for t in THRESHOLDS}
    jobs = {
        name: lambda given=given: guided(pipe, *given, captions) for name, given in rows.items()
    }
    noisy = DiffusionPolicy(pipe, num_inference_steps=STEPS, **SHARED)
    for kind in SEARCHES:
        for n in HALFWAY if kind == "halfway" else BUDGETS:
            jobs[f"{kind}, {n}"] = lambda kind=kind, n=n: searched(noisy, kind, n, captions[:200])
    for name, job in jobs.items():
        if name not in table:
            table[name] = job()
            print(name, json.dumps(table[name]), flush=True)
            save_record(output, command, "diffusers", rows=table)
    if "redrawn" not in table:
        table["redrawn"] = redrawn(noisy, captions[:200], FIRSTS)
        save_record(output, command, "diffusers", rows=table)
    if "told" not in table:
        table["told"] = told(noisy, captions[:200])
        save_record(output, command, "diffusers", rows=table)
    print("pairs told after each step:", " ".join(f"{share:.2f}" for share in table.pop("told")))
    for row in table.pop("redrawn"):
        print(
            f"| {100 * row['kept']:.0f} % | {100 * row['stays_right']:.0f} % "
            f"| {100 * row['becomes_right']:.0f} % |"
        )
    for name, row in table.items():
        low, high = row["interval"]
        cost = row.get("evaluations", row.get("passes", math.nan))
        print(
            f"| {name} | {cost:.2f} | {100 * row['accuracy']:.1f} % "
            f"| {100 * low:.1f} to {100 * high:.1f} | {100 * row['statements']:.1f} % "
            f"| {row.get('fd_scenes', math.nan):.2f} |"
        )
    plot(table, Path(options.plot))


if __name__ == "__main__":
    main()
