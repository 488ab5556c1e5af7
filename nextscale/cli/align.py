"""`nextscale align`: fine-tune a generator by rewards."""

from __future__ import annotations

from dataclasses import asdict

from nextscale import processes
from nextscale.cli.console import check_folder, interrupted_run, number, table
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml

ABOUT = (
    "Fine-tune a next-scale model or a diffusers pipeline by rewards. The recipe says the method, "
    "the model, the prompts and the rewards. Runs under accelerate launch and torchrun: accelerate "
    "launch -m nextscale align ..."
)
EXAMPLE = "nextscale align --config grpo-scenes --output_dir runs/grpo"


def run(command: str, arguments: list[str]) -> int:
    """Train, and print what changed."""
    from nextscale.align.config import AlignConfig

    config, output = parse(command, AlignConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    check_folder(config.output_dir, empty=False)
    from nextscale.align.train import align

    try:
        result = align(config, progress=output.bar())
    except KeyboardInterrupt as error:
        raise interrupted_run(config.output_dir) from error
    if not processes.is_main():
        return 0
    record = result.report.record if result.report is not None else {}
    if output.json:
        trend = {"p_value": result.p_value, "kept": result.kept}
        told = {"output_dir": config.output_dir, "steps": result.fit.steps, "reward_trend": trend}
        output.figures({**told, **record})
    elif not output.quiet:
        rows = [
            (source, name, *(number(side["value"]) for side in (row["before"], row["after"])))
            for source, found in record.get("prompts", {}).items()
            for name, row in found["rewards"].items()
            if row["before"] is not None
        ]
        if rows:
            table(("prompts", "reward", "before", "after"), rows)
        minutes = result.fit.seconds / 60
        left = ["model" if result.kept else "the model as it was"]
        left += ["report.md"] if record else []
        left += ["samples"] if config.num_validation_prompts else []
        output.say(
            f"{result.fit.steps} steps in {minutes:.1f} minutes of training; {', '.join(left)} in "
            f"{config.output_dir}"
        )
    return 0
