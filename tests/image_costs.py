"""What an image costs: as a script, the table of the worst that the limits let through.

Every image is written by one process and opened by another, which says its time and its peak.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import image_files as files
from PIL import Image

from mllama.limits import OWN_FILES, REQUESTS, Limits
from mllama.processing.images import ImageOpenError, open_image

PRESETS = {"OWN_FILES": OWN_FILES, "REQUESTS": REQUESTS}


def cost(make: Callable[[], bytes], limits: Limits) -> tuple[str, float, float]:
    """Open an image in a process of its own.

    Returns: "" or the error, seconds, and MiB that the process grew by at its peak.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "image")

        def write() -> str:
            with open(path, "wb") as file:
                file.write(make())
            return ""

        def opened() -> str:
            warnings.simplefilter("ignore")
            with open("/proc/self/statm", encoding="ascii") as statm:
                before = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
            start, error = time.process_time(), ""
            try:
                image = open_image(path, limits=limits)
                assert image.mode == "RGB"
            except ImageOpenError as refusal:
                error = str(refusal).replace(path, "image")
            return f"{time.process_time() - start}|{before}|{error}"

        _in_child(write)
        answer, peak = _in_child(opened)
    seconds, before, error = answer.split("|", 2)
    return error, float(seconds), max(peak / 1024 - int(before) / 2**20, 0)


def _in_child(job: Callable[[], str]) -> tuple[str, int]:
    """What the job answers, and the peak of the process that did it in KiB."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = job()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"[:1000]
            os.write(writing, answer.encode())
            os._exit(1)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"the child ended with {status}: {answer}")
    return answer, usage.ru_maxrss


def worst(limits: Limits) -> dict[str, Callable[[], bytes]]:
    """Images of every format that are as demanding as the limits allow."""

    def side(copies: int) -> int:
        return math.isqrt(min(limits.max_pixels, limits.max_decoded_bytes // copies))

    def blocks(length: int) -> int:
        return (-(-length // 8)) ** 2

    def passes(length: int, samples: float) -> int:
        """Scans of one component more than those that Pillow writes, which pass over `samples`."""
        left = limits.max_scanned_samples / (64 * blocks(length)) - samples
        return int(min(left, limits.max_scans - 12))

    rgb, grey, slow, pieces = side(8), side(5), limits.max_slow_values, limits.max_segments - 50
    scanned, coloured, small = side(3) // 64 * 64, side(10) // 64 * 64, side(8) // 2 // 64 * 64
    squares = int((slow / 6.3) ** 0.5)
    expanded = limits.max_metadata // 2**20 - 1
    row = limits.max_bytes // 2 // 3
    return {
        "PNG": lambda: files.png(rgb, rgb),
        "PNG, interlaced RGBA of 16 bits": lambda: files.png(
            rgb, rgb, depth=16, colour=6, interlaced=True
        ),
        "PNG, grey of 16 bits": lambda: files.png(side(12), side(12), depth=16, colour=0),
        "PNG, empty chunks": lambda: files.png(8, 8, before=[files.chunk(b"abCd")] * pieces),
        "PNG, profiles": lambda: files.png(8, 8, before=[files.text_bomb(b"iCCP")] * expanded),
        "JPEG": lambda: files.jpeg(rgb, rgb, subsampling=0),
        "JPEG, progressive": lambda: files.jpeg(coloured, coloured, subsampling=0, progressive=True),
        "JPEG, grey with scans": lambda: files.with_scans(
            files.jpeg(scanned, scanned, mode="L", progressive=True),
            passes(scanned, 6),
            blocks(scanned),
        ),
        "JPEG, small with scans": lambda: files.with_scans(
            files.jpeg(small, small, subsampling=0, progressive=True), passes(small, 14), blocks(small)
        ),
        "JPEG, comments": lambda: files.with_segments(
            files.jpeg(8, 8), files.segment(0xFE, b"") * pieces
        ),
        "WebP": lambda: files.saved(Image.new("RGB", (side(16),) * 2), "WEBP", method=0),
        "WebP, codes of many blocks": lambda: files.lossless_webp(1024),
        "WebP, lossless": lambda: files.saved(files.pixels(1600, 1200), "WEBP", lossless=True, method=0),
        "GIF": lambda: files.gif(side(6), side(6)),
        "BMP of 1 bit": lambda: files.bmp(
            grey, grey, bytes(-(-grey // 32) * 4 * grey), bits=1, palette=bytes(8)
        ),
        "BMP, run lengths": lambda: files.bmp(
            squares * 2,
            squares,
            (b"\1\7" * squares * 2 + b"\0\0") * squares + b"\0\1",
            bits=8,
            compression=1,
            palette=bytes(1024),
        ),
        "PPM, text": lambda: b"P3 %d 1000 255 " % (slow // 6010) + b"1 2 3 " * (slow // 6010 * 1000),
        "PPM, maximum of 100": lambda: b"P6 %d 1000 100 " % (slow // 3010)
        + bytes(slow // 3010 * 3000),
        "TIFF, deflate": lambda: files.tiff(
            side(11), side(11), files.zeros(side(11) ** 2 * 3), bits=(8,) * 3, compression=8,
            extra=[(274, 3, 1, 6)],
        ),
        "TIFF, RGBA of 16 bits": lambda: files.tiff(
            side(16), side(16), files.zeros(side(16) ** 2 * 8), bits=(16,) * 4, compression=8
        ),
        "TIFF, floats": lambda: files.tiff(
            side(16), side(16), files.zeros(side(16) ** 2 * 4), bits=(32,), kind=3, compression=8
        ),
        "TIFF, strips of a row": lambda: files.tiff(
            row // 9000, 9000, bytes(3 * (row // 9000)), bits=(8,) * 3, rows=1, starts=[0] * 9000
        ),
        "ICO": lambda: files.icon([files.png(rgb, rgb)]),
        "ICO, entries": lambda: files.icon([files.png(8, 8)], [(16, 0)] * min(pieces, 65_000)),
        "AVIF": lambda: files.saved(Image.new("RGB", (side(13),) * 2), "AVIF", speed=10),
        "AVIF, dense": lambda: files.saved(
            files.pixels(2500, 2500), "AVIF", speed=10, quality=95, subsampling="4:4:4"
        ),
    }  # fmt: skip


def main() -> None:
    chosen = sys.argv[1:] or list(PRESETS)
    for preset in chosen:
        for name, make in worst(PRESETS[preset]).items():
            error, seconds, peak = cost(make, PRESETS[preset])
            print(f"{preset}|{name}|{seconds:.2f}|{peak:.0f}|{error}", flush=True)


if __name__ == "__main__":
    main()
