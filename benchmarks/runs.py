"""The committed result files, and which of them count."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("ops", "model", "training")


def committed(folder: Path = RESULTS) -> list[Path]:
    """The result files that git knows; all where there is no git. One's own runs stay out."""
    try:
        answer = subprocess.run(
            ["git", "ls-files", "*.json"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return sorted(folder.glob("*.json"))
    return sorted(folder / name for name in answer.stdout.split())


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The runs, oldest first, each with its ``file``."""
    early = {"training": []}  # older files have no such part
    runs = [early | json.loads(path.read_text()) | {"file": path.name} for path in paths]
    return sorted(runs, key=lambda run: run["started"])


def newest(runs: list[dict[str, Any]], kind: str, part: str) -> dict[str, Any] | None:
    """The latest run on a kind of device that has all of a part: rows of two runs are never mixed.

    One that was kept to fewer instructions than its CPU has has only its own table.
    """
    fits = [run for run in runs if run["machine"]["kind"] == kind and part in run["parts"]]
    fits = [run for run in fits if not run["machine"].get("kept_to")]
    return fits[-1] if fits else None


def superseded(runs: list[dict[str, Any]]) -> list[str]:
    """The files of which later runs on the same machine, with the same instructions, have all parts."""
    names = []
    for number, run in enumerate(runs):
        later = [other for other in runs[number + 1 :] if _place(other) == _place(run)]
        if later and set(run["parts"]) <= {part for other in later for part in other["parts"]}:
            names.append(run["file"])
    return names


def _place(run: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kind", "gpu", "cpu", "cpu_capability", "kept_to")
    return tuple(run["machine"].get(name) or None for name in names)
