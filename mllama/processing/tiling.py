"""Where an image goes: which tiles it gets and how large it is inside them.

The arithmetic is float64 and floors, as the published processor's, because one pixel more or less
changes every resampled value. Source: Llama Team 2024 (arXiv 2407.21783) sec. 7 for the tiles;
the rules themselves are those of the published image processor.
"""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=16)
def supported_aspect_ratios(max_image_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (tile rows, tile columns) of at most `max_image_tiles` tiles; id = position + 1."""
    side = range(1, max_image_tiles + 1)
    return tuple((r, c) for r in side for c in side if r * c <= max_image_tiles)


def best_tile_grid(height: int, width: int, max_image_tiles: int, tile: int) -> tuple[int, int]:
    """The (rows, columns) of tiles that enlarge the image least, else shrink it least.

    Among grids with exactly the same scale the smallest area wins, then the first in the list.
    """
    scales = {
        (r, c): min(r * tile / height, c * tile / width)
        for r, c in supported_aspect_ratios(max_image_tiles)
    }
    fitting = [scale for scale in scales.values() if scale >= 1]
    best = min(fitting) if fitting else max(scales.values())
    return min((g for g, scale in scales.items() if scale == best), key=lambda g: g[0] * g[1])


def size_in_canvas(
    height: int, width: int, canvas_height: int, canvas_width: int, tile: int
) -> tuple[int, int]:
    """The (height, width) of the image inside its canvas, aspect ratio kept by flooring.

    A small image grows until one side is a tile long; one that fits stays as it is; neither side
    ever becomes zero.
    """
    target_height = min(max(height, tile), canvas_height)
    target_width = min(max(width, tile), canvas_width)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(max(math.floor(height * scale_width), 1), target_height), target_width
    return target_height, min(max(math.floor(width * scale_height), 1), target_width)
