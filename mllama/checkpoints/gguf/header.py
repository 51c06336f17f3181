"""The header of a GGUF file, read a part at a time; no length in it is used before it is compared with the
file.

Numbers and strings of the metadata are kept. Arrays, of which a vocabulary has some megabytes, are passed
over with the length of every element checked, and decoded when they are asked for. Tensors must lie one after
the other, as ggml demands: what an offset could be is known before it is read.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from mllama.checkpoints.gguf.types import TYPES, GgmlType
from mllama.wording import quoted, shown

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The 90B model has 1,700 tensors, 60 entries and a header of 11 MB, of which 10 are the vocabulary.
_MAX_HEADER_BYTES = 256 * 2**20
_AT_ONCE = 2**20  # bytes of it that are read together
_MAX_TENSORS, _MAX_ENTRIES, _MAX_ELEMENTS = 50_000, 10_000, 2**22
_MAX_NAME, _MAX_TEXT = 512, 4 * 2**20  # bytes; the longest text is a chat template
_MAX_DIMENSIONS = 4  # ggml's own
_LARGEST = 2**63 - 1
_ALIGNMENTS = [2**n for n in range(3, 21)]
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class BadHeader(ValueError):
    """The header cannot be used; the text says why, and the caller names the file."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header announces it.

    Attributes:
        shape: in torch's order; ggml writes the reverse.
        begin, nbytes: where its data lies in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata that has not been decoded: where its elements lie in the file."""

    kind: int
    count: int
    begin: int
    end: int

    def decoded(self, data: bytes) -> list[bool] | list[int] | list[float] | list[str]:
        """The elements, of the bytes from `begin` to `end`.

        Raises: UnicodeDecodeError; BadHeader for bytes that are not those that were passed over.
        """
        view = memoryview(data)
        if len(view) != self.end - self.begin:
            raise BadHeader(f"{len(view):,} bytes are there, expected {self.end - self.begin:,}")
        if self.kind == _BOOL:
            return [bool(byte) for byte in view]
        if self.kind != _STRING:
            return list(struct.unpack(f"<{self.count}{_NUMBERS[self.kind]}", view))
        at, texts = 0, []
        for _ in range(self.count):
            length = int.from_bytes(view[at : at + 8], "little")
            if at + 8 + length > len(view):
                raise BadHeader("its strings have other lengths than before")
            texts.append(str(view[at + 8 : at + 8 + length], "utf-8"))
            at += 8 + length
        return texts


Entry = bool | int | float | str | GgufArray


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, GgufTensor]]:
    """The metadata and the tensors of a file.

    Args:
        size: of the file in bytes.
    Raises: BadHeader, also for a file that has become shorter; OSError.
    """
    cursor = _Cursor(file, size)
    if cursor.take(4) != MAGIC:
        raise BadHeader("it is no GGUF file: it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            raise BadHeader("it is big-endian; only little-endian files are read")
        raise BadHeader(f"it has GGUF version {version}; 2 and 3 are read")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    for count, most, what in (
        (tensors, _MAX_TENSORS, "tensors"),
        (entries, _MAX_ENTRIES, "entries"),
    ):
        if count > most:
            raise BadHeader(f"it announces {count:,} {what}; at most {most:,} are read")
    metadata: dict[str, Entry] = {}
    for _ in range(entries):
        key = cursor.text(_MAX_NAME, "a key")
        if key in metadata:
            raise BadHeader(f"it has the entry {shown(key)} twice")
        metadata[key] = cursor.entry(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise BadHeader(
            f"general.alignment is {quoted(alignment)}, expected a power of two from 8 to 2^20"
        )
    infos = [cursor.tensor() for _ in range(tensors)]
    return metadata, _placed(infos, _aligned(cursor.at, alignment), alignment, size)


def _placed(
    infos: list[tuple[str, tuple[int, ...], GgmlType, int]], start: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """The tensors where they must lie. Raises: BadHeader for another offset, or one beyond the file."""
    placed: dict[str, GgufTensor] = {}
    end = 0
    for name, shape, kind, offset in infos:
        if name in placed:
            raise BadHeader(f"it lists the tensor {shown(name)} twice")
        if offset != end:
            raise BadHeader(
                f"the data of {shown(name)} is said to begin at {offset:,}, expected {end:,}: tensors lie "
                "one after the other"
            )
        nbytes = math.prod(shape) // kind.block * kind.nbytes
        if start + offset + nbytes > size:
            last = start + offset + nbytes
            raise BadHeader(
                f"it is truncated: {shown(name)} ends at byte {last:,}, the file has {size:,}"
            )
        placed[name] = GgufTensor(name, shape, kind, start + offset, nbytes)
        end = _aligned(offset + nbytes, alignment)
    return placed


def _aligned(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


class _Cursor:
    """Reads on in the header, never beyond it.

    The file is read and not mapped: one that is cut meanwhile is an error, where a mapping ends the process.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._end = file, size, min(size, _MAX_HEADER_BYTES)
        self._buffer, self._begin = b"", 0  # what has been read, and where it lies
        self.at = 0

    def take(self, count: int) -> bytes:
        self._fill(count)
        start = self.at - self._begin
        self.at += count
        return self._buffer[start : start + count]

    def _fill(self, count: int) -> None:
        """Have the next bytes in the buffer."""
        self._require(count)
        if self.at + count <= self._begin + len(self._buffer):
            return
        self._file.seek(self.at)
        self._buffer = self._file.read(min(max(count, _AT_ONCE), self._end - self.at))
        self._begin = self.at
        if len(self._buffer) < count:
            left = self._file.seek(0, os.SEEK_END)
            raise BadHeader(
                f"it was cut while it was read: {left:,} of its {self._size:,} bytes are left"
            )

    def _require(self, count: int) -> None:
        if count <= self._end - self.at:
            return
        if self._size > self._end:
            raise BadHeader(f"its header has more than {self._end:,} bytes")
        raise BadHeader(
            f"it is truncated: its {self._size:,} bytes do not hold the header that they announce"
        )

    def number(self, code: str) -> int | float:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def text(self, most: int, what: str) -> str:
        length = self.number("Q")
        if length > most:
            raise BadHeader(f"{what} has {length:,} bytes; at most {most:,} are read")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise BadHeader(f"{what} is no UTF-8 text at byte {error.start}") from None

    def entry(self, key: str) -> Entry:
        kind = self.number("I")
        if kind == _STRING:
            return self.text(_MAX_TEXT, f"the entry {shown(key)}")
        if kind == _ARRAY:
            return self._array(key)
        if kind == _BOOL:
            return self.number("B") != 0
        if kind not in _NUMBERS:
            raise BadHeader(f"the entry {shown(key)} has the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, key: str) -> GgufArray:
        kind, count = self.number("I"), self.number("Q")
        where = f"the entry {shown(key)}"
        if kind not in (_BOOL, _STRING, *_NUMBERS):
            what = (
                "is an array of arrays, which is not read" if kind == _ARRAY else f"has type {kind}"
            )
            raise BadHeader(f"{where} {what}")
        if count > _MAX_ELEMENTS:
            raise BadHeader(f"{where} has {count:,} elements; at most {_MAX_ELEMENTS:,} are read")
        begin = self.at
        if kind == _STRING:
            self._pass_texts(count)
        else:
            length = count * struct.calcsize("<" + _NUMBERS.get(kind, "B"))
            self._require(length)
            self.at += length
        return GgufArray(kind, count, begin, self.at)

    def _pass_texts(self, count: int) -> None:
        # A vocabulary has 400,000 of them: this loop is most of the time that a header takes.
        length = struct.Struct("<Q").unpack_from
        buffer, begin, at = self._buffer, self._begin, self.at
        last = begin + len(buffer) - 8
        for _ in range(count):
            if at > last:
                self.at = at
                self._fill(8)
                buffer, begin = self._buffer, self._begin
                last = begin + len(buffer) - 8
            at += 8 + length(buffer, at - begin)[0]
        self._require(at - self.at)
        self.at = at

    def tensor(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        """Name, shape, type and offset."""
        name = self.text(_MAX_NAME, "a tensor's name")
        where = f"the tensor {shown(name)}"
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise BadHeader(
                f"{where} has {dimensions:,} dimensions, expected 1 to {_MAX_DIMENSIONS}"
            )
        sizes = [self.number("Q") for _ in range(dimensions)]
        number, offset = self.number("I"), self.number("Q")
        if not all(sizes) or math.prod(sizes) > _LARGEST // 8:
            raise BadHeader(f"{where} has the impossible shape {quoted(sizes[::-1])}")
        if number not in TYPES:
            raise BadHeader(f"{where} has the unknown type {number}")
        kind = TYPES[number]
        if sizes[0] % kind.block:
            raise BadHeader(
                f"{where} has rows of {sizes[0]:,}, which are no whole blocks of {kind.block} ({kind.name})"
            )
        return name, tuple(sizes[::-1]), kind, offset
