"""TIFF: the first directory, and its strips or tiles."""

from __future__ import annotations

from mllama.processing.headers import jpeg
from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import PREFIXES, Directories
from mllama.processing.headers.webp import lossless_tables
from mllama.processing.sources import ImageOpenError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_RAW, _JPEG, _WEBP = 1, 7, 50001
# What takes no more memory than the image. LZMA allocates what the file asks for; the others are of
# decoders that nobody has looked after for long.
_READ = {_RAW: "none", 2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", _JPEG: "JPEG", 8: "deflate",
         32773: "PackBits", 32946: "deflate", 50000: "Zstandard", _WEBP: "WebP"}  # fmt: skip
_YCBCR = 6
_SEPARATE = 2
_LONG_COPIES, _SHORT_COPIES = (
    12,
    8,
)  # bytes a pixel of more than 8 bits: the image, arrays, and RGB
_MOST_SAMPLES = 6  # that Pillow takes


def walk(data: bytes, budget: Budget) -> None:
    """Check the first image: its size, its pieces and what one of them takes."""
    if not data.startswith(PREFIXES):
        raise ImageOpenError(f"{budget.name} is a BigTIFF of a byte order that is not read")
    tags = Directories(data, budget)
    width, height = (max(tags.numbers(tag), default=0) for tag in (_WIDTH, _HEIGHT))
    budget.size(width, height)
    for compression in tags.numbers(_COMPRESSION):
        if compression not in _READ:
            names = ", ".join(dict.fromkeys(_READ.values()))
            raise ImageOpenError(
                f"{budget.name} is a TIFF of compression {compression}; those read are {names}"
            )
    bits = max(tags.numbers(_BITS), default=1)
    samples = min(max([*tags.numbers(_SAMPLES), len(tags.numbers(_BITS)), 1]), _MOST_SAMPLES)
    across, down = _piece(tags, width, height)
    layers = samples if _SEPARATE in tags.numbers(_PLANAR) else 1
    needed = -(-width // across) * -(-height // down) * layers
    budget.segments(needed)
    starts = tags.numbers(_STRIPS) or tags.numbers(_TILES)
    if len(starts) > needed and needed > 1:
        # Pillow would decode the image again and again
        raise budget.damaged(f"it has {len(starts)} strips or tiles where {needed} are needed")
    piece = across * down * (samples if layers == 1 else 1) * max(bits, 8) // 8
    if _YCBCR in tags.numbers(_PHOTOMETRIC):
        piece += 4 * across * down
    if _WEBP in tags.numbers(_COMPRESSION):
        piece += lossless_tables(across * down, len(data))
    lengths = tags.numbers(_STRIP_BYTES) or tags.numbers(_TILE_BYTES)
    if _RAW not in tags.numbers(_COMPRESSION):
        if sum(min(length, len(data)) for length in lengths) > 2 * len(data):
            raise budget.damaged("its strips or tiles overlap")
        if _JPEG in tags.numbers(_COMPRESSION):
            piece += _buffered(data, starts, lengths, budget)
    area = width * height
    if bits > 8 and samples == 1:
        budget.decoded((_LONG_COPIES if bits > 16 else _SHORT_COPIES) * area + piece)
    else:
        budget.decoded(
            (8 if samples > 1 else 5) * area + piece
        )  # and as much once turned, or as RGB


def _piece(tags: Directories, width: int, height: int) -> tuple[int, int]:
    """Width and height of a strip or tile, the larger ones where tags disagree."""
    if not tags.numbers(_STRIPS) or tags.numbers(_TILE_WIDTH):
        across = max(tags.numbers(_TILE_WIDTH), default=width)
        return max(across, 1), max(*tags.numbers(_TILE_HEIGHT), 1, 1)
    return width, min(max([*tags.numbers(_ROWS), 0]) or height, height)


def _buffered(data: bytes, starts: list[int], lengths: list[int], budget: Budget) -> int:
    """Bytes that the most demanding of the JPEG images in strips or tiles takes for its coefficients."""
    most = 0
    for start, length in zip(starts, lengths):
        for found in jpeg.scanned(data[start : start + length], budget):
            if isinstance(found, jpeg.Frame):
                most = max(most, found.buffered)
    return most
