"""`nextscale erase`: take concepts out of a model, with a report of what is left."""

from __future__ import annotations

from dataclasses import asdict

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
        if record is not None:
            rows = [(f"{n} is recognised", f["recognised"]) for n, f in record["concepts"].items()]
            if "accuracy" in record["others"]:
                rows.append(("others right", record["others"]["accuracy"]))
            table(
                ("", "before", "after"),
                [(n, *(number(r[side]["value"]) for side in ("before", "after"))) for n, r in rows],
            )
        counts = result.counts
        left = "adapter" if record is None else "adapter, report.md, before_after.png"
        output.say(
            f"{counts['kept']} of {counts['drawn']} pictures of the pairs passed the filter; "
            f"{left} in {config.output_dir}"
        )
    return 0
