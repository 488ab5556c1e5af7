"""GenEval's folders (Ghosh et al., arXiv 2310.11513): what its own detector scripts read.

    OUTPUT/00000/metadata.jsonl        the prompt's line of evaluation_metadata.jsonl
    OUTPUT/00000/samples/0000.png ...  its pictures

The detector (Mask2Former of mmdet 2) cannot live beside current torch: run GenEval's
evaluate_images.py in an environment of its own, then `scores.geneval_aggregate` on its lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nextscale import processes, storage
from nextscale.data.images import save_png
from nextscale.errors import UserError
from nextscale.eval.images import claim_folder

Draw = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""(prompts, seeds) -> uint8 [n, h, w, 3]."""


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file.

    Raises:
        UserError: If it cannot be read, or a line is no object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path} is no JSON ({error})") from error
        if not isinstance(found[-1], dict):
            raise UserError(f"line {number} of {path} is no JSON object")
    if not found:
        raise UserError(f"{path} is empty")
    return found


def write_folders(
    prompts: Sequence[dict[str, Any]],
    draw: Draw,
    folder: str | Path,
    *,
    per_prompt: int = 4,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Draw and write; pictures that are there are left as they are, so that a killed run goes on.

    Each process of a run takes its share of the prompts.

    Args:
        prompts: Lines of GenEval's evaluation_metadata.jsonl, each with "prompt".
        draw: The generator.
        folder: Where to.
        per_prompt: Pictures of each prompt; published figures take 4.
        seed: Picture j of prompt i is drawn with seed + i * per_prompt + j.
        about: What else decides the pictures, such as the model; a folder of others is refused.
        progress: Show a bar.

    Returns:
        How many pictures were drawn.

    Raises:
        UserError: If a line has no prompt, or the folder holds other pictures.
    """
    for number, line in enumerate(prompts, start=1):
        if not isinstance(line.get("prompt"), str):
            raise UserError(f'line {number} of the prompts has no "prompt"')
    claim_folder(folder, {**(about or {}), "seed": seed, "num_images": per_prompt})
    drawn = 0
    for index in tqdm(processes.own_range(len(prompts)), unit="prompt", disable=not progress):
        line = prompts[index]
        place = Path(folder) / f"{index:05d}"
        with storage.os_errors(place):
            (place / "samples").mkdir(parents=True, exist_ok=True)
        storage.write_bytes(place / "metadata.jsonl", json.dumps(line).encode())
        paths = {j: place / "samples" / f"{j:04d}.png" for j in range(per_prompt)}
        missing = [j for j, path in paths.items() if not path.is_file()]
        if not missing:
            continue
        seeds = [seed + index * per_prompt + j for j in missing]
        for j, picture in zip(missing, draw([line["prompt"]] * len(missing), seeds), strict=True):
            save_png(picture, paths[j])
        drawn += len(missing)
    return sum(processes.gather(drawn))
