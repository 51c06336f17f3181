"""The records of a torch archive (a `.pth` file): a zip file as `torch.save` writes it, and no other kind.

A zip file says most things twice, and readers differ in whom they believe. Here everything must agree: one
directory at the end, records that are stored as they are, without overlaps, under one folder and each name
once. So what is checked is what torch finds, and no record is larger than it is in the file.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from mllama.wording import shown

# The 90B model's files have 1,700 tensors, and a record for each.
_MAX_RECORDS = 50_000
_MAX_NAME = 256  # bytes
_MAX_DIRECTORY = _MAX_RECORDS * 256  # bytes
_NAME = re.compile(rb"[\w.\-/ ]+")
_FILE = struct.Struct("<4sHHHHHIIIHH")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_SATURATED16, _SATURATED32 = 0xFFFF, 0xFFFFFFFF


class BadArchive(ValueError):
    """A file that is no torch archive that can be read. The message is only the reason."""


@dataclass(frozen=True)
class Record:
    """Where the bytes of a record are in the file, and their checksum."""

    start: int
    size: int
    crc: int


def read_records(file: BinaryIO) -> dict[str, Record]:
    """The records of an archive by their names, without the folder that all of them are in.

    Raises: BadArchive.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 4 or _at(file, 0, 4) != b"PK\3\4":
        raise BadArchive("it is no zip archive, as torch writes since 1.6")
    directory, count, length = _directory(file, size)
    entries = _at(file, directory, length)
    records: dict[str, Record] = {}
    extents: list[tuple[int, int]] = []
    place = 0
    for _ in range(count):
        name, header, record_size, crc, place = _entry(entries, place)
        record = Record(_data_start(file, header, name, directory), record_size, crc)
        if record.start + record_size > directory:
            raise BadArchive(f"its record {_shown_name(name)} ends after the records")
        extents.append((header, record.start + record_size))
        records[name.decode("ascii")] = record
    if place != length:
        raise BadArchive("its directory has another length than it says")
    if len({name.lower() for name in records}) != count:  # torch finds names in any case
        raise BadArchive("two of its records have the same name")
    extents.sort()
    if any(end > begin for (_, end), (begin, _) in zip(extents, extents[1:])):
        raise BadArchive("its records overlap")
    return _without_folder(records)


def read_record(file: BinaryIO, record: Record, most: int) -> bytes:
    """The bytes of a record. Raises: BadArchive for more than ``most``, and where the checksum differs."""
    if record.size > most:
        raise BadArchive(f"a record of {record.size:,} bytes; at most {most:,} are read")
    data = _at(file, record.start, record.size)
    if zlib.crc32(data) != record.crc:
        raise BadArchive("a record has another checksum than was written")
    return data


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    try:
        file.seek(place)
        data = file.read(count)
    except (OSError, OverflowError) as error:
        raise BadArchive(f"it cannot be read: {error}") from None
    if len(data) != count:
        raise BadArchive("it ends too early")
    return data


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory begins, the number of its entries, and its length."""
    end = size - _END.size
    if end < 0:
        raise BadArchive("it ends too early")
    signature, *disks, here, count, length, start, comment = _END.unpack(_at(file, end, _END.size))
    if signature != b"PK\5\6" or comment or disks != [0, 0] or here != count:
        raise BadArchive("its end is not that of one zip archive")
    # torch writes the larger form always, and the smaller one's numbers where they fit.
    locator = end - _LOCATOR.size
    if locator >= 0 and _at(file, locator, 4) == b"PK\6\7":
        _, disk, end, disks = _LOCATOR.unpack(_at(file, locator, _LOCATOR.size))
        if end + _END64.size != locator or disk or disks not in (0, 1):
            raise BadArchive("its end is not that of one zip archive")
        signature, rest, _, _, *disks, here, count64, length64, start64 = _END64.unpack(
            _at(file, end, _END64.size)
        )
        if signature != b"PK\6\6" or rest != _END64.size - 12 or disks != [0, 0] or here != count64:
            raise BadArchive("its end is not that of one zip archive")
        for small, large, saturated in (
            (count, count64, _SATURATED16),
            (length, length64, _SATURATED32),
            (start, start64, _SATURATED32),
        ):
            if small not in (large, saturated):
                raise BadArchive("the two ends of its directory differ")
        count, length, start = count64, length64, start64
    if count > _MAX_RECORDS:
        raise BadArchive(f"it has {count:,} records; at most {_MAX_RECORDS:,} are read")
    if length > _MAX_DIRECTORY:
        raise BadArchive(f"its directory has {length:,} bytes, at most {_MAX_DIRECTORY:,} are read")
    if start + length != end:
        raise BadArchive("its directory is not where it says")
    return start, count, length


def _entry(entries: bytes, place: int) -> tuple[bytes, int, int, int, int]:
    """An entry of the directory: name, place of the record's header, size, checksum; and the next's place."""
    if place + _ENTRY.size > len(entries):
        raise BadArchive("its directory ends too early")
    fields = _ENTRY.unpack_from(entries, place)
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_length, extra_length, comment, disk, _, _, header = fields[10:]
    place += _ENTRY.size
    name = entries[place : place + name_length]
    place += name_length
    extra = entries[place : place + extra_length]
    place += extra_length + comment
    if signature != b"PK\1\2" or place > len(entries) or disk:
        raise BadArchive("its directory is damaged")
    if not 0 < name_length <= _MAX_NAME or not _NAME.fullmatch(name):
        raise BadArchive("its directory has a name that torch does not write")
    if flags & _ENCRYPTED:
        raise BadArchive(f"its record {_shown_name(name)} is encrypted")
    if method != 0:
        raise BadArchive(f"its record {_shown_name(name)} is compressed, as torch never writes one")
    size, packed, header = _wide(extra, size, packed, header)
    if size != packed:
        raise BadArchive(f"its record {_shown_name(name)} has two sizes")
    return name, header, size, crc, place


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values with those taken from the zip64 field that do not fit into 32 bits."""
    wide, place = b"", 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            if wide:
                raise BadArchive("its directory is damaged")
            wide = extra[place + 4 : place + 4 + length]
        place += 4 + length
    result, place = [], 0
    for value in values:
        if value == _SATURATED32:
            if place + 8 > len(wide):
                raise BadArchive("its directory lacks a size of more than 32 bits")
            (value,) = struct.unpack_from("<Q", wide, place)
            place += 8
        result.append(value)
    return result


def _data_start(file: BinaryIO, header: int, name: bytes, directory: int) -> int:
    """Where a record's bytes begin, after a header of its own that must be of the same record."""
    if header + _FILE.size > directory:
        raise BadArchive(f"its record {_shown_name(name)} begins after the records")
    signature, _, flags, method, *_, length, extra = _FILE.unpack(_at(file, header, _FILE.size))
    if signature != b"PK\3\4" or flags & _ENCRYPTED or method or length != len(name):
        raise BadArchive(f"the header of its record {_shown_name(name)} is of another one")
    if _at(file, header + _FILE.size, length) != name:
        raise BadArchive(f"the header of its record {_shown_name(name)} is of another one")
    return header + _FILE.size + length + extra


def _without_folder(records: dict[str, Record]) -> dict[str, Record]:
    folders = {name.partition("/")[0] for name in records if "/" in name}
    if len(folders) != 1 or not all("/" in name for name in records):
        raise BadArchive("its records are not in one folder, as torch puts them")
    return {name.partition("/")[2]: record for name, record in records.items()}


def _shown_name(name: bytes) -> str:
    return shown(name.decode("ascii", "replace"))
