"""What must be known of an image's file before Pillow decodes it.

One walk over the file's own structure, linear in its length and bounded by the limits themselves: it adds up
what the pieces ask for and stops at the first that is too much. Damage that the decoder finds by itself ends
the walk quietly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from mllama.processing.headers import avif, bitmaps, gif, jpeg, png, ppm, tiff, webp
from mllama.processing.headers.budget import Budget

_Walk = Callable[[bytes, Budget], None]
_FORMATS: tuple[tuple[str, Callable[[bytes], object], _Walk], ...] = (
    ("PNG", lambda data: data.startswith(png.SIGNATURE), png.walk),
    ("JPEG", lambda data: data.startswith(jpeg.SIGNATURE), jpeg.walk),
    ("WEBP", webp.matches, webp.walk),
    ("GIF", lambda data: data.startswith(gif.SIGNATURES), gif.walk),
    ("BMP", lambda data: data.startswith(bitmaps.BITMAP), bitmaps.walk_bitmap),
    ("TIFF", lambda data: data.startswith((*tiff.PREFIXES, b"MM\0\x2b")), tiff.walk),
    ("ICO", lambda data: data.startswith(bitmaps.ICON), bitmaps.walk_icon),
    ("PPM", ppm.MAGIC.match, ppm.walk),
    ("AVIF", avif.matches, avif.walk),
)


def check_structure(data: bytes, budget: Budget) -> str | None:
    """Walk over a file.

    Returns: Pillow's name of its format; None where it is none of those read.
    Raises: ImageOpenError naming the limit that it exceeds, or what is wrong.
    """
    for name, matches, walk in _FORMATS:
        if matches(data):
            try:
                walk(data, budget)
            except (IndexError, struct.error):
                raise budget.damaged("it is cut off") from None
            return name
    return None
