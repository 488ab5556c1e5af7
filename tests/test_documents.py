"""The Python that the documents show runs as it stands, and what they name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nextscale.cli.recipes import recipe_names

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
