"""The README and the other pages: Python blocks run as they stand, and what is named exists."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import pytest
from confinement import confined_cases

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed build of the packages goes first

from tools import terminal_svg  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").glob("*.md"),
            ROOT / "csrc" / "README.md",
            *(ROOT / "benchmarks").rglob("README.md"),
        ]
    )
    if path.name != "CHANGELOG.md"  # which names what was
}
BLOCKS = {
    f"{name}-{number}": block
    for name, text in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    if "import OpenAI" not in block  # which needs a server: `tests/test_serve.py` runs it
    and "tensor_parallel" not in block  # which needs two ranks: `tests/test_serve_ranks.py` does
}
FOLDERS = "csrc|mllama|mllama_kernels|tests|benchmarks|docs|tools"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS}|\.ci)/[\w./<>*-]*[\w>*/]")


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_blocks_run(library):
    """Each in a process that has imported no more than torch, or transformers where the block names it."""
    names_it = library == "transformers"
    blocks = {
        name: block for name, block in BLOCKS.items() if ("transformers" in block) == names_it
    }
    assert blocks
    ended = confined_cases(f"import {library}", blocks, seconds=300, mebibytes=16384)
    failed = {name: end.out for name, end in ended.items() if end.kind != "ok"}
    assert not failed, "\n".join(f"{name}:\n{out[-3000:]}" for name, out in failed.items())


def test_the_readme_invites():
    """Short, with three blocks that one reads at a glance."""
    assert len(README.encode()) <= 10_000
    blocks = [block.split("\n") for name, block in BLOCKS.items() if name.startswith("README")]
    lines = [sum(map(bool, block)) for block in blocks]
    assert len(lines) == 3 and max(lines) <= 10
    assert len(PAGES["csrc/README.md"].splitlines()) <= 80
    assert len(tree()) <= 10


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", PAGES[page], re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """`<op>` and such stand for any name."""
    for path in PATH.findall(PAGES[page]):
        pattern = re.sub(r"<\w+>", "*", path.rstrip("/"))
        assert next(ROOT.glob(pattern), None) is not None, path


def test_paths_are_found_in_the_text():
    found = PATH.findall("see `csrc/<op>.h`, csrc/cuda/common/launch.h; (tests/x.sh) and a/csrc/b")
    assert found == ["csrc/<op>.h", "csrc/cuda/common/launch.h", "tests/x.sh"]


def tree() -> list[str]:
    return README.split("## Tree")[1].split("```")[1].strip().splitlines()


def test_tree_names_what_is_there():
    for line in tree():
        for name in re.split(r",\s*", re.split(r"\s{2,}", line)[0]):
            assert (ROOT / name).exists(), name


def test_subcommands_are_listed():
    from mllama.cli import COMMANDS

    for name in COMMANDS:
        assert f"`mllama {name}" in README


def test_the_terminal_shows_a_real_run():
    drawn = (ROOT / "docs" / "demo.svg").read_text()
    assert "(docs/demo.svg)" in README
    events = terminal_svg.record(terminal_svg.SEED, terminal_svg.QUESTIONS)
    title = unescape(re.search(r"<title>(.*?)</title>", drawn, re.DOTALL)[1])
    assert "".join(text for text, *_ in events).startswith(title.rstrip("> "))
    words = [unescape(word) for word in re.findall(r">([^<>]+)</text>", drawn)]
    assert words[0] == "shapes.png" and "".join(words[1:]) == "".join(title.split())
