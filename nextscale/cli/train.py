"""`nextscale train {tokenizer,var}`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nextscale import processes
from nextscale.cli.console import Interrupted, Output, check_folder, number, table
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml

ABOUT = {
    "train tokenizer": "Train a multi-scale tokenizer. Runs under accelerate launch and torchrun: "
    "accelerate launch -m nextscale train tokenizer ...",
    "train var": "Train or fine-tune a next-scale transformer on class labels or captions. Runs "
    "under accelerate launch and torchrun: accelerate launch -m nextscale train var ...",
}
EXAMPLE = {
    "train tokenizer": "nextscale train tokenizer --config digits-tokenizer --output_dir runs/tok",
    "train var": "nextscale train var --config digits-var --output_dir runs/var",
}


def run(command: str, arguments: list[str]) -> int:
    """Train and print the last figures."""
    train: Any
    settings: type
    if command == "train tokenizer":
        from nextscale.tokenizers.train import TokenizerTrainingConfig as settings
        from nextscale.tokenizers.train import train_tokenizer as train
    else:
        from nextscale.var.train import TransformerTrainingConfig as settings
        from nextscale.var.train import train_transformer as train
    config, output = parse(
        command, settings, arguments, about=ABOUT[command], example=EXAMPLE[command]
    )
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    check_folder(config.output_dir, empty=False)
    try:
        result = train(config, progress=output.bar())
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; the checkpoints in {config.output_dir} are kept, continue with "
            "--resume_from_checkpoint latest"
        ) from error
    if processes.is_main():
        _report(config.output_dir, result, output)
    return 0


def _report(folder: str, result: Any, output: Output) -> None:
    facts = {"output_dir": folder, "steps": result.steps, "seconds": result.seconds}
    checkpoint = None if result.checkpoint is None else str(result.checkpoint)
    if output.json:
        output.figures({**facts, "checkpoint": checkpoint, "metrics": result.metrics})
    elif not output.quiet:
        table(("metric", "value"), [(k, number(v)) for k, v in sorted(result.metrics.items())])
        output.say(f"{result.steps} steps in {result.seconds / 60:.1f} minutes; result in {folder}")
