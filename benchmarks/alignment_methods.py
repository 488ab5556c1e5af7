"""GRPO with and without each remedy for next-scale models, DPO and RAFT, on one budget of samples.

    python benchmarks/alignment_methods.py

Every row is the shipped recipe `grpo-scenes`, shortened to --steps rollouts of 192 pictures at a
constant learning rate, and measured twice: by its own rollouts, whose captions are the same in
every row, and on `hard` captions, 2 pictures each, before and after with equal seeds and the
model's own settings. A run that is in --output_dir already is read, not run: an interrupted series
goes on, and `--rows NAME ...` runs some of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import save_record
from torch import Tensor

from nextscale import processes
from nextscale.align import AlignConfig, align
from nextscale.align.methods.dpo import DPOConfig
from nextscale.align.methods.grpo import GRPOConfig
from nextscale.align.methods.raft import RAFTConfig
from nextscale.align.units import pull_back
from nextscale.cli.recipes import read_recipe
from nextscale.data.checker import recover_segmentation
from nextscale.data.images import to_uint8
from nextscale.pipeline import NextScalePipeline

VMR = {"credit": "vmr", "vmr_scale": 3, "vmr_samples": 2}  # of 6 scales: halves
PAIRS = {"scale_weight": "scale", "score": "policy", "pairs_per_group": 4}
BEST = {"scale_weight": "scale", "top_k": 4}
ROWS: dict[str, dict[str, Any]] = {
    "GRPO, no remedy": {"grpo": {"scale_weight": "token"}},
    "GRPO, each scale one action": {"grpo": {"scale_weight": "scale"}},
    "GRPO, middle-return value": {
        "grpo": {"scale_weight": "token", **VMR}, "num_generations": 4
    },
    "GRPO, mask of shapes": {"grpo": {"scale_weight": "token"}, "mask": True},
    "GRPO, all three": {
        "grpo": {"scale_weight": "scale", **VMR}, "num_generations": 4, "mask": True
    },
    "DPO": {"method": "dpo", "dpo": PAIRS, "train_batch_size": 16},
    "RAFT": {"method": "raft", "raft": BEST, "gradient_accumulation_steps": 2},
}  # fmt: skip


def shapes_mask(images: Tensor, prompts: Any) -> Tensor:
    """[b, tokens]: 1 for tokens whose centre lies on or next to a shape, 0.1 elsewhere."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    found = torch.stack([torch.from_numpy(recover_segmentation(x) > 0) for x in pixels])
    near = F.max_pool2d(found[:, None].float(), 9, stride=1, padding=4)[:, 0]
    return pull_back(near, SCHEDULE, floor=0.1).to(images.device)


def run(folder: Path, changes: dict[str, Any], options: argparse.Namespace) -> None:
    values: dict[str, Any] = read_recipe("grpo-scenes", "align")
    changes = dict(changes)
    token_mask = shapes_mask if changes.pop("mask", False) else None
    sections = {"grpo": GRPOConfig, "dpo": DPOConfig, "raft": RAFTConfig}
    values |= {
        "lr_scheduler": "constant",
        "lr_warmup_steps": 5,
        "logging_steps": max(options.steps // 4, 1),
        "learning_rate": options.learning_rate,
        "max_train_steps": options.steps,
        "seed": options.seed,
        "validation_steps": None,
        "checkpointing_steps": None,
        "trend_p_value": None,
        "eval_prompts": ["benchmark:hard"],
        "num_eval_prompts": options.num_eval_prompts,
        "num_eval_images": 2,
        **changes,
    }
    for name, section in sections.items():
        values[name] = section(**values.get(name, {}))
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    first = next(folder.parent.glob("*/before.safetensors"), None)
    if first is not None and not folder.exists():  # the base draws the same pictures for each row
        folder.mkdir()
        shutil.copy(first, folder)
    values["output_dir"] = str(folder)
    align(AlignConfig(**values), token_mask=token_mask)


def read(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "report.json").read_text())
    found = record["prompts"]["benchmark:hard"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "rollouts": [x["rewards/checker/mean"] for x in lines if "rewards/checker/mean" in x],
        "checker": found["rewards"]["checker"],
        "checker_statements": found["rewards"]["checker_statements"],
        "vendi_within_prompt": found["vendi_within_prompt"],
        "fd_scenes": found["fd_scenes"],
        "kl": record["kl"],
        "minutes": record["minutes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=2.5e-5)
    parser.add_argument("--num_eval_prompts", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="runs/alignment_methods")
    parser.add_argument("--output", default="benchmarks/results/alignment_methods.json")
    options = parser.parse_args()
    processes.keep_freed_memory()
    folder = Path(options.output_dir, f"seed_{options.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        own = folder / name.lower().replace(",", "").replace(" ", "_")
        if not (own / "report.json").is_file():
            run(own, ROWS[name], options)
        print(name, json.dumps(read(own)["checker"]), flush=True)
    runs = {name: folder / name.lower().replace(",", "").replace(" ", "_") for name in ROWS}
    save_record(
        options.output,
        f"python benchmarks/alignment_methods.py --steps {options.steps} "
        f"--learning_rate {options.learning_rate} --num_eval_prompts {options.num_eval_prompts} "
        f"--seed {options.seed}",
        rows={n: read(x) for n, x in runs.items() if (x / "report.json").is_file()},
    )


SCHEDULE = NextScalePipeline.from_pretrained("scenes").tokenizer.schedule

if __name__ == "__main__":
    main()
