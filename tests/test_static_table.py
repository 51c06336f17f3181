"""The committed table of static figures, and the rules it is held to. Needs neither nvcc nor a simulator."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.static import compiler, table
from benchmarks.static.compiler import Resources


@pytest.fixture
def document() -> dict:
    return json.loads(table.RESULTS.read_text())


def test_table_is_that_of_the_results(document):
    assert table.as_markdown(document) == table.TABLE.read_text()


def test_committed_results_keep_the_rules(document):
    assert table.failures(document["rows"], {}) == []


def test_each_broken_rule_is_named(document):
    row = copy.deepcopy(document["rows"][0])
    row["moved_to_expected"] = 1.2
    launch = row["launches"][0]
    assert row["arch"] == 80
    launch["shared_bytes"] = 99 * 1024 + 1
    launch["shared_wavefronts"], launch["shared_conflicts"] = 1000, 500
    moves, shared, conflicts = table.failures([row], {})
    assert "101377 bytes of shared memory, sm_86 and sm_89 have 101376" in shared
    assert row["op"] in moves and "moves 1.2 times" in moves
    assert "500 of 1000 shared wavefronts are conflicts" in conflicts
    (spills,) = table.failures([], {90: {"kernel": Resources(255, 8)}})
    assert spills == "sm_90a: kernel spills registers"


def test_differences_are_named(document):
    rows = document["rows"]
    assert table.differences(rows, copy.deepcopy(rows)) == []
    changed = copy.deepcopy(rows[:1])
    changed[0]["launches"][0]["sectors"] += 1
    (message,) = table.differences(rows, changed)
    assert rows[0]["op"] in message and "sectors" in message
    changed[0]["shape"] = "unheard of"
    (message,) = table.differences(rows, changed)
    assert "not in the committed table" in message


@pytest.mark.parametrize(
    "arch, threads, registers, shared_bytes, blocks",
    [
        (80, 256, 32, 0, 8),  # all 2048 threads
        (80, 128, 255, 0, 2),  # registers: 8192 per warp, 2 warps per partition
        (90, 128, 66, 0, 7),  # registers: 72 per thread
        (80, 128, 40, 80 * 1024, 2),  # shared memory: 164 KB
        (90, 128, 40, 80 * 1024, 2),  # shared memory: 228 KB, 1 KB reserved per block
        (90, 32, 16, 0, 32),  # blocks
    ],
)
def test_occupancy(arch, threads, registers, shared_bytes, blocks):
    assert compiler.blocks_per_sm(arch, threads, registers, shared_bytes) == blocks
