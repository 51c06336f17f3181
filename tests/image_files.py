"""Files of images, genuine and hostile, written piece by piece: none is kept in the repository."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image


def pixels(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image that compresses as a photograph does: soft shapes and some noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    soft = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    tile = rng.integers(0, 12, (64, 64, 3), dtype=np.uint8)
    noise = np.tile(tile, (-(-height // 64), -(-width // 64), 1))[:height, :width]
    array = np.asarray(soft)
    return Image.fromarray(array // 2 + noise).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    if kind == "ICO":
        options = {"sizes": [image.size], **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- PNG ---


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(count: int) -> bytes:
    """A zlib stream of `count` zeros and more, without compressing all of them."""
    packer = zlib.compressobj(9)
    start = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (count // 2**20 + 1) + packer.flush()


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: bool = False,
    before: Iterable[bytes] = (),
    after: Iterable[bytes] = (),
    piece: int = 2**30,
) -> bytes:
    """A black PNG; its pixels in chunks of `piece` bytes."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (width * channels * depth + 7) // 8
    body = zeros(row * height * (2 if interlaced else 1))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = [chunk(b"PLTE", bytes(range(256)) * 3)] if colour == 3 else []
    data = (chunk(b"IDAT", body[i : i + piece]) for i in range(0, len(body), piece))
    parts = (chunk(b"IHDR", header), *palette, *before, *data, *after, chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def text_bomb(kind: bytes, size: int = 2**20 - 64) -> bytes:
    """A chunk of about a kilobyte that becomes a megabyte."""
    head = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}[kind]
    return chunk(kind, head + zlib.compress(bytes(size), 9))


# --- JPEG ---


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(
    width: int, height: int, *, mode: str = "RGB", subsampling: int = 2, **options: object
) -> bytes:
    """A plain JPEG of one colour; subsampling 0 is 4:4:4, 2 is 4:2:0."""
    colour = (90, 120, 30, 10)[: len(mode)]
    image = Image.new(mode, (width, height), colour if len(mode) > 1 else colour[0])
    return saved(image, "JPEG", subsampling=subsampling, **options)


def with_segments(data: bytes, segments: bytes) -> bytes:
    """The JPEG with further segments after its first marker."""
    return data[:2] + segments + data[2:]


# A Huffman table whose only code, of one bit, says "no coefficients in this block and 2^14 further ones".
_END_OF_BANDS = segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))


def scan(first: int = 1, last: int = 63, high: int = 0, low: int = 0, component: int = 1) -> bytes:
    return segment(0xDA, bytes([1, component, 0, first, last, high << 4 | low]))


def with_scans(data: bytes, count: int, blocks: int, *, high: int = 1) -> bytes:
    """The progressive JPEG with `count` more scans that say that nothing changes in any of its blocks."""
    ends = -(-blocks // 32767)
    bits = ("0" + "1" * 14) * ends
    bits += "1" * (-len(bits) % 8)
    passed = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return data[:-2] + _END_OF_BANDS + (scan(high=high) + passed) * count + data[-2:]


# --- directories of tags ---

_FORMS = {1: "B", 2: "s", 3: "H", 4: "I", 5: "2I", 7: "B"}


def directory(
    tags: Iterable[tuple[int, int, int, int]], start: int = 8, following: int = 0
) -> bytes:
    """A TIFF directory of (tag, type, count, value or offset)."""
    tags = list(tags)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def exif(tags: Iterable[tuple[int, int, int, int]], after: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory(tags) + after


def exif_bomb(kind: int, entries: int = 5000, size: int = 4000) -> bytes:
    """Exif data in less than a segment whose entries all claim the same bytes."""
    width = struct.calcsize("<" + _FORMS[kind])
    tags = [(0x112, 3, 1, 6)]
    tags += [(0x9000 + i, kind, size // width, 16) for i in range(entries)]
    return exif(tags, bytes(size))


def tiff(
    width: int,
    height: int,
    body: bytes | list[bytes],
    *,
    bits: tuple[int, ...] = (8,),
    compression: int = 1,
    rows: int | None = None,
    tile: tuple[int, int] | None = None,
    kind: int = 1,
    planar: int = 1,
    photometric: int | None = None,
    starts: list[int] | None = None,
    lengths: list[int] | None = None,
    extra: Iterable[tuple[int, int, int, int]] = (),
) -> bytes:
    """A TIFF: `body` is its one strip, or the list of them; `starts` of 0 stand for that of the body."""
    bodies = [body] if isinstance(body, bytes) else body
    data = b"II*\0\0\0\0\0" + b"".join(bodies)
    places, position = [], 8
    for part in bodies:
        places.append(position)
        position += len(part)
    starts = places if starts is None else [s or places[0] for s in starts]
    lengths = [len(part) for part in bodies] if lengths is None else lengths
    lengths = lengths * len(starts) if len(lengths) == 1 else lengths

    def stored(letter: str, values: Iterable[int]) -> int:
        nonlocal data
        values = list(values)
        if len(values) == 1:
            return values[0]
        data += b"\0" * (len(data) % 2)
        place = len(data)
        data += struct.pack(f"<{len(values)}{letter}", *values)
        return place if len(data) - place > 4 else int.from_bytes(data[place:], "little")

    samples = len(bits)
    if photometric is None:
        photometric = 2 if samples >= 3 else 1
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, samples, stored("H", bits)),
        (259, 3, 1, compression),
        (262, 3, 1, photometric),
        (277, 3, 1, samples),
        (284, 3, 1, planar),
        (339, 3, samples, stored("H", [kind] * samples)),
    ]
    places = stored("I", starts)
    counts = stored("I", lengths)
    if tile is None:
        tags += [(273, 4, len(starts), places), (278, 4, 1, rows or height)]
        tags += [(279, 4, len(lengths), counts)]
    else:
        tags += [(322, 4, 1, tile[0]), (323, 4, 1, tile[1])]
        tags += [(324, 4, len(starts), places), (325, 4, len(lengths), counts)]
    if samples == 4 and photometric == 2:
        tags.append((338, 3, 1, 2))
    tags = sorted([*tags, *extra])
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory(tags)


# --- others ---


def gif(
    width: int,
    height: int,
    *,
    left: int = 0,
    top: int = 0,
    before: bytes = b"",
    screen: tuple[int, int] | None = None,
) -> bytes:
    """A GIF of one frame, black by codes that grow as far as they may."""
    screen = screen or (width, height)
    body = _black_codes(width * height)
    blocks = b"".join(
        bytes([len(p)]) + p for p in (body[i : i + 255] for i in range(0, len(body), 255))
    )
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return (
        head
        + before
        + b","
        + struct.pack("<4HB", left, top, width, height, 0)
        + b"\2"
        + blocks
        + b"\0;"
    )


def _black_codes(count: int) -> bytes:
    """LZW of `count` zeros: every code is one zero longer than the one before, until the table is full."""
    bits, used, out = 0, 0, bytearray()

    def write(code: int, size: int) -> None:
        nonlocal bits, used
        bits |= code << used
        used += size
        while used >= 8:
            out.append(bits & 255)
            bits >>= 8
            used -= 8

    while count > 0:
        write(4, 3)  # clear
        size, free, code, length = 3, 6, 0, 1
        while count > 0 and free < 4096:
            write(code, size)
            count -= length
            if length > 1:
                free += 1
                if free == 1 << size and size < 12:
                    size += 1
            code, length = free, length + 1
        write(code if count > 0 else 5, size)
        count -= length
    write(5, 12)
    out.append(bits & 255)
    return bytes(out)


def bmp(
    width: int,
    height: int,
    body: bytes = b"",
    *,
    bits: int = 24,
    compression: int = 0,
    palette: bytes = b"",
) -> bytes:
    start = 54 + len(palette)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body


def icon(images: list[bytes], entries: list[tuple[int, int]] | None = None) -> bytes:
    """An ICO; `entries` are (side, number of the image), by default one of 16 for each."""
    entries = entries or [(16, index) for index in range(len(images))]
    starts, position = [], 6 + 16 * len(entries)
    for image in images:
        starts.append(position)
        position += len(image)
    head = struct.pack("<HHH", 0, 1, len(entries))
    for side, index in entries:
        head += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(images[index]), starts[index])
    return head + b"".join(images)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def lossless_webp(side: int) -> bytes:
    """A black lossless WebP in which every block of 4 x 4 pixels has codes of its own, up to 2^16."""
    written: list[str] = []

    def write(*fields: tuple[int, int]) -> None:
        written.extend(f"{value:0{bits}b}"[::-1] for value, bits in fields)

    single = [(1, 1), (0, 3)]  # a code of one symbol, which takes no bits
    write((side - 1, 14), (side - 1, 14), (0, 4), (0, 2), (1, 1), (0, 3), (0, 1))
    for alphabet in (280, 256):  # of both, the first 256 symbols have eight bits
        write((0, 1), (8, 4), *[(0, 3)] * 11, (1, 3))
        write(*([(1, 1), (3, 3), (254, 8)] if alphabet == 280 else [(0, 1)]))
    write(*single * 3)
    blocks = (-(-side // 4)) ** 2
    # codes are stored from their highest bit
    written.extend(f"{group & 255:08b}{group >> 8 & 255:08b}" for group in range(blocks))
    write(*single * 5 * min(blocks, 2**16))
    bits = "".join(written)
    return riff((b"VP8L", b"\x2f" + int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")))


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    """The chunk of an extended WebP."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind + body
