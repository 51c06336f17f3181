"""Genuine images, damaged at random: an error that names them or an RGB image, and soon."""

from pathlib import Path

import image_files as files
import pytest
from confinement import confined
from image_files import saved

from mllama.processing.images import FORMATS

HERE = str(Path(__file__).parent)

FUZZ = """
    import random, sys, time, warnings
    import numpy as np
    import image_files as files
    from test_damaged_images import mutated, seeds
    from dataclasses import replace
    from mllama.limits import REQUESTS
    from mllama.processing.images import ImageOpenError, open_image
    warnings.simplefilter("ignore")
    kind, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng, originals, slowest, read = random.Random(seed), seeds(kind), 0.0, 0
    limits = replace(REQUESTS, max_pixels=2_000_000)
    for turn in range(count):
        data = mutated(rng, originals)
        start = time.process_time()
        try:
            image = open_image(data, limits=limits)
            assert image.mode == "RGB", image.mode
            read += 1
        except ImageOpenError as error:
            assert len(str(error)) < 500
        except BaseException as error:
            with open(f"/tmp/fuzzed-{kind}", "wb") as file:
                file.write(data)
            raise
        slowest = max(slowest, time.process_time() - start)
    print(read, count, f"{slowest:.2f}")
"""


def seeds(kind: str) -> list[bytes]:
    """Small genuine files of a format in its variants."""
    image, f = files.pixels(37, 23), files
    turned = f.exif([(0x112, 3, 1, 6), (0x8769, 4, 1, 60)], bytes(40))
    variants = {
        "PNG": [{}, {"exif": turned[6:]}, {"icc_profile": bytes(500)}],
        "JPEG": [{}, {"progressive": True}, {"exif": turned, "subsampling": 0}, {"icc_profile": bytes(500)}],
        "WEBP": [{}, {"lossless": True}, {"exif": turned, "icc_profile": bytes(50)}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "packbits"}, {"compression": "jpeg"}],
        "GIF": [{}, {"interlace": 1, "comment": b"c" * 300}],
        "AVIF": [{"speed": 10}, {"speed": 10, "exif": turned}],
    }  # fmt: skip
    found = [saved(image, kind, **options) for options in variants.get(kind, [{}])]
    if kind == "AVIF":
        found.append(
            saved(image, kind, speed=10, save_all=True, append_images=[image.rotate(90)] * 2)
        )
    if kind in ("GIF", "WEBP", "PNG"):
        more = [image.rotate(angle) for angle in (90, 180)]
        found.append(saved(image, kind, save_all=True, append_images=more))
    modes = {
        "PNG": ["L", "P", "RGBA", "I;16"], "JPEG": ["L", "CMYK"], "WEBP": ["RGBA"], "GIF": ["L"],
        "BMP": ["L", "P", "1"], "TIFF": ["L", "CMYK", "F", "1", "RGBA"], "ICO": ["RGBA"], "PPM": ["L", "1"],
        "AVIF": ["RGBA"],
    }  # fmt: skip
    found += [
        saved(image.convert("L").convert(m) if m == "I;16" else image.convert(m), kind)
        for m in modes[kind]
    ]
    if kind == "TIFF":
        tags = [(274, 3, 1, 6), (34665, 4, 1, 8)]
        found.append(f.tiff(9, 7, f.directory([(0x9000, 5, 1, 8)]) + bytes(63), extra=tags))
        found.append(
            f.tiff(16, 16, f.zeros(64), compression=8, tile=(8, 8), starts=[0] * 4, lengths=[9])
        )
    if kind == "PPM":
        found += [
            b"P3 3 2 9 " + b"1 2 3 " * 6,
            b"P1 4 2 # c\n10101010 ",
            b"P6 4 4 100 " + bytes(48),
            b"P2 3 2 999 1 2 3 4 5 6 ",
        ]
    if kind == "BMP":
        found.append(
            f.bmp(16, 4, b"\x10\7\0\0" * 4 + b"\0\1", bits=8, compression=1, palette=bytes(1024))
        )
    if kind == "ICO":
        found.append(f.icon([f.bmp(8, 16, bytes(8 * 16 * 4), bits=32)[14:], f.png(16, 16)]))
    return found


def mutated(rng, originals: list[bytes]) -> bytes:
    """One of the files with bits turned, numbers that lie, pieces cut out, doubled or exchanged."""
    data = bytearray(rng.choice(originals))
    for _ in range(rng.randint(1, 5)):
        if len(data) < 8:
            break
        at, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 8, 12, rng.randrange(1, 200)))
        # most of what matters stands at the beginning
        at = at if rng.random() < 0.5 else at % min(len(data), 200)
        action = rng.randrange(7)
        if action == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at : at + size] = rng.randbytes(min(size, len(data) - at))
        elif action == 2:
            number = rng.choice(
                (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
            )
            width = rng.choice((2, 4))
            order = rng.choice(("big", "little"))
            data[at : at + width] = (number % 256**width).to_bytes(width, order)
        elif action == 3:
            del data[at : at + size]
        elif action == 4:
            piece = data[at : at + size]
            data[at:at] = piece * rng.choice((1, 2, 50))
        elif action == 5:
            del data[max(at, 8) :]
        else:
            other = rng.choice(originals)
            start = rng.randrange(len(other))
            data[at : at + size] = other[start : start + size]
    return bytes(data)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(s, marks=pytest.mark.full) for s in range(2, 12))]
)
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_an_error_or_an_image(kind, seed):
    count = 1000 if seed == 1 else 4000
    ended = confined(FUZZ, kind, seed, count, seconds=300, mebibytes=3000, PYTHONPATH=HERE)
    assert ended.kind == "ok", (ended.kind, ended.err[-3000:])
    read, tried, slowest = ended.out.split()
    assert int(tried) == count and 0 < int(read) < count and float(slowest) < 3
    assert ended.peak < 900
