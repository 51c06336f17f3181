"""Opening pictures that somebody else made: formats, sizes and damage are checked before use.

Nothing is fetched from a network, and the format is read from the bytes, never from the name.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, features

from mllama.processing.headers import announced_sizes, check_slow_ppm
from mllama.processing.pixels import DEEP_MODES, grey_image
from mllama.processing.sources import ImageOpenError, read_source

# An AVIF may hold more than its header announces; its library stops at 16384 x 16384.
_AVIF = ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", *_AVIF)
MAX_PIXELS = 89_478_485  # Pillow's own warning limit; an RGB copy is 256 MiB
MAX_BYTES = 128 * 2**20

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor

_FOREIGN = (  # files people try that are not pictures we read: (first bytes, name)
    (b"%PDF", "a PDF document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document, perhaps an SVG drawing"),
    (b"<!DOCTYPE", "an HTML or SVG document"),
    (b"<html", "an HTML page"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"),
)


def open_image(
    source: str | os.PathLike | bytes | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image:
    """Decode a picture to RGB, turned upright by its EXIF orientation.

    The first frame of an animation or a multi-page file is taken, the largest of an icon. Alpha is
    dropped, not blended, which is what the published processor does with files. Deeper pictures than 8
    bits become what an 8-bit export of them is (see `mllama.processing.pixels`).

    Args:
        source: a path, a `data:image/...;base64,` URI, bare base64, the bytes of a file, or a binary
            file object (read from its current position).
        max_pixels: width times height allowed, checked from the header before decoding.
        max_bytes: length of the file allowed, checked before reading where the length is known.
    Returns: a loaded image in mode "RGB".
    Raises: ImageOpenError naming the picture: missing, empty, too large, not one of `FORMATS`,
        truncated or damaged; TypeError for a source of another kind.
    """
    image, name = _identified(source, max_pixels, max_bytes)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # as above: zlib, struct, EOF, OSError, SyntaxError, ...
        raise ImageOpenError(f"{name} is truncated or damaged: {_reason(error)}") from error
    try:
        deep = image.mode in DEEP_MODES
        return (grey_image(upright, image) if deep else upright).convert("RGB")
    except ValueError as error:
        raise ImageOpenError(f"{name} ({image.mode}): {error}") from None


def check_image(
    source: str | os.PathLike | bytes | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> None:
    """What `open_image` checks before it decodes: that the file is there and its header is right.

    Raises: as `open_image`, but for what only decoding finds.
    """
    _identified(source, max_pixels, max_bytes)


def load_image(
    source: ImageSource,
    *,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Image.Image | np.ndarray | torch.Tensor:
    """Open what has to be opened; pass decoded pictures, arrays and tensors through.

    A PIL image keeps its mode and is not rotated: whoever opened it has decided that.

    Raises: as `open_image`; also for a PIL image whose file turns out to be too large or damaged.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return source
    if not isinstance(source, Image.Image):
        return open_image(source, max_pixels=max_pixels, max_bytes=max_bytes)
    _check_pixels(source.size, name, max_pixels)
    try:
        source.load()
    except Exception as error:
        raise ImageOpenError(f"{name} is truncated or damaged: {_reason(error)}") from error
    return source


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with anything transparent laid on white; an RGB image is returned as it is.

    Raises: ValueError for the values of a picture of more than 8 bits, see `mllama.processing.pixels`.
    """
    if image.mode == "RGB":
        return image
    if image.mode in DEEP_MODES:
        image = grey_image(image)
    if image.mode in ("1", "L", "CMYK") and "transparency" not in image.info:
        return image.convert("RGB")  # no alpha: the blend below would change nothing
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def nest_images(images: Any) -> list[list[ImageSource]]:
    """Bring every accepted nesting to one list of pictures per sample.

    A single picture is one sample with one picture; a flat list is *one* sample with all of them; a
    list of lists is taken as it is, empty samples included; a 4-dimensional array or tensor is one
    sample with its pictures, and a list of such arrays has one sample per array.

    Raises: TypeError or ValueError saying which entry is not a picture.
    """
    if _is_picture(images):
        return [_split_batch(images, "images")]
    if not isinstance(images, Sequence):
        raise TypeError(f"images must be pictures or (nested) lists of pictures, {_got(images)}")
    if all(isinstance(sample, (list, tuple)) for sample in images):
        for i, sample in enumerate(images):
            for j, picture in enumerate(sample):
                if not _is_picture(picture):
                    raise TypeError(f"images[{i}][{j}] is not a picture, {_got(picture)}")
        return [list(sample) for sample in images]
    for i, picture in enumerate(images):
        if not _is_picture(picture):
            raise TypeError(
                f"images[{i}] is not a picture, {_got(picture)}; a batch is a list with one list "
                "of pictures per sample, [] where a sample has none"
            )
    if getattr(images[0], "ndim", 3) == 4:
        return [_split_batch(batch, f"images[{i}]") for i, batch in enumerate(images)]
    return [list(images)]


def _identified(
    source: str | os.PathLike | bytes | BinaryIO, max_pixels: int, max_bytes: int
) -> tuple[Image.Image, str]:
    """An image whose header has been read and checked, and what to call it."""
    data, name = read_source(source, max_bytes)
    if not data:
        raise ImageOpenError(f"{name} is empty (0 bytes)")
    try:
        check_slow_ppm(data, name)
        for size in announced_sizes(data):
            _check_pixels(size, name, max_pixels)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(image.size, name, max_pixels)
        return image, name
    except ImageOpenError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageOpenError(f"{name} is too large: {error}") from None
    except Image.UnidentifiedImageError:
        raise ImageOpenError(f"{name} {_describe(data)}") from None
    except Exception as error:  # Pillow's parsers raise many kinds on damaged headers
        raise ImageOpenError(f"{name} has a damaged header: {_reason(error)}") from error


def _is_picture(value: Any) -> bool:
    kinds = (str, os.PathLike, bytes, bytearray, Image.Image, np.ndarray, torch.Tensor)
    return isinstance(value, kinds) or hasattr(value, "read")


def _split_batch(picture: Any, name: str) -> list[ImageSource]:
    ndim = getattr(picture, "ndim", 3)
    if ndim == 4:
        return list(picture)
    if ndim not in (2, 3):
        raise ValueError(
            f"{name} has {ndim} dimensions, shape {tuple(picture.shape)}; expected 2 (a grey picture), "
            "3 (one with channels first or last) or 4 (several)"
        )
    return [picture]


def _got(value: Any) -> str:
    return f"got {type(value).__name__}"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageOpenError(
            f"{name} is {width} x {height} = {width * height} pixels; at most {max_pixels} are "
            "decoded (max_pixels)"
        )
    if width < 1 or height < 1:
        raise ImageOpenError(f"{name} is {width} x {height} pixels; it needs at least one")


def _describe(data: bytes) -> str:
    wanted = ", ".join(FORMATS)
    head = data[:64].lstrip()
    if data[4:8] == b"ftyp":
        return f"is an HEIF, AVIF or video file that cannot be read; supported are {wanted}"
    for magic, what in _FOREIGN:
        if head[: len(magic)].lower() == magic.lower():
            return f"is {what}, not a picture in one of {wanted}"
    return f"is not a picture in one of {wanted}, or cut off in its header; it starts {data[:16]!r}"
