"""Pixels of any depth to 8 bits: the image that an 8-bit export of it would be.

Whole numbers 0..255 are 8-bit values whatever their type is. Others are scaled by the range of their type,
by their high byte, as Pillow reads colour images of 16 bits per channel. What would come out black is
refused, because an image that fills a small part of its range (12 of 16 bits) is meant otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# Bits of the values above 255 that a type can hold. Types of 64 bits have no depth of their own.
_DEPTHS = {"int16": (15,), "uint16": (16,), "int32": (16, 31), "uint32": (16, 32)}
_BAND = 2**18  # numbers that are changed at once
_DARKEST = 16  # an image without a value above this is black to the eye
_PHOTOMETRIC, _SAMPLE_BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of a TIFF file


def eight_bit(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """The uint8 values of an image's numbers, and whether they were floats 0..1.

    Args:
        array: bools; integers 0..255 of any type, or within the range of a type of 16 or 32 bits (32-bit
            types that hold 16-bit values have 16 bits); floats 0..1, or 0..255.
    Raises: ValueError naming the values, also for those that would make a black image.
    """
    if array.dtype == np.uint8:
        return array, False
    if array.dtype == bool:
        return array.astype(np.uint8) * 255, False
    if array.dtype.kind not in "iuf":
        raise ValueError(f"pixels must be numbers, got {array.dtype}")
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        return _from_floats(array, low, high)
    if low >= 0 and high <= 255:
        return array.astype(np.uint8), False
    fitting = [bits for bits in _DEPTHS.get(array.dtype.name, ()) if high < 1 << bits]
    if low < 0 or not fitting:
        raise ValueError(
            f"pixel values are {low} to {high}; expected whole numbers 0..255, or a type of 16 or 32 bits "
            f"that they fill, got {array.dtype}"
        )
    result = (array >> (fitting[0] - 8)).astype(np.uint8)
    # An opaque image may be bright only in its alpha.
    stored, seen = (a[..., :3] if array.ndim == 3 else a for a in (array, result))
    if seen.max() < _DARKEST and stored.any():
        raise ValueError(
            f"pixel values are {stored.min()} to {stored.max()} and would be black in {fitting[0]} bits; "
            f"scale them to 0..{(1 << fitting[0]) - 1}, or to 0..255"
        )
    return result, False


def grey_image(image: Image.Image, opened: Image.Image | None = None) -> Image.Image:
    """An image of one of `DEEP_MODES` as "L", or "LA" where it names a transparent value.

    Args:
        opened: what `image` is a turned copy of, for such copies forget their file's format.
    Raises: ValueError as `eight_bit`.
    """
    opened = opened or image
    stored = np.asarray(image)
    if image.mode == "I":
        stored = stored.astype(_stored_type(opened))
    elif image.mode.startswith("I;16") and _tag(opened, _SAMPLE_BITS) == 12:
        stored = stored << 4
    if image.mode == "F" and stored.min() >= 0 and stored.max() <= 1:
        values = _by_bands(stored, lambda band: np.rint(band.astype(np.float64) * 255))
    else:
        values, _ = eight_bit(stored)
    if image.mode.startswith("I;16") and _tag(opened, _PHOTOMETRIC) == 0:
        values = 255 - values  # Pillow turns 8-bit images whose zero is white, and none of these
    grey = Image.fromarray(values)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(stored == transparent, 0, 255).astype(np.uint8)))
    return grey


def _from_floats(array: np.ndarray, low: float, high: float) -> tuple[np.ndarray, bool]:
    # NaN and infinity have no integer and fall through both tests
    inside = low >= 0 and high <= 255
    if inside and all(np.allclose(band, band.astype(np.int64)) for band in _bands(array)):
        return _by_bands(array, lambda band: band), False
    if inside and high <= 1:
        scaled = _by_bands(array, lambda band: (band.astype(np.float64) * 255).astype(np.float32))
        return scaled, True
    if inside and high >= _DARKEST:
        return _by_bands(array, np.rint), False
    raise ValueError(f"pixel values are {low} to {high}; expected floats 0..1 or 0..255")


def _by_bands(array: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The uint8 values of changed rows, without a copy of the whole image in between."""
    result = np.empty(array.shape, dtype=np.uint8)
    for values, band in zip(_bands(result), _bands(array)):
        values[...] = change(band).astype(np.uint8)
    return result


def _bands(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(_BAND * len(array) // array.size, 1)
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _stored_type(image: Image.Image) -> str:
    """The type of the numbers that Pillow gives as int32."""
    if image.format in ("PNG", "PPM"):
        return "uint16"
    bits, kind = _tag(image, _SAMPLE_BITS), _tag(image, _SAMPLE_FORMAT) or 1
    return f"{'uint' if kind == 1 else 'int'}{bits}" if bits in (16, 32) else "int32"


def _tag(image: Image.Image, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value
