"""What may be asked of one call, checked before anything is allocated; a refusal names argument and bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from mllama.limits import Limits
from mllama.processing.paths import FILES_REFUSED, AllowPaths
from mllama.processing.sources import ImageOpenError, names_file
from mllama.wording import quoted


def check_limits(limits: Any) -> None:
    """Raises: TypeError for what is no `Limits`."""
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be mllama.limits.Limits or None, got {type(limits).__name__}")


def check_texts(texts: Collection[str], limits: Limits) -> None:
    """Raises: ValueError for too many texts or characters."""
    check_count("text", len(texts), "texts", "max_texts", limits.max_texts)
    characters = sum(map(len, texts))
    check_count("text", characters, "characters", "max_text", limits.max_text)


def check_bytes(texts: Collection[str], limits: Limits) -> None:
    """Before they become tokens, of which there can be one for each byte.

    Raises: ValueError for more bytes than the limits allow, as UTF-8.
    """
    count = sum(map(len, texts))
    if 4 * count > limits.max_text_bytes:
        count = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        check_count("text", count, "bytes as UTF-8", "max_text_bytes", limits.max_text_bytes)


def check_samples(
    samples: Sequence[Sequence[Any]], limits: Limits, allow_paths: AllowPaths
) -> None:
    """How many images there are, and whether one is to be read from the disk though none may.

    Raises: ValueError; ImageOpenError naming the image.
    """
    check_count("images", len(samples), "samples", "max_texts", limits.max_texts)
    check_count("images", sum(map(len, samples)), "images", "max_images", limits.max_images)
    if allow_paths is not False:
        return
    for i, sample in enumerate(samples):
        for j, source in enumerate(sample):
            if names_file(source):
                raise ImageOpenError(f"images[{i}][{j}] {FILES_REFUSED}")


def check_mask(
    input_ids: Sequence[Sequence[int]], samples: Sequence[Sequence[Any]], tiles: int, limits: Limits
) -> None:
    """Raises: ValueError for a cross_attention_mask of more numbers than the limits allow."""
    shape = (len(input_ids), max(map(len, input_ids)), max(map(len, samples)), tiles)
    check_array("cross_attention_mask", shape, "max_mask_values", limits.max_mask_values)


def check_array(name: str, shape: tuple[int, ...], bound: str, most: int) -> None:
    """Raises: ValueError for an array of more than `most` numbers."""
    check_count(f"{name} of shape {shape}", math.prod(shape), "numbers", bound, most)


def check_count(name: str, count: int, what: str, bound: str, most: int) -> None:
    """Raises: ValueError for more than `most`."""
    if count > most:
        raise ValueError(f"{name} has {quoted(count)} {what}; at most {most} are taken ({bound})")
