"""What a checkpoint is to the loader, whatever its files look like, and how its faults are reported."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mllama.files import FileRefused, read_text
from mllama.strict_json import parse_json
from mllama.wording import shown

# Published ones have at most 60 kB (a tokenizer_config.json with 256 special tokens).
MAX_CONFIG_BYTES = 4 * 2**20
_LISTED = 500  # faults in one message: those of a model whose every tensor is called otherwise


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded. `problems` holds one line per fault; the message lists them, and counts
    those beyond some hundreds."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        lines = "".join(f"\n  - {problem}" for problem in problems[:_LISTED])
        if len(problems) > _LISTED:
            lines += f"\n  - and {len(problems) - _LISTED} more"
        where = shown(str(folder))
        super().__init__(f"the checkpoint in {where} cannot be loaded, {count}:{lines}")


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


class OwnFiles:
    """Tells of two names of one file: a checkpoint has none, and a thousand links would be read as often."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], str] = {}

    def fault(self, path: Path) -> str | None:
        """What is wrong with a file of the checkpoint after the others; None also where it is missing."""
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        first = self._seen.setdefault((status.st_dev, status.st_ino), path.name)
        if first == path.name or not status.st_ino:
            return None
        return f"{shown(path.name)} and {shown(first)} are one file"


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file; a `CheckpointError` that names the file when there is none."""
    name = shown(path.name)
    try:
        value = parse_json(read_text(path, max_bytes), constants=True)
    except FileRefused as error:
        raise CheckpointError(path.parent, [f"{name} cannot be read: {error}"]) from None
    except ValueError as error:
        raise CheckpointError(path.parent, [f"{name} is not readable JSON: {error}"]) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(path.parent, [f"{name} must hold a JSON object, got {kind}"])
    return value
