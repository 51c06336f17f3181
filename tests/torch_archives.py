"""Torch archives made by hand: every instruction of the pickle and every number of the zip file can lie."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any

import torch


class Stored:
    """A storage of a record, as `torch.save` refers to one."""

    def __init__(self, count: Any, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", count)


class Called:
    """What a pickle makes by calling a function that it names."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Stored) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol).dump(value)
    return data.getvalue()


def tensor(
    shape: Any,
    stride: Any,
    offset: Any = 0,
    storage: Any = None,
    hooks: Any = None,
    grad: Any = False,
) -> Called:
    storage = Stored(16) if storage is None else storage
    rebuild = torch._utils._rebuild_tensor_v2
    return Called(rebuild, storage, offset, shape, stride, grad, hooks)


def archive(
    content: Any, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> bytes:
    """A file with this pickle (or what is to be pickled) and these records, by default one of 64 bytes."""
    data = io.BytesIO()
    stream = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(data, "w", method) as file:
        file.writestr("archive/data.pkl", stream)
        file.writestr("archive/byteorder", b"little")
        for name, value in (records or {"data/0": bytes(64)}).items():
            file.writestr(f"archive/{name}", value)
        file.writestr("archive/version", b"3\n")
    return data.getvalue()


def entries(data: bytes) -> list[int]:
    """Where the entries of the directory begin."""
    places, place = [], data.find(b"PK\1\2")
    while place >= 0:
        places.append(place)
        place = data.find(b"PK\1\2", place + 4)
    return places


def patched(data: bytes, place: int, form: str, value: int) -> bytes:
    """The bytes with a number in another's place."""
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]
