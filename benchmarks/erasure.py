"""Concepts out of the bundled model, by every method: what is gone, what stays, at what cost?

    python benchmarks/erasure.py --suite methods

Suites: `methods` takes a colour, a shape, a bound pair, a relation and a fill out by EAR and by
each baseline; `windows` and `gate` change EAR's window length and its gate; `scales` trains the
first scales alone. `methods` also draws docs/images/erasure.png from the first seed's runs of EAR.

Each run is the recipe erase-scenes with --steps steps, in a process of its own, then its report
without attacks (`benchmarks/erasure_attacks.py` has those). Runs in the results are not run again,
nor those in --output_dir; `--rows`, `--concepts` and `--seeds` choose. Writes
benchmarks/results/erasure_SUITE.json and prints it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from record import earlier, save_record

from nextscale.align.erasure.concepts import scene_concept
from nextscale.data.benchmark import load_benchmark
from nextscale.data.captions import parse
from nextscale.pipeline import NextScalePipeline
from nextscale.training import save_grid

CONCEPTS = ("red", "circle", "red circle", "left of", "striped")
SUITES: dict[str, dict[str, str]] = {
    "methods": {
        "EAR": "",
        "S-VARE": "--method svare",
        "SACE": "--method sace",
        "D2O": "--method d2o",
        "UCE": "--method uce",
    },
    "windows": {
        "one window": "--window_smallest 1000",
        "windows of 25 to 64, together": "--window_smallest 25 --window_largest 64",
        "a window per scale, together": "",
        "windows of 25 to 64, in turn": "--mode windowed --window_smallest 25 --window_largest 64",
        "a window per scale, in turn": "--mode windowed",
        "windows of 1 to 16, in turn": "--mode windowed --window_largest 16",
    },
    "gate": {
        "gate 0": "--gate_quantile 0",
        "gate 0.1": "",
        "gate 0.3": "--gate_quantile 0.3",
        "gate 0.6": "--gate_quantile 0.6",
    },
    "scales": {**{f"scales 1 to {j}": f"--train_scales {j}" for j in range(1, 6)}, "all": ""},
}


def run(command: list[str], log: Path) -> None:
    """A command; its output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{' '.join(command)}\nfailed; see {log}")


def folder_of(name: str, concept: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run lies, which suites may share."""
    words = [
        concept,
        str(seed),
        str(options.steps),
        str(options.prompts),
        SUITES[options.suite][name],
    ]
    return Path(options.output_dir, "_".join(" ".join(words).replace("--", "").split()))


def read(folder: Path, concept: str) -> dict[str, Any]:
    """What the table shows of a run."""
    report = json.loads((folder / "report.json").read_text())
    own, others = report["concepts"][concept], report["others"]
    seen = {"recognised": own["recognised"], "others": others["accuracy"]}
    if "near" in own:
        seen["near"] = own["near"]["accuracy"]
    found: dict[str, Any] = {"by": report["recognisers"][0]}
    for name, row in seen.items():
        found |= {f"{name}/{side}": row[side]["value"] for side in ("before", "after")}
        found[f"{name}/after_ci95"] = row["after"]["ci95"]
        found[f"{name}/difference_ci95"] = (row["difference"] or {}).get("ci95")
    for who, row in own.get("also_by", {}).items():
        found |= {
            f"recognised by {who}/{side}": row["recognised"][side]["value"]
            for side in ("before", "after")
        }
    found["oracle"] = own["oracle"]["value"]
    found["harmonic_mean"] = report["harmonic_mean"]
    found["kl"] = report["drift"]["total"]
    for side in ("before", "after"):
        found[f"fd_scenes/{side}"] = others["fd_scenes"][side]["value"]
        found[f"vendi_within_prompt/{side}"] = own["vendi_within_prompt"][side]["value"]
    found["minutes"] = None  # of closed forms, which take seconds
    if (folder / "log.jsonl").is_file():
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        found["minutes"] = max(line.get("seconds", 0.0) for line in lines) / 60
    return found


def markdown(rows: dict[str, Any]) -> str:
    """A suite as docs/erase.md has it: means over seeds, in percent."""
    head = "| concept | run | seeds | recognised | after | near, points | others, points "
    lines = [f"{head}| harmonic mean | nats | minutes |", "|---" * 10 + "|"]
    for concept in CONCEPTS:
        for name, by_concept in rows.items():
            runs = list(by_concept.get(concept, {}).values())
            if not runs:
                continue

            def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
                return statistics.mean(run[key] for run in runs)

            def points(key: str, runs: list[dict[str, Any]] = runs) -> str:
                if f"{key}/after" not in runs[0]:
                    return ""
                changes = [100 * (run[f"{key}/after"] - run[f"{key}/before"]) for run in runs]
                return ", ".join(f"{change:+.1f}" for change in changes)

            after = ", ".join(f"{100 * run['recognised/after']:.1f}" for run in runs)
            minutes = "" if runs[0]["minutes"] is None else f"{mean('minutes'):.1f}"
            lines.append(
                f"| {concept} | {name} | {len(runs)} | {100 * mean('recognised/before'):.1f} "
                f"| {after} | {points('near')} | {points('others')} | {mean('harmonic_mean'):.3f} "
                f"| {mean('kl'):.2f} | {minutes} |"
            )
    return "\n".join(lines)


@torch.no_grad()
def pictures(folders: dict[str, Path], path: Path) -> None:
    """Two rows for each concept, before and after: five captions with it and four without."""
    captions, tiles, below = load_benchmark("standard"), [], []
    for name, folder in folders.items():
        concept = scene_concept(name)
        asked = [concept.in_caption(parse(caption)) for caption in captions]
        own = [c for c, with_it in zip(captions, asked, strict=True) if with_it][:5]
        own += [c for c, with_it in zip(captions, asked, strict=True) if not with_it][:4]
        pipe = NextScalePipeline.from_pretrained("scenes", dtype="float32")
        for side in ("before", f"without {name}"):
            if side != "before":
                pipe.load_lora(folder / "adapter")
            tiles.append(pipe(own, seed=0, num_candidates=1, output_type="pt").images)
            below += own if side == "before" else [side] * len(own)
    save_grid(torch.cat(tiles), path, columns=9, captions=below)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="methods", choices=list(SUITES))
    parser.add_argument("--rows", nargs="+", help="some rows of the suite; otherwise all")
    parser.add_argument("--concepts", nargs="+", help="otherwise five, or red circle", default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 100_000, 200_000])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts of each kind")
    parser.add_argument("--output_dir", default="runs/erasure")
    parser.add_argument("--output", help="otherwise benchmarks/results/erasure_SUITE.json")
    parser.add_argument("--picture", default="docs/images/erasure.png")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    names = options.rows or list(suite)
    if unknown := set(names) - set(suite):
        parser.error(f"--rows {', '.join(unknown)}: the suite has {', '.join(suite)}")
    usual = CONCEPTS if options.suite == "methods" else ("red circle",)
    output = Path(options.output or f"benchmarks/results/erasure_{options.suite}.json")
    for seed in options.seeds:
        for concept in options.concepts or usual:
            for name in names:
                flags = ["--config", "erase-scenes", "--concepts", concept, "--seed", str(seed)]
                flags += ["--max_train_steps", str(options.steps), "--no_attacks"]
                flags += ["--num_eval_prompts", str(options.prompts), "--report_to", "none"]
                flags += suite[name].split()
                shown = " ".join(f'"{f}"' if " " in f else f for f in flags)
                command = f"nextscale erase {shown}"
                runs = earlier(output).get(name, {}).get(concept, {})
                if runs.get(str(seed), {}).get("command") == command:
                    continue
                folder = folder_of(name, concept, seed, options)
                if not (folder / "report.json").is_file():
                    shutil.rmtree(folder, ignore_errors=True)
                    called = [sys.executable, "-m", "nextscale", "erase", *flags]
                    run([*called, "--output_dir", str(folder)], Path(f"{folder}.log"))
                found = {"command": command, **read(folder, concept)}
                print(name, concept, seed, json.dumps(found), flush=True)
                table = earlier(output)  # anew: another process may have added to it
                table.setdefault(name, {}).setdefault(concept, {})[str(seed)] = found
                made_by = f"python benchmarks/erasure.py --suite {options.suite} "
                made_by += f"--steps {options.steps} --prompts {options.prompts}"
                save_record(output, made_by, rows=table)
    print(markdown(earlier(output)))
    if options.suite == "methods":
        folders = {c: folder_of("EAR", c, options.seeds[0], options) for c in CONCEPTS}
        pictures({c: f for c, f in folders.items() if f.is_dir()}, Path(options.picture))


if __name__ == "__main__":
    main()
