"""The bytes of an image: from a path, a file, bytes, a data URI or bare base64.

Nothing is fetched from a network, and the disk is left alone where the caller says so. What a message shows
of a string is short, whatever its length, and never what is in a file.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from typing import Any, BinaryIO

from mllama.files import FileRefused, check_regular, read_regular
from mllama.limits import Limits
from mllama.processing.paths import AllowPaths, checked_path, may_exist
from mllama.wording import quoted, shown

_REMOTE = re.compile(r"(https?|ftp|s3|gs|hf)://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-=\s]+")
_FIRST_BYTES = re.compile(  # of the formats that are read
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF|BM|II\*\x00|MM\x00\*|\x00\x00\x01\x00|P[1-6Ff]\s|....ftyp",
    re.DOTALL,
)
_USUAL, _BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f"
_ESCAPES = {f"%{ord(c):02X}": c for c in "+/=-_ \t\r\n"}  # of a URL, for what base64 consists of
_ESCAPED = re.compile("|".join(_ESCAPES), re.IGNORECASE)
_SHORTEST = 32  # characters; no image of any format has a shorter base64
_SCHEME = 16  # characters in which a URL's kind is looked for
_LONGEST_HEADER = 256  # characters of a data URI before its comma
_LONGEST_PATH = 4096  # characters
_LONGEST_ADDRESS = 160  # characters of a URL that an error shows


class ImageOpenError(ValueError):
    """An image that cannot be used; the message names it and says why."""


def read_source(
    source: str | os.PathLike | bytes | BinaryIO,
    limits: Limits,
    allow_paths: AllowPaths,
    name: str,
) -> tuple[bytes, str]:
    """The bytes of an image, and what to call it.

    Args:
        limits: what decides is `max_bytes`, before anything is copied.
        allow_paths: see `mllama.processing.paths`.
        name: what to call one whose own name is not to be repeated.
    Raises: ImageOpenError for what is missing, too large, remote, not base64 or not allowed; TypeError for a
        source of another kind.
    """
    if isinstance(source, (bytes, bytearray)):
        check_bytes(len(source), "image bytes", limits)
        return bytes(source), "image bytes"
    if isinstance(source, str):
        return _read_string(source, limits, allow_paths, name)
    if isinstance(source, os.PathLike):
        return _read_path(source, limits, allow_paths, name), shown(os.fsdecode(source))
    if hasattr(source, "read"):
        name = f"image file {shown(str(getattr(source, 'name', None) or type(source).__name__))}"
        data = source.read(limits.max_bytes + 1)
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise TypeError(f"{name} must be opened in binary mode; read() gave {kind}")
        check_bytes(len(data), name, limits)
        return data, name
    kind = type(source).__name__
    raise TypeError(f"an image is a path, bytes, a binary file or a PIL image, got {kind}")


def check_bytes(count: int, name: str, limits: Limits) -> None:
    """Raises: ImageOpenError for more than `max_bytes`."""
    if count > limits.max_bytes:
        raise ImageOpenError(
            f"{name} has {count} bytes; at most {limits.max_bytes} are read (max_bytes)"
        )


def is_data_uri(text: str) -> bool:
    """Whether it is read as a data URI, be it a good one or not."""
    return text[:_SCHEME].lstrip().lower().startswith("data:")


def refuse_url(text: str) -> None:
    """Raises: ImageOpenError for the address of a file, on a network or here."""
    start = text[:_SCHEME].lstrip().lower()
    address = shown(text[:_LONGEST_ADDRESS]) + "..." * (len(text) > _LONGEST_ADDRESS)
    if _REMOTE.match(start):
        raise ImageOpenError(f"{address} is a URL; nothing is fetched: download it, pass a path")
    if start.startswith("file:"):
        raise ImageOpenError(f"{address} is a file:// URL; pass the path itself")


def names_file(source: Any) -> bool:
    """Whether it would be looked for on the disk, said without looking there."""
    if isinstance(source, str):
        is_short = len(source) <= _LONGEST_PATH
        return is_short and not is_data_uri(source) and not _looks_like_base64(source)
    return isinstance(source, os.PathLike)


def decode_base64(text: str | bytes | bytearray, name: str) -> bytes:
    """Bytes of base64 in the usual or the URL-safe alphabet, with or without line breaks and padding.

    It copies: see `check_bytes`.
    Raises: ImageOpenError.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
        data = data.translate(_USUAL, _BLANKS).rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        reason = "it has other characters" if isinstance(error, UnicodeError) else error
        raise ImageOpenError(
            f"{name} cannot be decoded, it is not valid base64: {reason}"
        ) from None


def _read_string(
    source: str, limits: Limits, allow_paths: AllowPaths, name: str
) -> tuple[bytes, str]:
    if len(source) > _LONGEST_PATH:  # before anything is copied or searched
        check_bytes((len(source) - _LONGEST_HEADER) * 3 // 4, "image base64", limits)
    if is_data_uri(source):
        return _read_data_uri(source.lstrip(), limits), "image data URI"
    refuse_url(source)
    if _looks_like_base64(source) and not may_exist(source, allow_paths):
        check_bytes(len(source) * 3 // 4, "image base64", limits)
        return decode_base64(source, "image base64"), "image base64"
    if len(source) > _LONGEST_PATH or "\n" in source:
        raise ImageOpenError(
            f"{shown(source)} is no path, and as base64 no image in a format that is read"
        )
    return _read_path(source, limits, allow_paths, name), shown(source)


def _read_path(
    path: str | os.PathLike, limits: Limits, allow_paths: AllowPaths, name: str
) -> bytes:
    try:
        allowed = checked_path(path, allow_paths)
    except FileRefused as error:
        raise ImageOpenError(f"{name} {error}") from None
    name = shown(os.fsdecode(path))
    try:
        check_bytes(check_regular(allowed), name, limits)
        return read_regular(allowed, limits.max_bytes)
    except FileRefused as error:
        raise ImageOpenError(f"{name} cannot be read: {error}") from None


def _read_data_uri(uri: str, limits: Limits) -> bytes:
    header, comma, _ = uri[:_LONGEST_HEADER].partition(",")
    lowered = header.lower()
    if not comma or not lowered.startswith("data:image/") or not lowered.endswith(";base64"):
        raise ImageOpenError(f"expected data:image/...;base64,..., got {quoted(header)}")
    payload = uri[len(header) + 1 :]
    check_bytes(len(payload) * 3 // 4, "image data URI", limits)
    if "%" in payload:  # urllib would make a list of the pieces: 9 GB of 50 MB that are all "%"
        payload = _ESCAPED.sub(lambda match: _ESCAPES[match[0].upper()], payload)
    return decode_base64(payload, "image data URI")


def _looks_like_base64(source: str) -> bool:
    """Whether all of it is base64, and of a file that starts as an image does."""
    beginning = "".join(source[: 4 * _SHORTEST].split())[:_SHORTEST]
    if len(source) < _SHORTEST or not _BASE64.fullmatch(beginning):
        return False
    try:
        data = decode_base64(beginning, "image base64")
    except ImageOpenError:
        return False
    return _FIRST_BYTES.match(data) is not None and _BASE64.fullmatch(source) is not None
