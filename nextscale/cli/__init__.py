"""The command line: `main` finds the command by its first words and runs its file.

Nothing heavy is imported here, so that `nextscale --help` is instant.
"""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from nextscale import processes
from nextscale.cli.console import failure

# Words of the command -> (module under nextscale.cli, one line for --help). A module has
# `run(command, arguments) -> int`; its own parser is built there.
COMMANDS = {
    "generate": ("generate", "pictures from prompts or class labels"),
    "edit inpaint": ("edit", "redraw the inside of a box"),
    "edit outpaint": ("edit", "redraw the outside of a box"),
    "edit class": ("edit", "redraw a box as a class or prompt"),
    "train tokenizer": ("train", "a multi-scale tokenizer on your images"),
    "train var": ("train", "a next-scale transformer on your images"),
    "train control": ("train", "a module that makes pictures follow edges, depth, segmentation"),
    "train features": ("train", "a small feature network, to measure with"),
    "train clip": ("train", "a small CLIP, to score captions with"),
    "train diffusion": ("train", "a small diffusion model, to align with rewards"),
    "align": ("align", "fine-tune a generator by rewards: GRPO, DPO, FIND, B2, DRAGON"),
    "erase": ("erase", "take a concept out of a model, with a report of what is left"),
    "encode": ("encode", "images -> token maps, once for many trainings"),
    "extract": ("extract", "images -> control maps: edges, depth, segmentation, ..."),
    "reconstruct": ("reconstruct", "images -> tokens -> images: PSNR and codebook usage"),
    "eval": ("evaluate", "pictures -> FID, KID, Inception score, precision and recall, ..."),
    "eval stats": ("eval_tools", "statistics of a reference set"),
    "eval pack": ("eval_tools", "a folder of pictures -> .npz"),
    "eval compare": ("eval_tools", "the difference of two results"),
    "eval geneval": ("geneval", "GenEval's folders and the sum of its results"),
    "convert": ("convert", "released VAR checkpoints to a model folder and back"),
    "recipes ls": ("recipes_command", "list the recipes that ship with nextscale"),
    "recipes show": ("recipes_command", "print a recipe"),
    "recipes cp": ("recipes_command", "copy a recipe to change it"),
    "info": ("info", "versions and devices; a model's sizes, grammar and checksums"),
}
EXAMPLE = 'nextscale generate "a red circle left of a blue square" --num_images 4 --output_dir out'


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Words after the program's name; None: those of this process.

    Returns:
        0 for success, 2 for bad input, 1 when the work failed or was interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # the parser, after --help (0) or an error box (2)
        return stop.code if isinstance(stop.code, int) else 1
    except (Exception, KeyboardInterrupt) as error:
        return failure(error, debug="--debug" in arguments)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from nextscale import __version__

        print(f"nextscale {__version__}")
        return 0
    for length in (2, 1):
        command = " ".join(arguments[:length])
        if command in COMMANDS:
            module = import_module(f"nextscale.cli.{COMMANDS[command][0]}")
            processes.keep_freed_memory()
            return module.run(command, arguments[length:])
    return _unknown(arguments)


def _unknown(arguments: list[str]) -> int:
    first = arguments[0]
    family = [name for name in COMMANDS if name.split()[0] == first]
    if family and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_table(family))
        return 0 if len(arguments) > 1 else 2
    wanted = " ".join(arguments[:2]) if family else first
    choices = family or sorted({name.split()[0] for name in COMMANDS})
    near = difflib.get_close_matches(wanted, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    print(
        f'nextscale: error: there is no command "{wanted}".{hint} '
        f"Commands: {', '.join(choices)}; see nextscale --help",
        file=sys.stderr,
    )
    return 2


def overview() -> str:
    """What `nextscale --help` prints."""
    return (
        "usage: nextscale COMMAND [ARGUMENTS]\n\n"
        "Generate, train and measure next-scale image models.\n\n"
        f"{_table(list(COMMANDS))}\n\n"
        "nextscale COMMAND --help lists the arguments of a command. Common to all: --config "
        "RECIPE,\n--quiet, --json, --print_config, --debug.\n\n"
        f"example:\n  {EXAMPLE}"
    )


def _table(names: list[str]) -> str:
    return "commands:\n" + "\n".join(f"  {name:<16} {COMMANDS[name][1]}" for name in names)


__all__ = ["main"]
