"""Opening images: what is read, what equals `transformers`, and what hostile files get."""

import base64
import io
import os
import random
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllama.limits import OWN_FILES
from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.images import (
    FORMATS,
    ImageOpenError,
    convert_to_rgb,
    nest_images,
    open_image,
)

SIZE = (37, 23)


def noise(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind, **options):
    if kind == "ICO":  # which would be shrunk to the usual sizes
        options = {"sizes": [image.size], **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(image, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_by_path_bytes_and_file(kind, tmp_path):
    image = noise()
    data = encoded(image, kind)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(data)
    uri = f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode()
    with open(path, "rb") as file:
        for source in (str(path), path, data, bytearray(data), io.BytesIO(data), file, uri):
            got = open_image(source)
            assert got.mode == "RGB" and got.size == SIZE
            assert np.array_equal(np.asarray(got), want)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_paths_equal_transformers_with_exif_orientation(kind, orientation, tmp_path):
    theirs = pytest.importorskip("transformers.image_utils")
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(with_orientation(noise(), kind, orientation))
    got, want = open_image(path), theirs.load_image(str(path))
    assert got.size == want.size == (SIZE if orientation < 5 else SIZE[::-1])
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_paths_of_every_mode_equal_transformers(mode, tmp_path):
    theirs = pytest.importorskip("transformers.models.mllama.image_processing_pil_mllama")
    image = noise(mode)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    size = {"height": 28, "width": 28}
    got = MllamaImageProcessor(size=size)(str(path))
    want = theirs.MllamaImageProcessorPil(size=size)(str(path))
    assert got.pixel_values.tobytes() == want.pixel_values.tobytes()


def test_an_opened_image_is_not_rotated_but_its_path_is(tmp_path):
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_orientation(noise(), "JPEG", 6))
    processor = MllamaImageProcessor(size=28)
    assert processor(Image.open(path)).aspect_ratio_ids.tolist() == [[2]]
    assert processor(path).aspect_ratio_ids.tolist() == [[5]]


def test_transparency_is_laid_on_white_for_opened_images():
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 127))
    assert convert_to_rgb(half_red).getpixel((0, 0)) == (255, 128, 128)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0])
    palette.info["transparency"] = 0
    assert convert_to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    gray = Image.new("L", (2, 2), 7)
    gray.info["transparency"] = 7
    assert convert_to_rgb(gray).getpixel((0, 0)) == (255, 255, 255)
    rgb = Image.new("RGB", (2, 2))
    assert convert_to_rgb(rgb) is rgb


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_the_name_does_not_decide_the_format(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(noise(), "PNG"))
    assert open_image(path).tobytes() == noise().tobytes()


def png_header(width, height):
    """A PNG that announces its size and has almost no data."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def gif_header(width, height):
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def bmp_header(width, height):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


@pytest.mark.parametrize("make", [png_header, gif_header, bmp_header])
@pytest.mark.parametrize("side", [10_000, 14_000, 60_000])
def test_decompression_bombs_are_refused_from_the_header(make, side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(make(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageOpenError, match=r"bomb\.png.*(at most 89478485|too large)"):
            open_image(path)


def test_caps_can_be_set():
    data = encoded(noise(), "PNG")
    with pytest.raises(ImageOpenError, match="37 x 23 = 851 pixels; at most 850"):
        open_image(data, limits=replace(OWN_FILES, max_pixels=850))
    assert open_image(data, limits=replace(OWN_FILES, max_pixels=851)).size == SIZE
    for source in (data, io.BytesIO(data)):
        with pytest.raises(ImageOpenError, match=r"has \d+ bytes; at most 99 are read"):
            open_image(source, limits=replace(OWN_FILES, max_bytes=99))


def test_a_large_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ImageOpenError, match=r"huge\.png has 1099511627776 bytes"):
        open_image(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_named(kind, tmp_path):
    data = encoded(noise(), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for length in (len(data) // 2, 40, 9, 3):
        path.write_bytes(data[:length])
        with pytest.raises(ImageOpenError, match=r"cut\."):
            open_image(path)


def test_empty_sources_are_named(tmp_path):
    path = tmp_path / "nothing.png"
    path.touch()
    with pytest.raises(ImageOpenError, match=r"nothing\.png is empty \(0 bytes\)"):
        open_image(path)
    with pytest.raises(ImageOpenError, match="image bytes is empty"):
        open_image(b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%PDF-1.7\n1 0 obj\n<<>>\n", "is a PDF document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b"\n <?xml version='1.0'?><svg/>", "is an XML document, perhaps an SVG"),
        (b"<!doctype html><p>not found", "is an HTML or SVG document"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "is an HEIF, AVIF or video file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is a PostScript document"),
        (b"hello, I am an image", "is not an image in one of PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        (encoded(Image.new("RGB", (3, 3)), "TGA"), "is not an image in one of"),
        (encoded(Image.new("RGB", (16, 16)), "JPEG2000"), "is not an image in one of"),
    ],
)
def test_other_files_are_refused_whatever_their_name(data, message, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(ImageOpenError, match=rf"image\.png {message}"):
        open_image(path)


def test_random_damage_never_escapes_as_another_error():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    originals = [encoded(noise(), kind) for kind in FORMATS]
    for _ in range(600):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow reports odd metadata
            try:
                image = open_image(bytes(data), limits=replace(OWN_FILES, max_pixels=10_000_000))
            except ImageOpenError:
                continue
        assert image.mode == "RGB"


@pytest.mark.parametrize("url", ["http://a.example/x.png", "https://a.example/x", "HTTP://A/b.gif"])
def test_urls_are_not_fetched(url):
    with pytest.raises(ImageOpenError, match="is a URL; nothing is fetched"):
        MllamaImageProcessor()(url)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ImageOpenError, match=r"absent\.png cannot be read: .*No such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageOpenError, match="it is not a regular file"):
        open_image(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ImageOpenError, match="pipe cannot be read: it is not a regular file"):
        open_image(pipe)
    with pytest.raises(ImageOpenError, match="cannot be read: no file can be called so"):
        open_image("a\0b.png")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:text/plain;base64,aGk=", "expected data:image/"),
        ("data:image/png,rawbytes", "expected data:image/"),
        ("data:image/png;base64,???", "not valid base64"),
        ("data:image/png;base64,", "image data URI is empty"),
    ],
)
def test_data_uris_that_cannot_work(uri, message):
    with pytest.raises(ImageOpenError, match=message):
        open_image(uri)


def test_a_text_file_object_is_refused():
    with pytest.raises(TypeError, match="must be opened in binary mode; read\\(\\) gave str"):
        open_image(io.StringIO("x"))


def test_a_damaged_opened_image_is_named():
    data = encoded(noise(), "PNG")
    image = Image.open(io.BytesIO(data[: len(data) // 2]))
    with pytest.raises(ImageOpenError, match=r"images\[0\]\[1\] is truncated or damaged"):
        MllamaImageProcessor()([[noise(), image]])


def test_nesting():
    a, b = noise(), noise("L")
    batch = np.zeros((2, 4, 4, 3), np.uint8)
    assert nest_images(a) == [[a]]
    assert nest_images("p.png") == [["p.png"]]
    assert nest_images([a, b]) == [[a, b]]
    assert nest_images([[a], [], (b, a)]) == [[a], [], [b, a]]
    assert [len(s) for s in nest_images(batch)] == [2]
    assert [len(s) for s in nest_images([batch, batch[:1]])] == [2, 1]
    assert nest_images([]) == []
