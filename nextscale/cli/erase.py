"""`nextscale erase`: take concepts out of a model, with a report of what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nextscale import processes
from nextscale.cli.console import check_folder, interrupted_run, number, table
from nextscale.cli.flags import parse
from nextscale.cli.recipes import to_yaml

ABOUT = (
    "Take concepts out of a next-scale model. The model stays as it is; the result is an adapter "
    "that `nextscale generate --lora` puts on, and a report: erased, kept, back by attacks. "
    "Erasure lowers but does not remove the ability to draw a concept."
)
EXAMPLE = 'nextscale erase --config erase-scenes --concepts "red circle" --output_dir runs/erase'


def run(command: str, arguments: list[str]) -> int:
    """Erase, and print what changed."""
    from nextscale.align.erasure.config import EraseConfig

    config, output = parse(command, EraseConfig, arguments, about=ABOUT, example=EXAMPLE)
    if output.print_config:
        print(to_yaml(command, asdict(config)), end="")
        return 0
    check_folder(config.output_dir, empty=False)
    from nextscale.align.erasure.train import erase

    try:
        result = erase(config, progress=output.bar())
    except KeyboardInterrupt as error:
        raise interrupted_run(config.output_dir) from error
    if not processes.is_main():
        return 0
    record = result.report
    if output.json:
        output.figures(
            {"output_dir": config.output_dir, "pictures": result.counts, **(record or {})}
        )
    elif not output.quiet:
        counts = result.counts
        if record is not None:
            table(("", "before", "after"), _rows(record))
            done = f"{counts['kept']} of {counts['drawn']} pictures of the pairs passed the filter"
            left = "adapter, report.md, before_after.png"
        else:
            done, left = f"{counts['kept']} pictures of the pairs were trained on", "adapter"
            if config.num_eval_prompts:
                output.note(
                    "warning: nobody looked at the pictures: no filter, no report, no attacks. "
                    "Name --recognisers, and --eval_pairs for free text"
                )
        output.say(f"{done}; {left} in {config.output_dir}")
    return 0


def _rows(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the report says, in short."""
    from nextscale.align.erasure.report import strongest

    for name, found in record["concepts"].items():
        yield _row(f"{name} is recognised", found["recognised"])
        if "attacks" in found:
            worst = strongest(found["attacks"])
            yield f"{name} by the strongest attack: {worst['attack']}", "", number(worst["success"])
    if "accuracy" in record["others"]:
        yield _row("others right", record["others"]["accuracy"])


def _row(name: str, found: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = (number(found[side]["value"]) for side in ("before", "after"))
    return name, before, after
