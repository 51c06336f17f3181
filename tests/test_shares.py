"""Which cases of a test with `share` run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import shares
def pytest_addoption(parser):
    parser.addoption("--seed", type=int)
def pytest_configure(config):
    config.addinivalue_line("markers", "share(n):")
    config.addinivalue_line("markers", "full:")
def pytest_collection_modifyitems(config, items):
    shares.mark_the_others(items, config.getoption("--seed"))
"""
# 84 cases of a product, 12 of pairs whose second values repeat, and 6 of which half are full by themselves.
TESTS = """
import pytest
@pytest.mark.share(3)
@pytest.mark.parametrize("dtype", ["a", "b", "c"])
@pytest.mark.parametrize("shape", [(n, 1) for n in range(7)])
@pytest.mark.parametrize("fusion", [0, 1, 2, 3])
def test_product(dtype, shape, fusion): pass
@pytest.mark.share(100)
@pytest.mark.parametrize("family, path", [(f, p) for f in "xy" for p in "vwz"])
@pytest.mark.parametrize("touch", [print, len])
def test_pairs(family, path, touch): pass
@pytest.mark.share(3)
@pytest.mark.parametrize("kind", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_marked(kind, rows): pass
"""


@pytest.fixture
def collect(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those that are installed take seconds

    def found(seed: int, markers: str, **variables: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--seed={seed}"]
        done = subprocess.run(
            [*command, "-m", markers, "test_it.py"],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
        )
        return set(re.findall(r"::(.+)", done.stdout))

    return found


def test_a_share_has_every_value(collect):
    some, rest = collect(1, "not full"), collect(1, "full")
    assert not some & rest and len(some | rest) == 84 + 12 + 6
    product, pairs, marked = (
        [name[len(test) + 1 : -1].split("-") for name in some if name.startswith(test)]
        for test in ("test_product", "test_pairs", "test_marked")
    )
    assert len(product) == 28
    assert [len(set(values)) for values in zip(*product)] == [4, 7, 3]
    assert {tuple(pair) for _, *pair in pairs} == {(f, p) for f in "xy" for p in "vwz"}
    assert len(pairs) < 12 and {touch for touch, *_ in pairs} == {"print", "len"}
    assert len(marked) == 3 and all(kind == "1" for _, kind in marked)


def test_seeds_and_devices_have_their_own(collect):
    shares = [collect(1, "not full"), collect(2, "not full")]
    shares.append(collect(1, "not full", CUDASIM_ARCH="80"))
    assert collect(1, "not full") == shares[0]
    assert len({frozenset(share) for share in shares}) == 3
