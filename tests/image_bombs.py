"""Images made to cost time or memory, by format, and what is said of each when it is refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import image_files as f
from PIL import Image

from mllama.limits import OWN_FILES

SIDE = math.isqrt(OWN_FILES.max_pixels)
MANY = 150_000  # more pieces than an image may have
SQUARE = Image.new("RGB", (64, 64), (9, 9, 9))

Cases = dict[str, tuple[Callable[[], bytes], str]]


def png() -> Cases:
    return {
        "one column": (lambda: f.png(1, 89_000_000, colour=0), "max_side"),
        "one row": (lambda: f.png(89_000_000, 1, colour=0), "max_side"),
        "pixels": (lambda: f.png(SIDE, SIDE + 20), "max_pixels"),
        "a second header": (
            lambda: f.png(
                8,
                8,
                before=[f.chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE + 9, 8, 2, 0, 0, 0))],
            ),
            "max_pixels",
        ),
        "empty chunks": (lambda: f.png(8, 8, before=[f.chunk(b"abCd")] * MANY), "max_segments"),
        "empty chunks after": (
            lambda: f.png(8, 8, after=[f.chunk(b"abCd")] * MANY),
            "max_segments",
        ),
        "empty data": (lambda: f.png(8, 8, before=[f.chunk(b"IDAT")] * MANY), "max_segments"),
        "frames": (lambda: f.png(8, 8, after=[f.chunk(b"fcTL", bytes(26))] * MANY), "max_segments"),
        "profiles": (lambda: f.png(8, 8, before=[f.text_bomb(b"iCCP")] * 300), "max_metadata"),
        "texts": (lambda: f.png(8, 8, before=[f.text_bomb(b"zTXt")] * 300), "max_metadata"),
        "texts after": (lambda: f.png(8, 8, after=[f.text_bomb(b"iTXt")] * 300), "max_metadata"),
        "large texts": (
            lambda: f.png(8, 8, before=[f.chunk(b"tEXt", b"k\0" + bytes(10**6))] * 90),
            "max_metadata",
        ),
        "Exif": (
            lambda: f.png(8, 8, before=[f.chunk(b"eXIf", f.exif_bomb(5)[6:])]),
            "max_metadata|claim more",
        ),
        "Exif as text": (
            lambda: f.png(
                8,
                8,
                before=[
                    f.chunk(
                        b"tEXt",
                        b"Raw profile type exif\0\nexif\n  9\n" + f.exif_bomb(3).hex().encode(),
                    )
                ],
            ),
            "max_metadata|claim more",
        ),
    }


def jpeg() -> Cases:
    progressive = f.jpeg(64, 64, mode="L", progressive=True)
    return {
        "scans": (
            lambda: f.with_scans(f.jpeg(4000, 4000, progressive=True), 2000, 250_000),
            "max_scans",
        ),
        "scans without data": (
            lambda: progressive[:-2] + f.scan() * 2000 + b"\xff\xd9",
            "max_scans",
        ),
        "scans of a large image": (
            lambda: f.with_scans(f.jpeg(SIDE, SIDE, mode="L", progressive=True), 100, 1183**2),
            "max_scanned_samples",
        ),
        "one column": (
            lambda: f.jpeg(1, 65_000).replace(
                struct.pack(">HH", 65_000, 1), struct.pack(">HH", 65_000, 65_000)
            ),
            "max_pixels",
        ),
        "Exif segments": (
            lambda: f.with_segments(progressive, f.segment(0xE1, b"Exif\0\0abcd") * 90_000),
            "max_metadata",
        ),
        "Exif segments, large": (
            lambda: f.with_segments(
                progressive, f.segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 1000
            ),
            "max_metadata",
        ),
        "comments": (
            lambda: f.with_segments(progressive, f.segment(0xFE, b"") * MANY),
            "max_segments",
        ),
        "comments after the pixels": (
            lambda: progressive[:-2] + f.segment(0xFE, b"") * MANY,
            "max_segments",
        ),
        "profiles": (
            lambda: f.with_segments(
                progressive, f.segment(0xE2, b"ICC_PROFILE\0" + bytes(65_000)) * 1900
            ),
            "max_metadata",
        ),
        "Photoshop's resources": (
            lambda: f.with_segments(
                progressive,
                f.segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5400) * 30,
            ),
            "max_segments",
        ),
        "tags with the same bytes": (
            lambda: f.with_segments(progressive, f.segment(0xE1, f.exif_bomb(1))),
            "claim more",
        ),
        "numbers": (
            lambda: f.with_segments(progressive, f.segment(0xE1, f.exif_bomb(3))),
            "max_metadata|claim more",
        ),
        "fractions": (
            lambda: f.with_segments(progressive, f.segment(0xE1, f.exif_bomb(5))),
            "max_metadata|claim more",
        ),
        "further images": (
            lambda: f.with_segments(progressive, f.segment(0xE2, b"MPF\0" + f.exif_bomb(5)[6:])),
            "max_metadata|claim more",
        ),
        "frames announced twice": (
            lambda: f.with_segments(
                progressive, f.segment(0xC0, b"\x08\xff\xff\xff\xff\1\1\x11\0")
            ),
            "max_pixels",
        ),
        "only markers": (
            lambda: progressive[:2] + b"\xff\xd0" * MANY + progressive[2:],
            "max_segments",
        ),
        "bytes between segments": (
            lambda: f.with_segments(progressive, f.segment(0xFE, b"") + bytes(10**6)),
            "max_segments",
        ),
    }


def webp() -> Cases:
    lossy = f.saved(SQUARE, "WEBP")
    frame = (b"ANMF", bytes(6) + b"\x3f\0\0\x3f\0\0" + bytes(4) + lossy[12:])
    image = (b"VP8 ", lossy[20:])
    return {
        "canvas": (
            lambda: f.riff(f.canvas(SIDE, SIDE + 9, 2), (b"ANIM", bytes(6)), frame),
            "max_pixels",
        ),
        "a wide canvas": (
            lambda: f.riff(f.canvas(16_000_000, 4, 2), (b"ANIM", bytes(6)), frame),
            "max_side",
        ),
        "chunks": (
            lambda: f.riff(f.canvas(64, 64), *[(b"abcd", b"")] * MANY, image),
            "max_segments",
        ),
        "frames": (
            lambda: f.riff(f.canvas(64, 64, 2), (b"ANIM", bytes(6)), *[frame] * 60_000),
            "max_segments",
        ),
        "a large profile": (
            lambda: f.riff(f.canvas(64, 64, 32), (b"ICCP", bytes(70 << 20))),
            "max_metadata",
        ),
        "Exif": (
            lambda: f.riff(f.canvas(64, 64, 8), image, (b"EXIF", f.exif_bomb(5))),
            "max_metadata|claim more",
        ),
    }


def gif() -> Cases:
    return {
        "screen": (lambda: f.gif(1, 1, screen=(60_000, 60_000)), "max_pixels"),
        "a frame outside the screen": (lambda: f.gif(60_000, 2, left=60_000), "max_side"),
        "a large frame": (lambda: f.gif(20_000, 20_000, screen=(8, 8)), "max_pixels"),
        "comments": (lambda: f.gif(8, 8, before=b"!\xfe" + b"\1a" * MANY + b"\0"), "max_segments"),
        "extensions": (lambda: f.gif(8, 8, before=b"!\xff\0" * MANY), "max_segments"),
    }


def bmp() -> Cases:
    return {
        "pixels": (lambda: f.bmp(SIDE, SIDE + 9, bits=1, palette=bytes(8)), "max_pixels"),
        "a negative height": (lambda: f.bmp(SIDE, -SIDE - 9), "max_pixels"),
        "one row": (lambda: f.bmp(80_000_000, 1), "max_side"),
        "run lengths, large": (
            lambda: f.bmp(4000, 4000, b"\0\1", bits=8, compression=1, palette=bytes(1024)),
            "max_slow_values",
        ),
        "run lengths, long": (
            lambda: f.bmp(
                100, 100, b"\1\7" * 5_000_000, bits=8, compression=1, palette=bytes(1024)
            ),
            "max_slow_values",
        ),
    }


def tiff() -> Cases:
    return {
        "pixels": (lambda: f.tiff(SIDE, SIDE + 9, bytes(9)), "max_pixels"),
        "one column": (lambda: f.tiff(1, 89_000_000, bytes(9)), "max_side"),
        "a tile": (
            lambda: f.tiff(64, 64, f.zeros(9), compression=8, tile=(65_536, 65_536)),
            "max_decoded_bytes",
        ),
        "tiles of a pixel": (
            lambda: f.tiff(1000, 1000, f.zeros(1), compression=8, tile=(1, 1)),
            "max_segments",
        ),
        "strips": (
            lambda: f.tiff(8, 8, bytes(64), rows=7, starts=[0] * 20_000, lengths=[64]),
            "20000 strips",
        ),
        "strips of the same data": (
            lambda: f.tiff(
                64, 9000, f.zeros(64), rows=1, compression=8, starts=[0] * 9000, lengths=[10**6]
            ),
            "overlap",
        ),
        "scans in strips": (
            lambda: f.tiff(
                4096,
                4096,
                f.with_scans(f.jpeg(4096, 4096, mode="L", progressive=True), 300, 512**2),
                compression=7,
            ),
            "max_scans",
        ),
        "a JPEG beyond its strip": (
            lambda: f.tiff(
                4096,
                8 * 40,
                [f.with_scans(f.jpeg(4096, 8192, mode="L", progressive=True), 4, 2**19)] * 40,
                compression=7,
                rows=8,
            ),
            "max_scan",
        ),
        "LZMA": (
            lambda: f.tiff(8, 8, bytes(64), compression=34925),
            "compression 34925; those read are none, CCITT",
        ),
        "numbers in tags": (
            lambda: f.tiff(
                8, 8, bytes(3 << 20), extra=[(50_000, 3, 1 << 20, 8), (50_001, 3, 1 << 20, 8)]
            ),
            "max_metadata",
        ),
        "fractions in Exif tags": (
            lambda: f.tiff(
                8,
                8,
                f.directory([(0x9000, 5, 400_000, 8)]) + bytes(4 << 20),
                extra=[(34_665, 4, 1, 8)],
            ),
            "max_metadata",
        ),
    }


def ico() -> Cases:
    return {
        "a large PNG": (lambda: f.icon([f.png(SIDE, SIDE + 20)]), "max_pixels"),
        "a long PNG": (lambda: f.icon([f.png(1, 80_000_000, colour=0)]), "max_side"),
        "chunks": (lambda: f.icon([f.png(8, 8, before=[f.chunk(b"abCd")] * MANY)]), "max_segments"),
        "the same PNG, long": (
            lambda: f.icon([f.png(8, 8, before=[f.chunk(b"abCd")] * 60_000)] * 4),
            "max_segments",
        ),
        "a large bitmap": (lambda: f.icon([f.bmp(SIDE, 2 * SIDE + 40)[14:]]), "max_pixels"),
        "run lengths": (
            lambda: f.icon([f.bmp(4000, 8000, bits=8, compression=1)[14:]]),
            "max_slow_values",
        ),
    }


def ppm() -> Cases:
    return {
        "pixels": (lambda: b"P6 %d %d 255 " % (SIDE, SIDE + 9), "max_pixels"),
        "one row": (lambda: b"P5 80000000 1 255 ", "max_side"),
        "text": (lambda: b"P3 3000 3000 255 " + b"1 2 3 " * 3_000_000, "max_slow_values"),
        "comments": (
            lambda: b"P1 1400 1400 " + b"#\n" * 100_000 + b"1" * 1_960_000,
            "max_slow_values",
        ),
        "a maximum": (lambda: b"P6 2000 2000 100 " + bytes(12_000_000), "max_slow_values"),
        "a long comment": (lambda: b"P6\n" + b"#" * 10_000_000, "no sizes in 1024 bytes"),
    }


def avif() -> Cases:
    still = f.saved(Image.new("RGB", (640, 480)), "AVIF", speed=10)
    return {
        "pixels": (
            lambda: still.replace(struct.pack(">II", 640, 480), struct.pack(">II", SIDE, SIDE + 9)),
            "max_pixels",
        ),
        "boxes": (lambda: still + f.box(b"free") * MANY, "max_segments"),
        "frames": (lambda: with_frames(still, 1500), "max_scanned_samples"),
        "items on the same bytes": (lambda: with_extents(4, 20_000), "overlap"),
        "items without end": (lambda: with_extents(60_000, 1), "max_segments|overlap"),
    }


def with_frames(data: bytes, count: int) -> bytes:
    """The AVIF with its frame repeated, as hidden frames would be."""
    start = data.index(b"mdat") + 4
    stream = data[start:]
    longer = stream + stream[stream.index(0x32) :] * count  # 0x32: a frame with its length
    place = data.index(b"iloc")
    size = data.index(struct.pack(">I", len(stream)), place)
    return data[:size] + struct.pack(">I", len(longer)) + data[size + 4 : start] + longer


def with_extents(items: int, extents: int) -> bytes:
    """A small AVIF whose items consist of the same bytes many times over."""
    extent = struct.pack(">II", 0, 1000)
    entry = b"".join(struct.pack(">HHH", i, 0, extents) + extent * extents for i in range(items))
    body = bytes(4) + b"\x44\0" + struct.pack(">H", items) + entry
    return f.box(b"ftyp", b"avif", bytes(4), b"avifmif1") + f.box(
        b"meta", bytes(4), f.box(b"iloc", body)
    )


REFUSED: dict[str, Callable[[], Cases]] = {
    "PNG": png,
    "JPEG": jpeg,
    "WEBP": webp,
    "GIF": gif,
    "BMP": bmp,
    "TIFF": tiff,
    "ICO": ico,
    "PPM": ppm,
    "AVIF": avif,
}
