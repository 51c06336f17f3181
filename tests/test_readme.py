"""The README's Python blocks run as they stand, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    result = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_it_has_blocks():
    assert len(BLOCKS) >= 2


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_paths_exist():
    for path in re.findall(r"\]\(([^)]+)\)|(?:bash|python) (tests/\S+\.sh)", TEXT):
        assert (ROOT / next(filter(None, path))).exists(), path


def test_tree_names_what_is_there():
    tree = TEXT.split("## Tree")[1].split("```")[1]
    for line in filter(None, tree.splitlines()):
        for name in re.split(r",\s*", re.split(r"\s{2,}", line)[0]):
            assert (ROOT / name).exists(), name


def test_subcommands_are_listed():
    from mllama.cli import COMMANDS

    for name in COMMANDS:
        assert f"`mllama {name}" in TEXT
