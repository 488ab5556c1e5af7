"""What a search could keep of a sample: how much each scale decides, and what previews tell.

    python benchmarks/search_scales.py

Redrawn from a scale on, how often does a right picture stay right, and a wrong one become right?
And which of two samples of a caption, a right and a wrong one, is told by what is known after each
scale (0.5: chance)? By the checker and the bundled CLIP on the preview, by the likelihood of the
tokens so far, by MG-Select's divergence. On `hard` training captions at temperature 1, judged by
the checker at the end. Writes benchmarks/results/search_scales.json and
docs/images/search_scales.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import save_record
from torch import Tensor

from nextscale.align.policies.next_scale import NextScalePolicy
from nextscale.align.rewards import open_reward, score
from nextscale.align.trajectory import Policy
from nextscale.data.benchmark import training_captions
from nextscale.pipeline import NextScalePipeline
from nextscale.streams import image_stream

SAMPLES = 6  # of a caption
AT_ONCE = 120
COLUMNS = {
    "checker": "checker, preview", "clip": "CLIP, preview", "likelihood": "likelihood",
    "mg_select": "MG-Select",
}  # fmt: skip


def redrawn(policy: Policy, captions: list[str], firsts: Sequence[int]) -> list[dict[str, float]]:
    """Shares of right pictures by the step that is redrawn first; 0: all of them."""
    checker = open_reward("checker")

    def right(trajectory: Any, prompts: list[str]) -> Tensor:
        return score([checker], policy.decode(trajectory), prompts)[0][:, 0] == 1

    counts = torch.zeros(len(firsts), 2, 2)
    for start in range(0, len(captions), AT_ONCE):
        prompts = captions[start : start + AT_ONCE]
        streams = [image_stream(start + i) for i in range(len(prompts))]
        drawn = policy.sample(policy.encode(prompts), generators=streams)
        before = right(drawn, prompts)
        for row, first in enumerate(firsts):
            streams = [image_stream(10**6 * (first + 1) + start + i) for i in range(len(prompts))]
            after = right(policy.branch(drawn, first, 1, generators=streams), prompts)
            for was in (0, 1):
                kept = after[before == bool(was)]
                counts[row, was] += torch.tensor([float(kept.sum()), float(len(kept))])
    shares = [sum(policy.units[:first]) / sum(policy.units) for first in firsts]
    return [
        {"stays_right": float(r[0] / r[1]), "becomes_right": float(w[0] / w[1]), "kept": float(k)}
        for (w, r), k in zip(counts, shares, strict=True)
    ]


def told(pipe: NextScalePipeline, captions: list[str]) -> dict[str, list[float]]:
    """Share of pairs of a right and a wrong sample of a caption that are told, after each scale."""
    settings = replace(pipe.generation, temperature=1.0, num_candidates=1)
    rewards = [open_reward("checker_statements"), open_reward("clip")]
    scales = pipe.transformer.schedule.num_scales
    known: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(scales)] for name in COLUMNS}
    rights = []
    for start in range(0, len(captions), AT_ONCE // SAMPLES):
        own = captions[start : start + AT_ONCE // SAMPLES]
        prompts = [caption for caption in own for _ in range(SAMPLES)]
        ids = pipe.transformer.conditioner.tokenize(prompts)
        seeds = [10**7 + start * SAMPLES + i for i in range(len(prompts))]
        likelihood = divergence = torch.zeros(len(prompts))
        judged = torch.zeros(len(prompts), 2)
        for step in pipe.stream(ids, settings, seeds=seeds):
            judged = score(rewards, pipe.decode(step.f_hat), prompts)[0]
            p = step.conditional.float().log_softmax(-1)
            likelihood = likelihood + p.gather(-1, step.tokens[..., None])[..., 0].sum(1)
            if step.unconditional is not None:
                q = step.unconditional.float().log_softmax(-1)
                divergence = divergence + (p.exp() * (p - q)).sum((1, 2))
            found = (judged[:, 0], judged[:, 1], likelihood, divergence)
            for name, values in zip(COLUMNS, found, strict=True):
                known[name][step.scale].append(values)
        rights.append(judged[:, 0] == 1)
    right = torch.cat(rights).view(-1, SAMPLES)
    return {
        name: [pairs_told(right, torch.cat(parts).view(-1, SAMPLES)) for parts in columns]
        for name, columns in known.items()
    }


def pairs_told(right: Tensor, values: Tensor) -> float:
    """Share of pairs whose right sample has the higher value; equal ones count half."""
    above, pairs = 0.0, 0
    for verdicts, row in zip(right, values, strict=True):
        gaps = row[verdicts][:, None] - row[~verdicts][None]
        above += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        pairs += gaps.numel()
    return above / pairs


def plot(table: list[dict[str, float]], tells: dict[str, list[float]], path: Path) -> None:
    """Both measurements by scale, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = range(len(table))
    for key, label in (("stays_right", "a right picture"), ("becomes_right", "a wrong picture")):
        left.plot(scales, [100 * row[key] for row in table], marker="o", label=label)
    left.set(xlabel="scales kept, the others redrawn", ylabel="right afterwards, %", ylim=(0, 100))
    for name, values in tells.items():
        right.plot([scale + 1 for scale in scales], values, marker="o", label=COLUMNS[name])
    right.axhline(0.5, color="gray", linewidth=0.8)
    right.set(xlabel="scales drawn", ylabel="pairs told", ylim=(0.4, 1.02))
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--captions", type=int, default=480, help="redrawn; a quarter is told")
    parser.add_argument("--output", default="benchmarks/results/search_scales.json")
    parser.add_argument("--plot", default="docs/images/search_scales.png")
    options = parser.parse_args()
    pipe = NextScalePipeline.from_pretrained(options.model)
    captions = list(dict.fromkeys(training_captions("hard", 2 * options.captions)))
    captions = captions[: options.captions]
    policy = NextScalePolicy(pipe, replace(pipe.generation, temperature=1.0), only_draws=True)
    table, tells = (
        redrawn(policy, captions, range(policy.num_steps)),
        told(pipe, captions[: len(captions) // 4]),
    )
    command = "python benchmarks/search_scales.py"
    command += f" --model {options.model} --captions {options.captions}"
    save_record(options.output, command, redrawn=table, told=tells)
    for scale, row in enumerate(table):
        shown = " | ".join(f"{values[scale]:.2f}" for values in tells.values())
        print(
            f"| {scale} | {100 * row['kept']:.0f} % | {100 * row['stays_right']:.0f} % "
            f"| {100 * row['becomes_right']:.0f} % | {shown} |"
        )
    plot(table, tells, Path(options.plot))


if __name__ == "__main__":
    main()
