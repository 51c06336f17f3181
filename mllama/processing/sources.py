"""The bytes of a picture: from a path, a file, bytes, a data URI or bare base64.

Nothing is fetched from a network. What a message shows of a string is short, whatever its length.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

_REMOTE = re.compile(r"(https?|ftp|s3|gs|hf)://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-=\s]+")
_FIRST_BYTES = re.compile(  # of the formats that are read
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF|BM|II\*\x00|MM\x00\*|\x00\x00\x01\x00|P[1-6Ff]\s|....ftyp",
    re.DOTALL,
)
_SHORTEST = 32  # characters; no picture of any format has a shorter base64
_LONGEST_SHOWN, _BEGINNING = 240, 60


class ImageOpenError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


def shown(text: str) -> str:
    """The text, or its beginning and length where it is long."""
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_BEGINNING]!r}... ({len(text)} characters)"


def read_source(source: str | os.PathLike | bytes | BinaryIO, max_bytes: int) -> tuple[bytes, str]:
    """The bytes of a picture, and what to call it.

    Raises: ImageOpenError for what is missing, too large, remote or not base64; TypeError for a source of
        another kind.
    """
    if isinstance(source, (bytes, bytearray)):
        check_bytes(len(source), "image bytes", max_bytes)
        return bytes(source), "image bytes"
    if isinstance(source, str):
        return _read_string(source, max_bytes)
    if isinstance(source, os.PathLike):
        return _read_path(Path(source), max_bytes), shown(str(source))
    if hasattr(source, "read"):
        name = f"image file {getattr(source, 'name', None) or type(source).__name__}"
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise TypeError(f"{name} must be opened in binary mode; read() gave {kind}")
        check_bytes(len(data), name, max_bytes)
        return data, name
    kind = type(source).__name__
    raise TypeError(f"an image is a path, bytes, a binary file or a PIL image, got {kind}")


def check_bytes(count: int, name: str, max_bytes: int) -> None:
    """Raises: ImageOpenError for more than `max_bytes`."""
    if count > max_bytes:
        raise ImageOpenError(f"{name} has {count} bytes; at most {max_bytes} are read (max_bytes)")


def decode_base64(text: str | bytes, name: str) -> bytes:
    """Bytes of base64 in the usual or the URL-safe alphabet, with or without line breaks and padding.

    Raises: ImageOpenError.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else bytes(text)
        data = b"".join(data.split()).rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        reason = "it has other characters" if isinstance(error, UnicodeError) else error
        raise ImageOpenError(
            f"{name} cannot be decoded, it is not valid base64: {reason}"
        ) from None


def _read_string(source: str, max_bytes: int) -> tuple[bytes, str]:
    start = source[:16].lstrip().lower()
    if _REMOTE.match(start):
        raise ImageOpenError(
            f"{shown(source)} is a URL; nothing is fetched: download it, pass a path"
        )
    if start.startswith("file:"):
        raise ImageOpenError(f"{shown(source)} is a file:// URL; pass the path itself")
    if start.startswith("data:"):
        return _read_data_uri(source.lstrip(), max_bytes), "image data URI"
    data = _bare_base64(source, max_bytes)
    if data is not None:
        return data, "image base64"
    if len(source) > 4096 or "\n" in source:  # longer than any path
        raise ImageOpenError(
            f"{shown(source)} is no path, and as base64 no picture in a format that is read"
        )
    return _read_path(Path(source), max_bytes), shown(source)


def _read_path(path: Path, max_bytes: int) -> bytes:
    name = shown(str(path))
    try:
        status = path.stat()  # before opening: opening a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ImageOpenError(f"{name} is not a regular file")
        check_bytes(status.st_size, name, max_bytes)
        with open(path, "rb") as file:
            return file.read(max_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageOpenError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageOpenError(f"{name} cannot be read: {reason}") from None


def _read_data_uri(uri: str, max_bytes: int) -> bytes:
    header, _, payload = uri.partition(",")
    lowered = header.lower()
    if not lowered.startswith("data:image/") or not lowered.endswith(";base64"):
        raise ImageOpenError(f"expected data:image/...;base64,..., got {shown(header)!r}")
    check_bytes(len(payload) * 3 // 4, "image data URI", max_bytes)
    encoded: Any = unquote_to_bytes(payload) if "%" in payload else payload
    return decode_base64(encoded, "image data URI")


def _bare_base64(source: str, max_bytes: int) -> bytes | None:
    """The bytes if the string is base64 of a picture and not the name of a file."""
    if len(source) < _SHORTEST or not _BASE64.fullmatch(source):
        return None
    try:
        if os.path.exists(source):
            return None
    except ValueError:  # what no file can be called
        pass
    check_bytes(len(source) * 3 // 4, "image base64", max_bytes)
    try:
        data = decode_base64(source, "image base64")
    except ImageOpenError:
        return None
    return data if _FIRST_BYTES.match(data) else None
