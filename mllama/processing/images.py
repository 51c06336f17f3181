"""Opening images that somebody else made: formats, sizes and damage are checked before use.

Nothing is fetched from a network, and the format is read from the bytes, never from the name.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, features

from mllama.limits import OWN_FILES, Limits
from mllama.processing.headers import check_structure
from mllama.processing.headers.budget import Budget
from mllama.processing.headers.directories import walk_exif
from mllama.processing.paths import AllowPaths
from mllama.processing.pixels import DEEP_MODES, grey_image
from mllama.processing.sources import ImageOpenError, check_bytes, read_source
from mllama.wording import shown

_AVIF = ("AVIF",) if "avif" in features.modules and features.check("avif") else ()
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", *_AVIF)

ImageSource = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor

_COPIES = 8  # bytes a pixel: four of RGBA, and as many of what it is converted to
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,/-]{3,}[A-Za-z]")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FOREIGN = (  # files people try that are not images we read: (first bytes, name)
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
    limits: Limits = OWN_FILES,
    allow_paths: AllowPaths = True,
) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF orientation.

    The first frame of an animation or a multi-page file is taken, the largest of an icon. Alpha is
    dropped, not blended, which is what the published processor does with files. Deeper images than 8
    bits become what an 8-bit export of them is (see `mllama.processing.pixels`).

    Args:
        source: a path, a `data:image/...;base64,` URI, bare base64, the bytes of a file, or a binary
            file object (read from its current position).
        limits: what is accepted: the length is checked before anything is read or copied, the rest from
            the header, before decoding.
        allow_paths: False when nothing may be read from the disk, a folder when only files inside it may.
    Returns: a loaded image in mode "RGB".
    Raises: ImageOpenError naming the image: missing, empty, too large, not one of `FORMATS`,
        truncated or damaged; TypeError for a source of another kind.
    """
    return _opened(source, "image", limits, allow_paths)


def check_image(
    source: str | os.PathLike | bytes | BinaryIO,
    *,
    limits: Limits = OWN_FILES,
    allow_paths: AllowPaths = True,
) -> None:
    """What `open_image` checks before it decodes: that the file is there and its header is right.

    Raises: as `open_image`, but for what only decoding finds.
    """
    _identified(source, "image", limits, allow_paths)


def load_image(
    source: ImageSource,
    *,
    name: str = "image",
    limits: Limits = OWN_FILES,
    allow_paths: AllowPaths = True,
) -> Image.Image | np.ndarray | torch.Tensor:
    """Open what has to be opened; pass decoded images, arrays and tensors through.

    A PIL image keeps its mode and is not rotated: whoever opened it has decided that.

    Raises: as `open_image`; also for a PIL image whose file turns out to be too large or damaged.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim > 1 and 0 not in source.shape:
            Budget(name, limits).size(*sorted(source.shape)[-2:])
        return source
    if not isinstance(source, Image.Image):
        return _opened(source, name, limits, allow_paths)
    _check_lazy(source, Budget(name, limits))
    _load(source, name)
    return source


def load_images(
    samples: Sequence[Sequence[ImageSource]], *, limits: Limits, allow_paths: AllowPaths
) -> list[list[Image.Image | np.ndarray | torch.Tensor]]:
    """`load_image` for every image of every sample."""
    return [
        [
            load_image(image, name=f"images[{i}][{j}]", limits=limits, allow_paths=allow_paths)
            for j, image in enumerate(sample)
        ]
        for i, sample in enumerate(samples)
    ]


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with anything transparent laid on white; an RGB image is returned as it is.

    Raises: ValueError for the values of an image of more than 8 bits, see `mllama.processing.pixels`.
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
    """Bring every accepted nesting to one list of images per sample.

    A single image is one sample with one image; a flat list is *one* sample with all of them; a
    list of lists is taken as it is, empty samples included; a 4-dimensional array or tensor is one
    sample with its images, and a list of such arrays has one sample per array.

    Raises: TypeError or ValueError saying which entry is not an image.
    """
    if is_image(images):
        return [_split_batch(images, "images")]
    if not isinstance(images, Sequence):
        raise TypeError(f"images must be images or (nested) lists of images, {_got(images)}")
    if all(isinstance(sample, (list, tuple)) for sample in images):
        for i, sample in enumerate(images):
            for j, image in enumerate(sample):
                if not is_image(image):
                    raise TypeError(f"images[{i}][{j}] is not an image, {_got(image)}")
        return [list(sample) for sample in images]
    for i, image in enumerate(images):
        if not is_image(image):
            raise TypeError(
                f"images[{i}] is not an image, {_got(image)}; a batch is a list with one list "
                "of images per sample, [] where a sample has none"
            )
    if getattr(images[0], "ndim", 3) == 4:
        return [_split_batch(batch, f"images[{i}]") for i, batch in enumerate(images)]
    return [list(images)]


def _opened(source: Any, name: str, limits: Limits, allow_paths: AllowPaths) -> Image.Image:
    image, budget = _identified(source, name, limits, allow_paths)
    _load(image, budget.name)
    try:
        upright = _upright(image, budget)
    except ImageOpenError:
        raise
    except Exception as error:  # as below
        raise _damaged(budget.name, error) from None
    try:
        if image.mode in DEEP_MODES:
            return grey_image(upright, image).convert("RGB")
        # a copy, which keeps neither the file nor the decoder alive
        return upright if upright is not image and upright.mode == "RGB" else upright.convert("RGB")
    except ValueError as error:
        raise ImageOpenError(f"{budget.name} ({image.mode}): {error}") from None


def _identified(
    source: Any, name: str, limits: Limits, allow_paths: AllowPaths
) -> tuple[Image.Image, Budget]:
    """An image whose structure has been checked and whose header has been read; and its budget.

    Args:
        name: what to call a source that has no name of its own.
    """
    data, name = read_source(source, limits, allow_paths, name)
    if not data:
        raise ImageOpenError(f"{name} is empty (0 bytes)")
    budget = Budget(name, limits)
    kind = check_structure(data, budget)
    if kind not in FORMATS:
        raise ImageOpenError(f"{name} {_describe(data)}")
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageOpenError(
            f"{name} is too large for Pillow as it is set (Image.MAX_IMAGE_PIXELS)"
        ) from None
    except Image.UnidentifiedImageError:
        raise ImageOpenError(f"{name} {_describe(data)}") from None
    except MemoryError:
        raise ImageOpenError(f"{name} takes more memory than there is") from None
    except Exception as error:  # Pillow's parsers raise many kinds on damaged headers
        raise ImageOpenError(f"{name} has a damaged header: {_reason(error)}") from None
    budget.size(*image.size)
    return image, budget


def _check_lazy(image: Image.Image, budget: Budget) -> None:
    """Check a PIL image, and its file where that has not been decoded yet."""
    budget.size(*image.size)
    budget.decoded(_COPIES * image.width * image.height)
    file = getattr(image, "fp", None)  # None as soon as it is decoded
    if file is None:
        return
    try:
        position = file.tell()
        file.seek(0)
        data = file.read(budget.limits.max_bytes + 1)
        file.seek(position)
    except (OSError, ValueError):  # closed: decoding says so
        return
    check_bytes(len(data), budget.name, budget.limits)
    check_structure(data, budget)


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except MemoryError:
        raise ImageOpenError(f"{name} takes more memory than there is") from None
    except Exception as error:  # zlib, struct, EOF, OSError, SyntaxError, ...
        raise _damaged(name, error) from None


def _upright(image: Image.Image, budget: Budget) -> Image.Image:
    """The image, or a turned copy where its Exif or XMP data says so."""
    profile = image.info.get("Raw profile type exif")  # of a PNG: Exif data in a compressed text
    if isinstance(profile, str):
        walk_exif(bytes.fromhex("".join(profile.split("\n")[3:])), budget)
    # Not ImageOps.exif_transpose, which writes all of the Exif data anew.
    method = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def is_image(value: Any) -> bool:
    kinds = (str, os.PathLike, bytes, bytearray, Image.Image, np.ndarray, torch.Tensor)
    return isinstance(value, kinds) or hasattr(value, "read")


def _split_batch(image: Any, name: str) -> list[ImageSource]:
    ndim = getattr(image, "ndim", 3)
    if ndim == 4:
        return list(image)
    if ndim not in (2, 3):
        raise ValueError(
            f"{name} has {ndim} dimensions, shape {tuple(image.shape)}; expected 2 (a grey image), "
            "3 (one with channels first or last) or 4 (several)"
        )
    return [image]


def _got(value: Any) -> str:
    return f"got {type(value).__name__}"


def _damaged(name: str, error: Exception) -> ImageOpenError:
    return ImageOpenError(f"{name} is truncated or damaged: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What Pillow says is wrong, without what it repeats of the file after its first words."""
    words = _WORDS.match(str(error))
    return shown(words[0]) if words else type(error).__name__


def _describe(data: bytes) -> str:
    """What the bytes are, without any of them: they may be a secret that somebody named as an image."""
    wanted = ", ".join(FORMATS)
    head = data[:64].lstrip()
    if data[4:8] == b"ftyp":
        return f"is an HEIF, AVIF or video file that cannot be read; supported are {wanted}"
    for magic, what in _FOREIGN:
        if head[: len(magic)].lower() == magic.lower():
            return f"is {what}, not an image in one of {wanted}"
    return f"is not an image in one of {wanted}, or cut off in its header"
