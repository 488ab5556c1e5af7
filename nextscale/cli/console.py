"""What all commands share towards the person: errors as one line, figures, bars."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale import processes
from nextscale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Output:
    """Flags of every command."""

    config: str | None = None
    """Recipe: a shipped name (nextscale recipes ls) or a YAML file; its keys are the flags, and
    flags given here win."""
    quiet: bool = False
    """Print nothing but errors (and what --json prints)."""
    json: bool = False
    """Print the result as JSON."""
    print_config: bool = False
    """Print the resolved settings as YAML and stop."""
    debug: bool = False
    """Show the traceback of an error."""

    def bar(self) -> bool:
        """Whether to show progress bars."""
        return not self.quiet and processes.is_main() and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Print a line for the person."""
        if not self.quiet and not self.json and processes.is_main():
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a line about the work, beside the result: to stderr."""
        if not self.quiet and processes.is_main():
            print(f"nextscale: {text}", file=sys.stderr, flush=True)

    def figures(self, values: Mapping[str, Any], text: str | None = None) -> None:
        """Print the result: as JSON, or as text (default: a table of the values)."""
        if not processes.is_main():
            return
        if self.json:
            print(json.dumps(values, indent=2, default=str), flush=True)
        elif text is not None:
            self.say(text)
        elif not self.quiet:
            table(("", ""), [(k, number(v)) for k, v in values.items()])


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about what is kept."""


def interrupted_run(output_dir: str) -> Interrupted:
    """What a training run that is stopped by Ctrl-C leaves, and how to go on."""
    from nextscale.training import latest_checkpoint

    folders = [Path(output_dir), *sorted(Path(output_dir).glob("*/"))]
    newest = [path.name for path in map(latest_checkpoint, folders) if path is not None]
    if not newest:
        return Interrupted(
            f"interrupted before the first checkpoint: {output_dir} holds nothing to continue "
            "from. --checkpointing_steps says how often there is one"
        )
    return Interrupted(
        f"interrupted; {output_dir} is kept up to {newest[-1]}, continue with "
        "--resume_from_checkpoint latest"
    )


class Failed(UserError):
    """The main process has already said why; the others end quietly."""


def failure(error: BaseException, *, debug: bool) -> int:
    """Print an error as one plain line and give the exit code.

    Args:
        error: What ended the command.
        debug: Print the traceback as well.
    """
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # `nextscale ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, KeyboardInterrupt):
        print(f"nextscale: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1
    if isinstance(error, Failed):
        return error.exit_code
    if isinstance(error, UserError):
        print(f"nextscale: error: {error}", file=sys.stderr)
        return error.exit_code
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[0] if isinstance(error, OSError) else f"{type(error).__name__}: {lines[0]}"
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        line += " Use a smaller --batch_size (training: --train_batch_size)."
    hint = "" if debug else " (run with --debug for the traceback)"
    print(f"nextscale: error: {line}{hint}", file=sys.stderr)
    return 1


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = list(header)
    sheet = Table(*names, box=box.SIMPLE, show_header=any(names))
    for row in rows:
        sheet.add_row(*row)
    # In a file or pipe nothing is cut.
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(sheet)


def number(value: Any) -> str:
    """A figure as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_file(path: str | Path) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Raises:
        UserError: Naming the file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    try:
        place = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_folder(
    folder: str | Path, *, empty: bool, hint: str = "", besides: str | None = None
) -> Path:
    """Refuse an output folder that cannot be written, before any work is done.

    Args:
        folder: Wanted folder; it may not exist yet.
        empty: Refuse it if it holds visible files.
        hint: What to do then.
        besides: A file that does not count.

    Raises:
        UserError: Naming the folder.
    """
    folder = Path(folder)
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
    except PermissionError as error:
        where = error.filename or place
        raise UserError(f"output_dir {folder}: no permission to look at {where}.") from error
    if not place.is_dir():
        raise UserError(f"output_dir {folder}: {place} is a file. Choose another folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir {folder}: no permission to write in {place}. Choose another folder."
        )
    present = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    if empty and any(not name.startswith(".") and name != besides for name in present):
        raise UserError(f"output_dir {folder} is not empty. {hint}")
    return folder
