"""Recipes: YAML files whose keys are the flags of a command.

A recipe becomes flags that stand before the user's, so that one parser reads both and a typo in
YAML gives the same message as a typo on the command line. The leading comment describes it; the
key `command` says which command it is for.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from nextscale.errors import UserError

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe or a path.

    Raises:
        UserError: If there is none.
    """
    shipped = RECIPES / f"{name}.yaml"
    if name in recipe_names():
        return shipped
    path = Path(name).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f'there is no recipe "{name}".{hint} Give a YAML file or one of: '
        f"{', '.join(recipe_names()) or 'none is installed'}"
    )


def read_recipe(name: str, command: str | None = None) -> dict[str, Any]:
    """The settings of a recipe.

    Args:
        name: A shipped name or a path.
        command: Words of the command that reads it; None: any.

    Raises:
        UserError: If it is no YAML mapping, or was written for another command.
    """
    import yaml

    path = find_recipe(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"the recipe {path} is not valid YAML: {where}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"the recipe {path} must be a list of `flag: value` lines")
    meant = content.pop("command", None)
    if command is not None and meant not in (None, command):
        raise UserError(
            f"the recipe {path} is for `nextscale {meant}`, not for `nextscale {command}`"
        )
    return content


def recipe_command(name: str) -> str | None:
    """The command a recipe is for."""
    import yaml

    content = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    return content.get("command") if isinstance(content, dict) else None


def description(name: str) -> str:
    """First sentence of a recipe's leading comment."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").strip())
    return " ".join(comment).split(". ")[0].rstrip(".")


def recipe_flags(values: Mapping[str, Any], settings: type | None, prefix: str = "") -> list[str]:
    """Flags that say the same as a recipe.

    Args:
        values: Keys and values, sections nested.
        settings: The dataclass behind the flags; a mapping is a value (not a section) where it
            declares a dict.
        prefix: Of a section, with its dot.
    """
    hints = get_type_hints(settings) if dataclasses.is_dataclass(settings) else {}
    flags: list[str] = []
    for key, value in values.items():
        declared = hints.get(key)
        flag = f"--{prefix}{key}"
        if isinstance(value, Mapping) and "dict" not in str(declared):
            section = declared if isinstance(declared, type) else None
            flags += recipe_flags(value, section, f"{prefix}{key}.")
        elif isinstance(value, Mapping):
            flags += [flag, *(str(x) for pair in value.items() for x in pair)]
        elif declared is bool and isinstance(value, bool):
            flags.append(flag if value else f"--{prefix}no_{key}")
        elif isinstance(value, list | tuple):
            if any(isinstance(x, list | tuple) for x in value):
                raise UserError(
                    f"{prefix}{key}: a recipe takes a flat list, got {value}. Scales that are not "
                    "square are for the Python API."
                )
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def to_yaml(command: str, values: Mapping[str, Any], comment: str = "") -> str:
    """A recipe as text; None and empty lists are left out."""
    import yaml

    content = {"command": command, **_plain(values)}
    stream = io.StringIO()
    for line in comment.splitlines():
        stream.write(f"# {line}\n")
    yaml.safe_dump(content, stream, sort_keys=False, allow_unicode=True, width=100)
    return stream.getvalue()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain[key] = _plain(value)
        elif isinstance(value, list | tuple):
            if value:
                plain[key] = [list(v) if isinstance(v, tuple) else v for v in value]
        elif value is not None:
            plain[key] = value
    return plain
