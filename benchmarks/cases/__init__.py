"""One module per op, found by its name: ``cases(setting)`` yields the op's rows, our implementation first."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import mllama_kernels
from benchmarks.case import Case, Setting

OPS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def missing(op: str) -> str | None:
    """Why an op cannot be measured, if it cannot."""
    return None if hasattr(mllama_kernels, op) else f"mllama_kernels has no op {op}"


def cases(op: str, setting: Setting) -> Iterator[Case]:
    return importlib.import_module(f"benchmarks.cases.{op}").cases(setting)
