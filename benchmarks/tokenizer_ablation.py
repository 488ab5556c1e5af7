"""The tokenizer's remedies against collapse, each left out once, in short equal runs.

    python benchmarks/tokenizer_ablation.py

Every row trains the shipped recipe `scenes-tokenizer`, shortened to --steps with the quantizer's
start shortened alike, from the same seed, and measures it on 2,000 held-out scenes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from record import earlier, save_record
from torch import nn

from nextscale.cli.recipes import read_recipe
from nextscale.tokenizers import MultiscaleVQ, TokenizerConfig, train
from nextscale.tokenizers.train import TokenizerTrainingConfig, train_tokenizer

ours = train.initialize


def torch_start(tokenizer: MultiscaleVQ) -> None:
    """torch's own initialisation, but phi as the identity."""
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    ours(tokenizer)
    kept = {k: v for k, v in before.items() if k.startswith(("encoder.", "decoder."))}
    tokenizer.load_state_dict(tokenizer.state_dict() | kept)


def random_phi(tokenizer: MultiscaleVQ) -> None:
    """Our initialisation, but phi as torch makes it."""
    ours(tokenizer)
    for phi in tokenizer.quantizer.phi:
        assert isinstance(phi, nn.Conv2d)
        phi.reset_parameters()


ROWS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "torch's initialisation": {"initialize": torch_start},
    "phi starts at random": {"initialize": random_phi},
    "quantizer from step 0": {"quantizer_start": 0},
    "no k-means start": {"kmeans_start": False},
    "no revival": {"revival_steps": 0, "refit_share": 0.0},
    "no refit": {"refit_share": 0.0},
    "no entropy term": {"entropy_weight": 0.0},
    "EMA codebook": {"codebook_update": "ema"},
    "scale dropout 0.1": {"scale_dropout": 0.1},
    "none of them": {
        "initialize": torch_start,
        "quantizer_start": 0,
        "kmeans_start": False,
        "revival_steps": 0,
        "refit_share": 0.0,
        "entropy_weight": 0.0,
    },
}


def run(changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """One short training: its PSNR, codes in use, and share of the codebook per scale."""
    values = read_recipe("scenes-tokenizer", "train tokenizer")
    values.pop("command", None)
    start = round(values["quantizer_start"] * steps / values["max_train_steps"])
    values |= {
        "quantizer_start": max(start, 50),
        "max_train_steps": steps,
        "checkpointing_steps": None,
        "validation_steps": None,
        "report_to": "none",
        **changes,
    }
    train.initialize = values.pop("initialize", ours)
    tokenizer = TokenizerConfig(**values.pop("tokenizer"))
    with tempfile.TemporaryDirectory() as folder:
        values["output_dir"] = folder
        config = TokenizerTrainingConfig(tokenizer=tokenizer, **values)
        metrics = train_tokenizer(config, progress=False).metrics
    scales = range(len(tokenizer.scales))
    return {
        "psnr": round(metrics["val/psnr"], 2),
        "usage": round(metrics["val/usage"], 4),
        "share": [round(metrics[f"val/share_{k}"], 3) for k in scales],
        "perplexity": [round(metrics[f"val/perplexity_{k}"], 1) for k in scales],
        "seconds": round(metrics["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", default="benchmarks/results/tokenizer_ablation.json")
    options = parser.parse_args()
    command = f"python benchmarks/tokenizer_ablation.py --steps {options.steps}"
    output = Path(options.output)
    going_on = output.exists() and json.loads(output.read_text())["command"] == command
    rows = earlier(output) if going_on else {}  # an interrupted series
    for name, changes in ROWS.items():
        if name not in rows:
            rows[name] = run(changes, options.steps)
            print(name, json.dumps(rows[name]), flush=True)
            save_record(output, command, rows=rows)


if __name__ == "__main__":
    main()
