"""What every file of results says of itself: the command, and what it ran on."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nextscale import storage


def save_record(
    path: str | Path, command: str, *packages: str, device: str = "cpu", **content: Any
) -> None:
    """Write a result with its command, hardware, threads and versions.

    Args:
        path: File that is written.
        command: What makes it again.
        packages: Whose versions matter, besides Python and torch.
        device: Where it was measured, "cpu" or "cuda".
        content: What was measured.
    """
    record = {
        "command": command,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", *packages)},
        },
        **content,
    }
    storage.write_json(path, record)


def cpu_name() -> str:
    """Of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def earlier(path: str | Path, key: str = "rows", *, command: str | None = None) -> dict[str, Any]:
    """What a file of results holds so far, by this command if one is given."""
    path = Path(path)
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    if command is not None and found["command"] != command:
        raise SystemExit(f"{path} is of {found['command']}: give another --output")
    return found[key]
