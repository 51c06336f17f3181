"""What a checkpoint is to the loader, whatever its files look like, and how its faults are told."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. `problems` holds one line per fault; the message lists all."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"the checkpoint in {folder} cannot be loaded, {count}:{lines}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file announces it, before any data is read.

    `dtype` is None for a stored type that no parameter can have (integers, 8-bit floats, ...).
    """

    stored_name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str

    @property
    def nbytes(self) -> int:
        """Stored bytes of a floating-point tensor, 0 for other types."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


class Checkpoint(Protocol):
    """Tensors under canonical names (see `key_layout`).

    `problems` are the faults of the files themselves; `unreadable` names tensors known to be in a
    file that cannot be read, so that they are not reported a second time as missing.
    """

    tensors: dict[str, TensorInfo]
    problems: list[str]
    unreadable: set[str]

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors on the CPU, file by file; at most one file stays mapped at a time."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a `CheckpointError` that names the file when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path.parent, [f"{path.name} is not readable JSON: {error}"]) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(path.parent, [f"{path.name} must hold a JSON object, got {kind}"])
    return value
