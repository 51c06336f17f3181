"""Images of more than 8 bits, and grey ones: the image of their 8-bit export, or a refusal by name."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mllama.processing.image_processor import MllamaImageProcessor
from mllama.processing.images import ImageOpenError, convert_to_rgb, open_image

RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (23, 37), dtype=np.uint8)
GREY[0, :2] = 0, 255
COLOUR = RNG.integers(0, 256, (23, 37, 3), dtype=np.uint8)
FLOATS = (GREY / 255).astype(np.float32)
PROCESSOR = MllamaImageProcessor(size=28)


def png(bits, colour, rows, **chunks):
    """A PNG written by hand; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind, body):
        body = kind + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in rows)
    extra = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    data = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + data


def tiff(rows, kind=1, photometric=1, order="<"):
    """An uncompressed TIFF; kind: 1 unsigned, 2 signed, 3 float."""
    height, width = rows.shape[:2]
    samples = rows.shape[2] if rows.ndim == 3 else 1
    body = rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    per_sample = {258: rows.dtype.itemsize * 8, 339: kind}
    extra, offset, entries = b"", 8 + len(body), []
    tags = {256: width, 257: height, 259: 1, 262: 2 if samples > 1 else photometric, 273: 8}
    tags |= {277: samples, 278: height, **per_sample}
    for tag, value in sorted(tags.items()):
        count = samples if tag in per_sample else 1
        if count > 2:
            field = struct.pack(f"{order}I", offset + len(extra))
            extra += struct.pack(f"{order}{count}H", *[value] * count)
        else:
            field = struct.pack(f"{order}HH", value, 0)
        entries.append(struct.pack(f"{order}HHI", tag, 3, count) + field)
    entries.append(struct.pack(f"{order}HHII", 279, 4, 1, len(body)))
    entries.sort(key=lambda entry: struct.unpack(f"{order}H", entry[:2]))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", offset + len(extra)) + body + extra + directory


def tiff_of_12_bits(grey):
    """Two values in three bytes."""
    wide = (grey.astype(np.uint16) * 16 + 7).reshape(len(grey), -1, 2)
    first, second = wide[..., 0], wide[..., 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    data = bytearray(tiff(grey))
    body = packed.astype(np.uint8).tobytes()
    header = bytes(data[:8]), bytes(data[8 + grey.size :])
    directory = bytearray(header[1])
    for i in range(2, len(directory) - 4, 12):
        tag = struct.unpack("<H", directory[i : i + 2])[0]
        if tag == 258:
            directory[i + 8 : i + 10] = struct.pack("<H", 12)
        elif tag == 279:
            directory[i + 8 : i + 12] = struct.pack("<I", len(body))
    return header[0][:4] + struct.pack("<I", 8 + len(body)) + body + bytes(directory)


def saved(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


WIDE = GREY.astype(np.uint16) * 257
GREY_FILES = {
    "16-bit PNG": png(16, 0, WIDE),
    "16-bit PNG by Pillow": saved(Image.fromarray(WIDE), "PNG"),
    "16-bit TIFF": tiff(WIDE),
    "16-bit TIFF, big-endian": tiff(WIDE, order=">"),
    "16-bit TIFF whose zero is white": tiff(65535 - WIDE, photometric=0),
    "16-bit signed TIFF": tiff(GREY.astype(np.int16) << 7, kind=2),
    "32-bit TIFF": tiff(GREY.astype(np.uint32) << 24),
    "32-bit signed TIFF": tiff(GREY.astype(np.int32) << 23, kind=2),
    "16 bits in a 32-bit TIFF": saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"),
    "float TIFF 0..1": tiff(FLOATS, kind=3),
    "float TIFF 0..255": tiff(GREY.astype(np.float32), kind=3),
    "float TIFF 0..255, not whole": tiff(np.minimum(GREY + 0.25, 255).astype(np.float32), kind=3),
    "16-bit PGM": b"P5 37 23 65535\n" + WIDE.astype(">u2").tobytes(),
    "8 bits in a 16-bit PNG": png(16, 0, GREY),
}


@pytest.mark.parametrize("name", GREY_FILES)
def test_a_grey_file_is_its_8_bit_image(name):
    want = np.repeat(GREY[..., None], 3, 2)
    data = GREY_FILES[name]
    assert np.array_equal(np.asarray(open_image(data)), want)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(convert_to_rgb(opened)), want)
    got = PROCESSOR(opened).pixel_values
    assert np.array_equal(got, PROCESSOR(Image.fromarray(GREY)).pixel_values)
    assert np.array_equal(got, PROCESSOR(data).pixel_values)


def test_colour_files_of_16_bits():
    wide = COLOUR.astype(np.uint16) * 257
    opaque = np.concatenate([wide, np.full((23, 37, 1), 65535, np.uint16)], axis=2)
    for data in (png(16, 2, wide), tiff(wide), tiff(wide, order=">"), png(16, 6, opaque)):
        assert np.array_equal(np.asarray(open_image(data)), COLOUR)
        assert np.array_equal(np.asarray(convert_to_rgb(Image.open(io.BytesIO(data)))), COLOUR)
    grey_alpha = np.stack([WIDE, np.full_like(WIDE, 65535)], axis=2)
    assert np.array_equal(np.asarray(open_image(png(16, 4, grey_alpha)))[..., 0], GREY)


def test_a_transparent_value_of_16_bits_is_laid_on_white():
    rows = np.array([[257 * 9, 257 * 9 + 1, 65535, 0]], np.uint16)
    opened = Image.open(io.BytesIO(png(16, 0, rows, tRNS=struct.pack(">H", 257 * 9))))
    assert np.asarray(convert_to_rgb(opened))[0, :, 0].tolist() == [255, 9, 255, 0]


ARRAYS = {
    "uint16": WIDE,
    "uint16 in 8 bits": GREY.astype(np.uint16),
    "int16": GREY.astype(np.int16) << 7,
    "uint32": GREY.astype(np.uint32) << 24,
    "16 bits in uint32": WIDE.astype(np.uint32),
    "int32": GREY.astype(np.int32) << 23,
    "16 bits in int32": WIDE.astype(np.int32),
    "int64": GREY.astype(np.int64),
    "float16 0..255": GREY.astype(np.float16),
    "float64 0..255, not whole": GREY + np.where(GREY < 255, 0.3, 0),
}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_type(name, kind):
    make = torch.from_numpy if kind == "torch" else np.asarray
    grey, want = ARRAYS[name], PROCESSOR(Image.fromarray(GREY)).pixel_values
    for shape in (grey, grey[None], grey[..., None], np.repeat(grey[..., None], 3, 2)):
        assert np.array_equal(PROCESSOR(make(np.ascontiguousarray(shape))).pixel_values, want)
    for images in ([make(grey)], [[make(grey)], []], [make(grey), make(grey)]):
        assert np.array_equal(PROCESSOR(images).pixel_values[0, 0], want[0, 0])


def test_bools_are_black_and_white():
    mask = GREY > 127
    want = PROCESSOR(Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))).pixel_values
    for image in (mask, torch.from_numpy(mask), mask[None], Image.fromarray(mask)):
        assert np.array_equal(PROCESSOR(image).pixel_values, want)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GREY.astype(np.uint16) * 16, r"would be black in 16 bits; scale them to 0\.\.65535"),
        (GREY.astype(np.uint32) * 2**17, "would be black in 32 bits"),
        (GREY.astype(np.int16) - 1, "pixel values are -1 to 254; expected whole numbers 0..255"),
        (WIDE.astype(np.int64), "expected whole numbers 0..255, or a type .* got int64"),
        (WIDE.astype(np.uint64), "expected whole numbers 0..255, or a type .* got uint64"),
        (WIDE.astype(np.float32), "expected floats 0..1 or 0..255"),
        (FLOATS * 1.02, "pixel values are 0.0 to 1.0.*; expected floats 0..1 or 0..255"),
        (FLOATS - 0.5, "expected floats 0..1 or 0..255"),
        (np.where(GREY > 9, np.nan, FLOATS), "pixel values are nan to nan"),
        (np.where(GREY > 9, np.inf, FLOATS), "pixel values are 0.0 to inf"),
        (GREY.astype(complex), "pixels must be numbers, got complex128"),
    ],
    ids=lambda value: value.dtype.name if isinstance(value, np.ndarray) else value[:40],
)
def test_values_outside_their_range_are_named(array, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(array)
    if array.dtype == np.float32:
        data = tiff(array, kind=3)
    elif array.dtype == np.uint16:
        data = png(16, 0, array)
    else:
        return
    with pytest.raises(ImageOpenError, match=rf"image bytes \(.*\): .*{message}"):
        open_image(data)
    with pytest.raises(ValueError, match=rf"images\[0\]\[0\]: .*{message}"):
        PROCESSOR(Image.open(io.BytesIO(data)))


def test_a_tiff_of_12_bits():
    grey = GREY[:, :36]
    got = open_image(tiff_of_12_bits(grey))
    assert np.array_equal(np.asarray(got)[..., 0], grey)


def test_a_black_image_of_16_bits_is_black():
    assert not np.asarray(open_image(png(16, 0, np.zeros((3, 4), np.uint16)))).any()


@pytest.mark.parametrize(
    "image",
    [FLOATS, GREY[0] * 0 + np.ones((9, 1), np.float32), GREY > 127.0, (GREY > 127) + np.uint8(0)],
    ids=["floats", "ones", "bools", "whole"],
)
def test_numbers_that_are_rescaled_twice_are_said_aloud(image):
    if image.dtype == bool:
        PROCESSOR(image)  # white is 255
        image = image.astype(np.float64)
    image = np.repeat(image[..., None], 3, 2)
    with pytest.warns(UserWarning, match="pass do_rescale=False for such images"):
        PROCESSOR(image)
    PROCESSOR(image, do_rescale=False)
    PROCESSOR(image * 0)


def test_an_opaque_image_is_not_bright():
    dark = np.stack([GREY.astype(np.uint16)] * 3 + [np.full(GREY.shape, 65535, np.uint16)], 2)
    with pytest.raises(ValueError, match="values are 0 to 255 and would be black in 16 bits"):
        PROCESSOR(dark)
    black = dark * np.array([0, 0, 0, 1], np.uint16)
    want = PROCESSOR(np.zeros((*GREY.shape, 3), np.uint8)).pixel_values
    assert np.array_equal(PROCESSOR(black).pixel_values, want)


@pytest.mark.parametrize("shape", [(1, 9, 3), (1, 9, 4), (1, 9, 1), (3, 9, 1), (4, 9, 1)])
def test_images_of_one_row_or_column_need_their_format(shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(ValueError, match=r'input_data_format="channels_last"'):
            PROCESSOR(image)
    if shape[2] != 1:
        want = PROCESSOR(Image.fromarray(array)).pixel_values
        got = PROCESSOR(array, input_data_format="channels_last").pixel_values
        assert np.array_equal(got, want)
    if shape[0] != 4:
        last = Image.fromarray(
            np.squeeze(array.transpose(1, 2, 0)[..., : shape[0]]).reshape(
                (9, shape[2]) if shape[0] == 1 else (9, shape[2], 3)
            )
        )
        got = PROCESSOR(array, input_data_format="channels_first").pixel_values
        assert np.array_equal(got, PROCESSOR(last).pixel_values)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_a_format_that_does_not_fit_is_named(data_format):
    shape = (9, 8, 3) if data_format == "channels_first" else (3, 8, 9)
    with pytest.raises(ValueError, match=rf"1, 3 or 4 channels, .* as {data_format} has 9"):
        PROCESSOR(np.zeros(shape, np.uint8), input_data_format=data_format)


def test_a_grey_array_takes_any_format():
    want = PROCESSOR(GREY).pixel_values
    for data_format in ("channels_first", "channels_last"):
        assert np.array_equal(PROCESSOR(GREY, input_data_format=data_format).pixel_values, want)
