"""A GGUF file: its header is read when it is opened, and data when it is asked for.

Neither is mapped: a file that is cut meanwhile is an error, where a mapping ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mllama.checkpoints.gguf.header import (
    MAGIC,
    BadHeader,
    GgufArray,
    GgufTensor,
    read_header,
)
from mllama.files import FileRefused, open_regular
from mllama.wording import shown


class BadGguf(ValueError):
    """A file cannot be read as GGUF; the text says why and names it."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do; those of Ollama have no ending."""
    try:
        with open_regular(path.expanduser()) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (FileRefused, OSError):
        return False


class GgufFile:
    """A file whose header has been checked as a whole.

    Attributes:
        name: of the file, for errors.
        metadata: numbers, bools and strings by key; of arrays only where they are, see :meth:`array`.
        tensors: by name.
    Raises: BadGguf for a file that is missing, no regular one, or whose header cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.name, self._size = path.expanduser(), shown(path.name), -1
        with self._opened() as file:
            self._size = os.fstat(file.fileno()).st_size
            try:
                self.metadata, self.tensors = read_header(file, self._size)
            except BadHeader as error:
                raise BadGguf(f"{self.name} cannot be read: {error}") from None

    def array(self, key: str) -> list[Any]:
        """The elements of an array of the metadata; of a key that is not there, none.

        Raises: BadGguf for an entry that is no array, text that is no UTF-8, and a file that is no longer the
            one whose header was read.
        """
        entry = self.metadata.get(key, [])
        if isinstance(entry, list):
            return entry
        if not isinstance(entry, GgufArray):
            raise BadGguf(f"{self.name}: {shown(key)} must be an array, got {shown(repr(entry))}")
        with self._opened() as file:
            file.seek(entry.begin)
            data = file.read(entry.end - entry.begin)
        try:
            return entry.decoded(data)
        except BadHeader as error:
            raise BadGguf(
                f"{self.name} was changed while it was loaded: of {shown(key)} {error}"
            ) from None
        except UnicodeDecodeError:
            raise BadGguf(f"{self.name}: {shown(key)} holds text that is no UTF-8") from None

    def read(self, tensor: GgufTensor) -> Tensor:
        """The bytes of a tensor, uint8 on the CPU, in memory of their own.

        Raises: BadGguf for a file that is no longer the one whose header was read.
        """
        data = torch.empty(tensor.nbytes, dtype=torch.uint8, device="cpu")
        with self._opened() as file:
            file.seek(tensor.begin)
            found = file.readinto(data.numpy())
        if found != tensor.nbytes:
            raise BadGguf(
                f"{self.name} was cut while it was loaded: of {shown(tensor.name)} {found:,} bytes are "
                f"there, expected {tensor.nbytes:,}"
            )
        return data

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with open_regular(self._path) as file:
                if self._size not in (-1, os.fstat(file.fileno()).st_size):
                    raise BadGguf(f"{self.name} was changed while it was loaded")
                yield file
        except FileRefused as error:
            raise BadGguf(f"{self.name} cannot be read: {error}") from None
        except OSError as error:
            raise BadGguf(f"{self.name} cannot be read: {error.strerror}") from None
