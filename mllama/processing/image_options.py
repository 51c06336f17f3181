"""Options of the image processor: their kinds and ranges, and the types that a config file stores."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllama.limits import Limits
from mllama.wording import quoted

_MOST_CHANNELS = 4


def checked_options(limits: Limits, **options: Any) -> dict[str, Any]:
    """Validate options and bring them to the types that the config file stores.

    Raises: ValueError naming the option, its value and the bound.
    """
    for name in ("do_resize", "do_pad"):
        if not options[name]:
            raise ValueError(f"{name}=False is not supported: the model needs whole tiles")
    tile = _side(options["size"], limits)
    options["size"] = {"height": tile, "width": tile}
    tiles = options["max_image_tiles"]
    if not _is_whole(tiles) or tiles < 1:
        raise ValueError(f"max_image_tiles must be a positive integer, got {quoted(tiles)}")
    if tiles > limits.max_tiles:
        raise ValueError(
            f"max_image_tiles must be up to {limits.max_tiles} (max_tiles), got {quoted(tiles)}"
        )
    for name in ("image_mean", "image_std"):
        options[name] = _per_channel(name, options[name])
    factor = options["rescale_factor"]
    if not _is_number(factor):
        raise ValueError(f"rescale_factor must be a number, got {quoted(factor)}")
    options["resample"] = _filter(options["resample"])
    return options


def _side(size: Any, limits: Limits) -> int:
    if _is_whole(size):
        height = width = size
    elif isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        height, width = size
    elif isinstance(size, Mapping) and "height" in size and "width" in size:
        height, width = size["height"], size["width"]
    else:
        raise ValueError(f"size must be an int or have keys height and width, got {quoted(size)}")
    if not (_is_whole(height) and _is_whole(width)) or height != width or height < 1:
        raise ValueError(
            f"size must be square and positive, got height {quoted(height)}, width {quoted(width)}"
        )
    if height > limits.max_tile_side:
        raise ValueError(
            f"size must be up to {limits.max_tile_side} (max_tile_side), got {quoted(height)}"
        )
    return int(height)


def _per_channel(name: str, value: Any) -> float | list[float]:
    is_list = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
    each = value if is_list else [value]
    few = 1 <= len(each) <= _MOST_CHANNELS  # before they are looked at: range(10**12) has as many
    if not few or not all(map(_is_number, each)) or (name == "image_std" and 0 in each):
        wanted = "not 0, " if name == "image_std" else ""
        raise ValueError(
            f"{name} must be a number, {wanted}or one per channel, got {quoted(value)}"
        )
    return [float(v) for v in each] if is_list else value


def _filter(value: Any) -> int:
    names = {int(kind): kind.name.lower() for kind in Image.Resampling}
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value not in names:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
        raise ValueError(f"resample: {quoted(value)} is not a valid Resampling; there are {known}")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
