"""What must be known of a file before Pillow opens it, for formats that it decodes while or slowly."""

from __future__ import annotations

import re
import struct

from mllama.processing.sources import ImageOpenError

_ICON = b"\0\0\1\0"
_NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])+(\d+)"
_PPM = re.compile(rb"P([1-6])" + _NUMBER + _NUMBER + rb"(?:" + _NUMBER + rb")?\s")
_PPM_HEADER = 1024  # bytes; Pillow reads comments byte by byte
_SLOW_PPM = 8 * 2**20  # bytes that Pillow decodes number by number in a few seconds


def announced_sizes(data: bytes) -> list[tuple[int, int]]:
    """(width, height) of every picture in an icon, from their own headers; [] for other files.

    Pillow decodes an icon's largest picture when it opens the file, and the icon's directory may
    announce another size than that picture has.
    """
    sizes: list[tuple[int, int]] = []
    if not data.startswith(_ICON):
        return sizes
    for entry in range(int.from_bytes(data[4:6], "little")):
        start = int.from_bytes(data[18 + 16 * entry : 22 + 16 * entry], "little")
        head = data[start : start + 24]
        if len(head) < 24:
            continue
        if head.startswith(b"\x89PNG"):
            sizes.append(struct.unpack(">II", head[16:]))
        else:  # a bitmap without file header; its height counts the mask too
            width, height = struct.unpack("<ii", head[4:12])
            sizes.append((abs(width), max(abs(height) // 2, 1)))
    return sizes


def check_slow_ppm(data: bytes, name: str) -> None:
    """Refuse a PPM that would be read for minutes: text, or with an unusual maximum, and large.

    Raises: ImageOpenError.
    """
    if not re.match(rb"P[1-6]\s", data):
        return
    header = _PPM.match(data[:_PPM_HEADER])
    if header is None:
        raise ImageOpenError(f"{name} has a damaged header: no sizes in {_PPM_HEADER} bytes of PPM")
    kind, largest = int(header[1]), header[4]
    quick = kind == 4 or (kind > 4 and largest == b"255") or (kind == 5 and largest == b"65535")
    if not quick and len(data) > _SLOW_PPM:
        raise ImageOpenError(
            f"{name} has {len(data)} bytes; a PPM (P{kind}) that is text or has a maximum of its own is read "
            f"up to {_SLOW_PPM}: save it as PNG"
        )
