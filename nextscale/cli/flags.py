"""Flags -> settings: tyro, fed with the recipe's flags before the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_type_hints

from nextscale.cli.console import Output
from nextscale.cli.recipes import read_recipe, recipe_flags
from nextscale.errors import UserError

T = TypeVar("T")


def parse(
    command: str,
    settings: type[T],
    arguments: list[str],
    *,
    about: str,
    example: str,
    expand: Callable[[list[str]], list[str]] = list,
) -> tuple[T, Output]:
    """Parse the arguments of a command.

    Args:
        command: Its words, such as "train tokenizer".
        settings: Dataclass whose fields are the flags.
        arguments: What the person typed after the command.
        about: One or two sentences for --help.
        example: A command line for --help.
        expand: Rewrites the words before they are parsed.

    Returns:
        The settings and the flags that all commands share.

    Raises:
        UserError: For a bad recipe or a value that the settings refuse.
        SystemExit: From tyro, 0 after --help.
    """
    import tyro

    both = dataclasses.make_dataclass(
        "Both",
        [
            ("settings", Annotated[settings, tyro.conf.arg(name="")]),
            ("output", Annotated[Output, tyro.conf.arg(name="")]),
        ],
    )
    words = _explicit(expand(with_recipe(command, settings, arguments)), settings)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                both,
                args=words,
                prog=f"nextscale {command}",
                description=f"{about}\n\nexample:\n  {example}",
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(complaint.getvalue(), command)) from stop
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    _show_log(parsed.output)
    return parsed.settings, parsed.output


def _show_log(output: Output) -> None:
    """The package's own messages go to stderr."""
    logger, handler = logging.getLogger("nextscale"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("nextscale: %(message)s"))
    logger.handlers = [handler]  # anew: stderr may be another one now
    logger.setLevel(logging.ERROR if output.quiet else logging.INFO)


def _one_line(box: str, command: str) -> str:
    """The first paragraph of tyro's box of an argument error."""
    lines = [line.strip("╭╮╰╯│─ ") for line in box.splitlines()[1:]]
    first = list(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines)))
    text = " ".join(first).replace("settings.", "").replace("Error parsing ", "")
    return f"{text.rstrip('.')}. See nextscale {command} --help"


def with_recipe(command: str, settings: type, arguments: list[str]) -> list[str]:
    """Put the flags of `--config` before the user's own flags; a later flag wins.

    The user's leading positional words stay in front: a list flag of the recipe would otherwise
    swallow them.
    """
    name = None
    for index, word in enumerate(arguments):
        key, equals, value = word.partition("=")
        if key == "--config":
            name = value if equals else next(iter(arguments[index + 1 :]), None)
    if name is None:
        return arguments
    first = next((i for i, w in enumerate(arguments) if w.startswith("-")), len(arguments))
    values = read_recipe(name, command)
    if "preset" in values:  # a preset gives way to every other key
        values = {"preset": values["preset"], **values}
    flags = recipe_flags(values, settings)
    return [*arguments[:first], *flags, *arguments[first:]]


def _explicit(words: list[str], settings: type) -> list[str]:
    """Write out the switches that have a third state: --flag -> --flag True, --no_flag -> False."""
    hints = get_type_hints(settings)
    tristate = {f.name for f in dataclasses.fields(settings) if hints[f.name] == bool | None}  # type: ignore[arg-type]
    result = []
    for index, word in enumerate(words):
        name = word.removeprefix("--").replace("-", "_")
        following = words[index + 1] if index + 1 < len(words) else None
        if not word.startswith("--"):
            result.append(word)
        elif name in tristate and following not in ("True", "False", "None"):
            result += [word, "True"]
        elif name.removeprefix("no_") in tristate and name.startswith("no_"):
            result += [f"--{name.removeprefix('no_')}", "False"]
        else:
            result.append(word)
    return result
