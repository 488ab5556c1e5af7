"""The Python that the documents show runs as it stands, and what they name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines

from nextscale.cli import main
from nextscale.cli.recipes import recipe_names
from nextscale.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if "var-d16" not in block  # needs released weights
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_the_documents_runs(block: str, tmp_path: Path) -> None:
    # In a process of its own: what full-size models leave behind would add up to 6 GB.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_recipes_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"--config ((?:scenes|digits|imagenet)-[\w-]+)", text):
        assert name in recipe_names()
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def _methods() -> list[str]:
    """The flags of each row of the table of further methods."""
    text = (ROOT / "docs" / "align.md").read_text()
    table = text[text.index("### Further methods") : text.index("## Write your own reward")]
    return re.findall(r"^\| `(--[^`]+)`", table, re.MULTILINE)


@pytest.mark.parametrize("flags", _methods())
def test_further_methods_start(
    flags: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Recipe, model, rewards and batches fit each other: the next thing is to draw."""

    def conditions(task: object) -> None:
        raise UserError("accepted")

    monkeypatch.setattr("nextscale.align.tasks.Online.conditions", conditions)
    words = shlex.split(flags.replace("DATASET", "scenes"))
    if "grpo-diffusion" in words:
        tiny_pipelines.stable_diffusion().save_pretrained(tmp_path / "pipe")
        words += ["--model", str(tmp_path / "pipe")]
    base = [] if "--config" in words else ["--config", "grpo-scenes"]
    main(["align", *base, *words, "--output_dir", str(tmp_path / "run")])
    assert "error: accepted" in capsys.readouterr().err
