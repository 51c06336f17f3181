"""Files that are either there as a whole or not at all, whenever the machine stops."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mllama.wording import reason, shown


def flush(path: Path) -> None:
    """Put a file's content (or a folder's renames) on the disk before anything relies on it."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, marked as torch's. Raises: OSError naming it, as for a full disk."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{shown(str(path))} could not be written: {reason(error)}") from None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Put what ``write(temporary)`` writes in the place of ``path``, on the disk, in one moment."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)
