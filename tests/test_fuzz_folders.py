"""The fuzz of folders: it finds what it looks for, and nothing at all in the readers."""

from __future__ import annotations

from pathlib import Path

import fuzz_folders
import pytest
import torch
from confinement import confined

TESTS = Path(__file__).parent
SECONDS = 10
RUN = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import fuzz_folders

assert fuzz_folders.main() == 0
"""


def test_folders_survive(request):
    """On the build at hand; tests/run_fuzz.sh has one with sanitizers."""
    seed = request.config.getoption("--seed")
    ended = confined(RUN, TESTS, f"--seconds={SECONDS}", f"--seed={seed}", seconds=30 * SECONDS)
    assert ended.kind == "ok", ended.out[-3000:] + ended.err[-3000:]
    assert "read " in ended.out and "finding 0" in ended.out


@pytest.mark.parametrize("fault", ["another error", "another weight"])
@pytest.mark.parametrize("kind", ["w4a16", "our q4_k"])
def test_faults_are_found(tmp_path, monkeypatch, kind, fault):
    folder = fuzz_folders.Folder.of(kind, tmp_path)
    right = fuzz_folders.read

    def wrong(path: Path) -> dict[str, torch.Tensor]:
        weights = right(path)
        if fault == "another error":
            raise IndexError
        return {name: weight + 1 for name, weight in weights.items()}

    assert not any(fuzz_folders.finding(folder, 1, case)[1] for case in range(30))
    monkeypatch.setattr(fuzz_folders, "read", wrong)
    assert sum(bool(fuzz_folders.finding(folder, 1, case)[1]) for case in range(30)) >= 3
