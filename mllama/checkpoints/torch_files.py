"""Files that `torch.save` wrote: what is in them, and their tensors, without running what a pickle says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mllama.checkpoints.torch_pickle import MAX_PICKLE_BYTES, NotWeights, read_pickle
from mllama.checkpoints.torch_records import BadArchive, read_record, read_records
from mllama.files import FileRefused, open_regular
from mllama.wording import reason, shown


class BadTorchFile(ValueError):
    """A file that cannot be used; the text says why and names it."""


def outline(path: Path) -> Any:
    """The content of a file with a `StoredTensor` for every tensor. No data is read, none is mapped.

    Raises: BadTorchFile for a file that is no archive of tensors and plain containers, or is beyond bounds.
    """
    name = shown(path.name)
    try:
        with open_regular(path) as file:
            records = read_records(file)
            if "data.pkl" not in records:
                raise BadArchive("it has no record data.pkl")
            order = records.get("byteorder")
            if order is not None and read_record(file, order, 16) != b"little":
                raise BadArchive("its numbers are not little-endian")
            pickle = read_record(file, records["data.pkl"], MAX_PICKLE_BYTES)
        return read_pickle(pickle, records)
    except NotWeights as error:
        raise BadTorchFile(f"{name} is refused, it holds more than weights: {error}") from None
    except BadArchive as error:
        raise BadTorchFile(f"{name} is truncated or not a torch archive: {error}") from None
    except FileRefused as error:
        raise BadTorchFile(f"{name} cannot be read: {error}") from None


def load(path: Path) -> Any:
    """The content of a file; tensors are on the CPU and mapped, not read.

    A file that is cut while it is mapped ends the process, as a mapping does.
    Raises: BadTorchFile as `outline`.
    """
    outline(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what torch finds beyond that, or somebody who writes to the file
        raise BadTorchFile(
            f"{shown(path.name)} is truncated or not a torch archive: {reason(error)}"
        ) from None
