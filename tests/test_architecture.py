"""The rooms of the house and the arrows between them (ARCHITECTURE.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nextscale"

SUPPORT = {"storage", "streams", "processes", "errors"}
EVERYONE_MAY = {"data", "training", *SUPPORT}
CHAIN = ["cli", "align", "pipeline", "control", "var", "tokenizers"]

ALLOWED = {room: set(CHAIN[place + 1 :]) | EVERYONE_MAY for place, room in enumerate(CHAIN)}
ALLOWED["cli"] |= {"eval"}
ALLOWED["align"] |= {"eval"}
ALLOWED["pipeline"] -= {"training"}
ALLOWED["eval"] = set(EVERYONE_MAY)
ALLOWED["data"] = set(SUPPORT)
ALLOWED["training"] = set(SUPPORT)
# Among themselves the support files point one way too: everything knows the errors.
ALLOWED["storage"] = {"errors"}
ALLOWED["streams"] = {"errors"}
ALLOWED["processes"] = {"errors"}
ALLOWED["errors"] = set()
ALLOWED["__main__"] = {"cli"}
# The public names, each loaded on first use.
ALLOWED["__init__"] = {"pipeline", "tokenizers", "var"}

# Anyone may ask for the version.
PACKAGE_NAMES = {"__version__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import of ours, wherever in the file it stands."""
    parents = ["nextscale", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "nextscale" and parts[1:2] and parts[1] not in PACKAGE_NAMES:
                assert isinstance(node, ast.stmt | ast.expr)
                yield node.lineno, parts[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_what_the_design_allows(file: Path) -> None:
    room = _room(file)
    assert room in ALLOWED, f"{file.name} stands in no room of the design"
    wrong = [
        f"{file.relative_to(PACKAGE.parent)}:{line} {room} -> {target}"
        for line, target in _imports(file)
        if target != room and target not in ALLOWED[room]
    ]
    assert not wrong, "arrows that the design does not have:\n" + "\n".join(wrong)


def test_the_allowed_arrows_have_no_circle() -> None:
    left = {room: set(targets) for room, targets in ALLOWED.items()}
    while left:
        leaves = [room for room, targets in left.items() if not targets & left.keys()]
        assert leaves, f"these rooms import each other: {sorted(left)}"
        for room in leaves:
            del left[room]


def test_files_are_named_for_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    found = [
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.stem in vague
    ]
    assert not found, f"name these for the idea they hold: {found}"


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("import nextscale.eval.scorers", "eval"),
        ("from nextscale import eval", "eval"),
        ("from nextscale.eval import fid", "eval"),
        ("from ..eval import fid", "eval"),
        ("from .. import eval", "eval"),
        ("from .cache import Cache", "var"),
        ("def f():\n    from nextscale.eval.fid import x", "eval"),
        ("import_module('nextscale.eval')", "eval"),
        ("from nextscale import __version__", None),
        ("from torch import eval", None),
    ],
)
def test_the_parser_sees_every_form_of_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, target: str | None
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "var" / "model.py"
    file.parent.mkdir()
    file.write_text(line)
    assert [room for _, room in _imports(file)] == ([target] if target else [])
