"""What a checkpoint is to the loader, whatever its files look like, and how its faults are reported."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mllama.files import FileRefused, read_text
from mllama.strict_json import parse_json
from mllama.wording import shown
from mllama_kernels.encodings import ENCODINGS

if TYPE_CHECKING:
    from mllama_kernels.quantized_tensor import QuantizedTensor

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
    """One parameter as its files announce it, before any data is read.

    Attributes:
        stored_name: what it is called there, of several tensors the one that names the parameter.
        shape: of the parameter; of a quantised weight the (N, K) that it decodes to.
        dtype: of what is read; None for a quantised weight, and for a stored type that no parameter can
            have (integers, 8-bit floats, ...).
        dtype_name: as the files call it.
        encoding: of a quantised weight, else None.
        packed_bytes: of a quantised weight's parts together.
        group: of int4, the columns that share a scale.
        is_decoded: whether it is stored quantised in a way that has no kernel, and decoded when it is read.
    """

    stored_name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str
    encoding: str | None = None
    packed_bytes: int = 0
    group: int = 0
    is_decoded: bool = False

    @property
    def nbytes(self) -> int:
        """What the parameter takes as it is read: 0 for a type that no parameter can have."""
        if self.encoding is not None:
            return self.packed_bytes
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)

    @property
    def unit(self) -> int:
        """Columns that are stored together: a part of the columns begins and ends with them."""
        block = 1 if self.encoding is None else ENCODINGS[self.encoding].block
        return max(self.group, block)


class Checkpoint(Protocol):
    """Parameters under canonical names (see `key_layout`), plain or quantised.

    `problems` are the faults of the files themselves; `unreadable` names tensors known to be in a
    file that cannot be read, so that they are not reported a second time as missing.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    problems: list[str]
    unreadable: set[str]

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
        """The named parameters on the CPU, one at a time, file by file; a `QuantizedTensor` where the
        `TensorInfo` has an encoding. At most one file stays mapped at a time."""
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
