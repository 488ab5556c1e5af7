"""GRPO, DPO, RAFT, FIND, B2-DiffuRL and DRAGON on one budget of drawn samples.

    python benchmarks/alignment_table.py

Each row is a shipped recipe, cut to --rollouts rollouts of 192 pictures at a constant learning rate
that was chosen for the method, with the checker as reward; each run is a process of its own, for
its peak memory. Measured on benchmark captions before and after with equal seeds. Runs that are in
--output_dir are read, not run: an interrupted series goes on, and `--rows` and `--seeds` choose.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sampling import _cpu_name

SAMPLES = 192  # of a rollout, of every method
PAIRS = "--num_prompts 24 --train_batch_size 8 --gradient_accumulation_steps 3"
CHECKER = "--reward_funcs checker checker_statements --reward_weights 1 1"
ROWS = {
    "GRPO": "--config grpo-scenes --learning_rate 2.5e-5",
    "DPO": f"--config dpo-scenes --learning_rate 2e-5 {PAIRS}",
    "RAFT": f"--config raft-scenes --learning_rate 2e-5 {PAIRS}",
    "FIND": "--config find-scenes --learning_rate 1e-3",
    "B2-DiffuRL": f"--config b2-scenes --learning_rate 2e-5 --b2.stage_rollouts 6 {CHECKER}",
    "DRAGON": f"--config dragon-scenes --learning_rate 2e-5 {CHECKER}",
}


def flags_of(name: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The command behind `nextscale align`."""
    shared: dict[str, Any] = {
        "trend_p_value": "none",  # a row shows what came out, whatever it is
        "lr_scheduler": "constant",
        "lr_warmup_steps": 5,
        "max_train_steps": options.rollouts,
        "num_validation_prompts": 0,
        "checkpointing_steps": options.rollouts,
        "num_eval_prompts": options.prompts,
        "num_eval_images": 2,
        "seed": seed,
    }
    flags = [part for key, value in shared.items() for part in (f"--{key}", str(value))]
    return [*ROWS[name].split(), *flags]


def run(folder: Path, flags: list[str]) -> None:
    """One run, its log and, once it is whole, its peak memory in its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = next(folder.parent.glob("*/before.safetensors"), None)
    if first is not None:  # the base draws the same again
        shutil.copy(first, folder)
    command = [sys.executable, "-m", "nextscale", "align", *flags, "--output_dir", str(folder)]
    with (folder / "run.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\nfailed; see {folder / 'run.log'}")
    (folder / "peak_memory_kb").write_text(str(usage.ru_maxrss))


def read(folder: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    record = json.loads((folder / "report.json").read_text())
    found: dict[str, Any] = {}
    for source, part in record["prompts"].items():
        name = source.removeprefix("benchmark:")
        for side in ("before", "after"):
            found[f"{name}/accuracy/{side}"] = part["rewards"]["checker"][side]["value"]
            found[f"{name}/vendi/{side}"] = part["vendi_within_prompt"][side]["value"]
            found[f"{name}/fd_scenes/{side}"] = part["fd_scenes"][side]["value"]
        found[f"{name}/accuracy/ci95"] = part["rewards"]["checker"]["difference"]["ci95"]
    found["kl"] = record["kl"]["total"]
    found["minutes"] = record["minutes"]
    found["peak_memory_mb"] = int((folder / "peak_memory_kb").read_text()) // 1024
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Mean and standard deviation over seeds."""
    numbers = [k for k, v in runs[0].items() if isinstance(v, int | float)]
    columns = {k: [run[k] for run in runs] for k in numbers}
    return {
        k: f"{statistics.mean(v):.4g}" + (f" ± {statistics.stdev(v):.2g}" if len(v) > 1 else "")
        for k, v in columns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 100_000, 200_000])
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=250, help="benchmark captions of each kind")
    parser.add_argument("--output_dir", default="runs/alignment_table")
    parser.add_argument("--output", default="benchmarks/results/alignment_table.json")
    options = parser.parse_args()
    output = Path(options.output)
    table: dict[str, Any] = json.loads(output.read_text())["rows"] if output.is_file() else {}
    for seed in options.seeds:
        for name in options.rows:
            folder = Path(options.output_dir, f"{name.lower()}_{seed}")
            flags = flags_of(name, seed, options)
            if not (folder / "peak_memory_kb").is_file():
                run(folder, flags)
            row = table.setdefault(name, {})
            row["command"] = f"nextscale align {' '.join(flags)}"
            row.setdefault("runs", {})[str(seed)] = read(folder)
            row["summary"] = summary(list(row["runs"].values()))
            print(name, seed, json.dumps(row["runs"][str(seed)]), flush=True)
            result = {
                "command": "python benchmarks/alignment_table.py "
                f"--rollouts {options.rollouts} --prompts {options.prompts}",
                "samples_drawn": options.rollouts * SAMPLES,
                "hardware": _cpu_name(),
                "threads": torch.get_num_threads(),
                "versions": {"torch": version("torch")},
                "rows": table,
            }
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
