"""What a run leaves behind for people: log.jsonl, recipe.yaml, run.json."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nextscale.storage import atomic, write_json
from nextscale.training.config import TrainingConfig

PACKAGES = ("nextscale", "torch", "accelerate", "numpy", "safetensors", "pillow")


def append_line(path: Path, values: Mapping[str, float | int | None]) -> None:
    """Add one JSON line; numbers that JSON cannot hold (inf, nan) become null."""
    clean = {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")


def rewind_log(path: Path, step: int, *, validated: bool = True) -> None:
    """Drop what a killed run logged after the checkpoint that is now continued.

    Args:
        path: The log.
        step: Of the checkpoint.
        validated: Keep the validation of this very step.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break  # the line that the kill cut short; nothing follows it
        again = not validated and any(name.startswith("val/") for name in values)
        if values["step"] < step or (values["step"] == step and not again):
            kept.append(line + "\n")
    with atomic(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def write_record(config: TrainingConfig, facts: Mapping[str, Any]) -> None:
    """Write the resolved recipe and the circumstances of the run.

    Args:
        config: The run's configuration; running recipe.yaml again repeats the run.
        facts: What only the loop knows (device, precision, processes, resumed step).
    """
    folder = Path(config.output_dir)
    plain = plain_settings(config)
    with atomic(folder / "recipe.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    run = {
        "seed": config.seed,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        **facts,
    }
    write_json(folder / "run.json", run)


def plain_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings as recipe.yaml holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_settings(output_dir: str | Path) -> dict[str, Any]:
    """Those of the run in a folder; empty if there is none."""
    path = Path(output_dir, "recipe.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def git_revision() -> str | None:
    """Commit of the source tree this package runs from, `+changes` if it is dirty; else None."""
    here = str(Path(__file__).parent)
    try:
        # Only a repository that tracks this file is ours: site-packages may lie inside another.
        subprocess.run(
            ["git", "-C", here, "ls-files", "--error-unmatch", Path(__file__).name],
            **{"check": True, "capture_output": True, "timeout": 10},
        )
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: str, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *arguments], check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
