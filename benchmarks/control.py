"""Control modules on the bundled model, side by side: do pictures follow their maps, at what cost?

    python benchmarks/control.py --suite modules

Suites: `modules` trains additive control (base frozen, and base trained too), adapters and a side
network for each control type; `early` compares early-centric training with full training.

`cost` measures what the modules of the first seed add to a call, on free cores.

Each run is the recipe of its control type cut to --steps steps of 16 pictures, in a process of its
own, then `nextscale eval --preset control` on held-out pictures that no run has seen. Runs in the
results are not run again, nor those in --output_dir. Writes benchmarks/results/control_SUITE.json
and, of the first seed, a strip of pictures, docs/images/control_modules.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control_overhead import Multiplications
from record import earlier, save_record
from tqdm import tqdm

from nextscale.control import open_extractor
from nextscale.data.sources import open_source
from nextscale.pipeline import NextScalePipeline
from nextscale.training import save_grid

TYPES = ("canny", "segmentation", "depth")
SUITES: dict[str, dict[str, tuple[str, float]]] = {  # flags, and steps in units of --steps
    "modules": {
        "additive": ("--architecture additive", 1),
        "additive, base trained": ("--architecture additive --unfreeze all", 1),
        "adapter": ("--architecture adapter", 1),
        "side network": ("--architecture side_network", 1),
    },
    "early": {  # with 0.35 and 0.46 of the tokens per picture: 0.56 and 0.58 of all tokens
        "adapter": ("--architecture adapter", 1),
        "early-centric": ("--architecture adapter --early_decay 1", 1.6),
        "early-centric, uniform": ("--architecture adapter --early_decay 0", 1.25),
    },
}
PAIR = ("floor", "control")
SHOWN = 2  # pictures of each type in the strip


def run(command: list[str], log: Path) -> None:
    """A command; its output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{' '.join(command)}\nfailed; see {log}")


def train_flags(
    row: tuple[str, float], kind: str, seed: int, options: argparse.Namespace
) -> list[str]:
    """The command behind `nextscale train control`."""
    words, length = row
    flags = ["--config", f"scenes-{kind}", "--seed", str(seed), "--logging_steps", "20"]
    flags += ["--max_train_steps", str(round(length * options.steps)), "--report_to", "none"]
    return [*flags, *words.split()]


def eval_flags(folder: Path, kind: str, options: argparse.Namespace) -> list[str]:
    """The command behind `nextscale eval`."""
    whole = (folder / "model" / "model_index.json").is_file()
    model = str(folder / "model") if whole else "scenes"
    given = [] if whole else ["--control", str(folder)]
    return [
        *("--preset", "control", "--model", model, *given, "--control_type", kind),
        *("--num_images", str(options.images), "--num_reference", "2000"),
        *("--output", str(folder / "eval.json")),
    ]


def opened(folder: Path, kind: str) -> NextScalePipeline:
    """The pipeline of a run, with its control."""
    whole = (folder / "model" / "model_index.json").is_file()
    pipe = NextScalePipeline.from_pretrained(folder / "model" if whole else "scenes")
    if not whole:
        pipe.load_control(folder, kind)
    return pipe


def cost(rows: list[str], folders: dict[str, Path], kind: str, rounds: int) -> dict[str, Any]:
    """Calls with 8 maps beside calls without, in turns: medians of time, and multiplications.

    Cores must be free: times of shared ones mean nothing.
    """
    pipes = {"none": NextScalePipeline.from_pretrained("scenes")}
    pipes |= {name: opened(folders[name], kind) for name in rows}
    prompts = ["a red circle left of a blue square"] * 8
    given: dict[str, Any] = {"num_candidates": 1, "seed": 0, "output_type": "pt"}
    maps = (torch.rand(8, 3, 64, 64) > 0.9).float().amax(1, keepdim=True).expand(-1, 3, -1, -1)
    controls = {"control_image": maps, "control_type": kind}
    times: dict[str, list[float]] = {name: [] for name in pipes}
    counts = {}
    for _ in tqdm(range(rounds + 1)):
        for name, pipe in pipes.items():
            with Multiplications() as counter:
                start = time.perf_counter()
                pipe(prompts, **given, **({} if name == "none" else controls))
                times[name].append(time.perf_counter() - start)
            counts[name] = counter.count
    plain = statistics.median(times["none"][1:])
    found: dict[str, Any] = {"none": {"milliseconds_per_picture": 1000 * plain / len(prompts)}}
    for name in rows:
        more = statistics.median(times[name][1:])
        whole = (folders[name] / "model" / "model_index.json").is_file()
        module = pipes[name].control(kind)
        own, encoder = (
            sum(p.numel() for p in part.parameters()) for part in (module, module.encoder)
        )
        base = sum(p.numel() for p in pipes[name].transformer.parameters())
        found[name] = {
            "trained_parameters": own + base * whole,
            "of_these_encoder": encoder,
            "extra_time": more / plain - 1,
            "extra_milliseconds_per_picture": 1000 * (more - plain) / len(prompts),
            "extra_multiplications": counts[name] / counts["none"] - 1,
        }
    return found


def read(folder: Path, kind: str) -> dict[str, Any]:
    """What the table shows of a run."""
    record = json.loads((folder / "eval.json").read_text())
    entry = record["controls"][kind]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens" in line]
    images = logged[-1]["images"]
    found = {side: entry[side] for side in ("floor", "control", "reconstruction", "real")}
    return {
        "metric": entry["control"]["metric"],
        **{side: value["value"] for side, value in found.items()},
        "control_se": entry["control"]["se"],
        "gap_closed": entry["gap_closed"],
        "gap_closed_reconstruction": entry["gap_closed_reconstruction"],
        "quality": {"floor": record["floor"], "control": entry["quality"]},
        "minutes": logged[-1]["seconds"] / 60,
        "images": images,
        "tokens": images * statistics.mean(line["tokens"] for line in logged),
    }


def strip(rows: list[str], folders: dict[tuple[str, str], Path], path: Path) -> None:
    """Rows: pictures; columns: map, no control, each module, the bundled one, the real picture."""
    tiles, captions = [], []
    source = open_source("scenes", resolution=64, split="validation")
    batch = source.load(np.arange(SHOWN * len(TYPES)))
    for number, kind in enumerate(TYPES):
        own = slice(number * SHOWN, (number + 1) * SHOWN)
        real = batch.images[own]
        maps = torch.from_numpy(open_extractor(kind)(real.permute(0, 2, 3, 1).numpy()))
        assert batch.captions is not None
        given: dict[str, Any] = {"seed": 0, "num_candidates": 1, "output_type": "pt"}
        base = NextScalePipeline.from_pretrained("scenes")
        columns = [maps, base(batch.captions[own], **given).images]
        for pipe in (*(opened(folders[name, kind], kind) for name in rows), base):
            controls = {"control_image": maps, "control_type": kind}
            columns.append(pipe(batch.captions[own], **given, **controls).images)
        columns.append(real.float() / 255)
        tiles += [column[i] for i in range(SHOWN) for column in columns]
        captions += [kind, "no control", *rows, "bundled", "real"] * SHOWN
    save_grid(torch.stack(tiles), path, columns=len(rows) + 4, captions=captions)


def markdown(table: dict[str, Any]) -> str:
    """Means over the seeds; in brackets the lowest and the highest."""
    lines = ["| control | module | agreement | gap closed | prompts right | fd_scenes | minutes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for kind in TYPES:
        for name, kinds in table.items():
            runs = list(kinds.get(kind, {}).values())
            if not runs:
                continue
            sides = [run["quality"] for run in runs]
            shown = [run["control"] for run in runs]
            gaps = [100 * run["gap_closed"] for run in runs]
            cells = [
                f"{statistics.mean(shown):.3g} ({min(shown):.3g} to {max(shown):.3g})",
                f"{statistics.mean(gaps):.0f} % ({min(gaps):.0f} to {max(gaps):.0f})",
                *(
                    " to ".join(f"{statistics.mean(s[x][key] for s in sides):.3g}" for x in PAIR)
                    for key in ("prompt_accuracy", "fd_scenes")
                ),
                f"{statistics.median(run['minutes'] for run in runs):.1f}",
            ]
            lines.append(f"| {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(output: Path, options: argparse.Namespace, rows: dict[str, Any]) -> None:
    """The results, with what they were made on."""
    words = f"python benchmarks/control.py --suite {options.suite}"
    if options.suite != "cost":
        words += f" --steps {options.steps} --images {options.images}"
    save_record(output, words, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="modules", choices=[*SUITES, "cost"])
    parser.add_argument("--rows", nargs="+", help="some rows of the suite; otherwise all")
    parser.add_argument("--types", nargs="+", default=None, choices=TYPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 100_000, 200_000])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=200, help="held-out pictures")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each module, for cost")
    parser.add_argument("--output_dir", default="runs/control")
    parser.add_argument("--output", help="otherwise benchmarks/results/control_SUITE.json")
    parser.add_argument("--strip", default="docs/images/control_modules.png")
    options = parser.parse_args()
    suite = SUITES["modules" if options.suite == "cost" else options.suite]
    names = options.rows or list(suite)
    kinds = options.types or (TYPES if options.suite == "modules" else TYPES[:1])
    output = Path(options.output or f"benchmarks/results/control_{options.suite}.json")
    if options.suite == "cost":
        kind = kinds[0]
        found = {n: folder_of(n, kind, options.seeds[0], options) for n in names}
        write(output, options, cost(names, found, kind, options.rounds))
        print(output.read_text())
        return
    for seed in options.seeds:
        for kind in kinds:
            for name in names:
                flags = train_flags(suite[name], kind, seed, options)
                command = f"nextscale train control {' '.join(flags)}"
                runs = earlier(output).get(name, {}).get(kind, {})
                if runs.get(str(seed), {}).get("command") == command:
                    continue
                folder = folder_of(name, kind, seed, options)
                nextscale = [sys.executable, "-m", "nextscale"]
                if not (folder / "eval.json").is_file():
                    train = [*nextscale, "train", "control", *flags, "--output_dir", str(folder)]
                    run(train, folder / "train.log")
                    run([*nextscale, "eval", *eval_flags(folder, kind, options)], folder / "e.log")
                found = {"command": command, **read(folder, kind)}
                print(name, kind, seed, json.dumps(found), flush=True)
                table = earlier(output)  # anew: another process may have added to it
                table.setdefault(name, {}).setdefault(kind, {})[str(seed)] = found
                write(output, options, table)
    print(markdown(earlier(output)))
    folders = {(n, k): folder_of(n, k, options.seeds[0], options) for n in names for k in TYPES}
    if options.suite == "modules" and all(f.is_dir() for f in folders.values()):
        strip(names, folders, Path(options.strip))


def folder_of(name: str, kind: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    words = f"{name} {kind} {seed} {options.steps} {options.images}"
    words = words.replace(",", "").replace(" ", "_")
    return Path(options.output_dir, words)


if __name__ == "__main__":
    main()
