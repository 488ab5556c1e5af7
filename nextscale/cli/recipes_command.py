"""`nextscale recipes {ls,show,cp}`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from nextscale.cli.console import Output, table
from nextscale.cli.flags import parse
from nextscale.cli.recipes import description, find_recipe, recipe_command, recipe_names, to_yaml
from nextscale.errors import UserError
from nextscale.storage import write_bytes


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No settings."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Which recipe."""

    name: tyro.conf.Positional[str]
    """Name from `nextscale recipes ls`."""


@dataclass(frozen=True, kw_only=True)
class Copy(Show):
    """Which recipe, and where to."""

    to: tyro.conf.Positional[str] = "."
    """File or folder."""


def run(command: str, arguments: list[str]) -> int:
    """Run one of the three commands."""
    if command == "recipes ls":
        about = "List the recipes that ship with nextscale."
        _, output = parse(command, Nothing, arguments, about=about, example="nextscale recipes ls")
        _list(output)
    elif command == "recipes show":
        about, example = "Print a recipe.", "nextscale recipes show scenes-tokenizer"
        show, _ = parse(command, Show, arguments, about=about, example=example)
        print(find_recipe(show.name).read_text(encoding="utf-8"), end="")
    else:
        about, example = "Copy a recipe to change it.", "nextscale recipes cp scenes-tokenizer ."
        copy, output = parse(command, Copy, arguments, about=about, example=example)
        if output.print_config:
            print(to_yaml(command, asdict(copy)), end="")
            return 0
        _copy(copy, output)
    return 0


def _list(output: Output) -> None:
    rows = {n: (recipe_command(n) or "", description(n)) for n in recipe_names()}
    if output.json:
        output.figures({n: {"command": c, "about": d} for n, (c, d) in rows.items()})
    elif not output.quiet:
        table(("recipe", "command", "what it does"), [(n, c, d) for n, (c, d) in rows.items()])


def _copy(copy: Copy, output: Output) -> None:
    source, target = find_recipe(copy.name), Path(copy.to)
    if target.is_dir():
        target /= source.name
    if target.exists():
        raise UserError(f"{target} exists already. Choose another name.")
    write_bytes(target, source.read_bytes())
    output.figures({"path": str(target)}, f"copied to {target}")
