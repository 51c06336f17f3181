"""Which text sees which image: from image tokens to the mask of the cross-attention layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def image_spans(input_ids: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """The half-open range of tokens that sees each image of one (padded) sequence.

    An image is seen from its own token up to the next image token; the last one to the end, right
    padding included. Adjacent image tokens are one group: each is seen to the end of the group's text.
    """
    starts = [i for i, token in enumerate(input_ids) if token == image_token_id]
    ends = [*starts[1:], len(input_ids)]
    for j in reversed(range(len(starts) - 1)):
        if starts[j + 1] == starts[j] + 1:
            ends[j] = ends[j + 1]
    return list(zip(starts, ends))


def cross_attention_mask(
    input_ids: Sequence[Sequence[int]],
    num_tiles: Sequence[Sequence[int]],
    image_token_id: int,
    max_image_tiles: int,
) -> np.ndarray:
    """The dense mask of a batch.

    Args:
        input_ids: padded rows, or rows of different lengths.
        num_tiles: real tiles of every image of every row.
        image_token_id: id of the image token.
        max_image_tiles: T, tile slots of an image.
    Returns: (B, L, N, T) int64 with L the longest row and N the most images of a row; 1 where the
        token sees the tile. Slots of absent tiles and images are 0.
    """
    spans = [image_spans(row, image_token_id) for row in input_ids]
    length = max(len(row) for row in input_ids)
    most = max(len(row) for row in spans)
    mask = np.zeros((len(spans), length, most, max_image_tiles), dtype=np.int64)
    for i, (row, tiles) in enumerate(zip(spans, num_tiles)):
        for j, ((start, end), count) in enumerate(zip(row, tiles)):
            mask[i, start:end, j, :count] = 1
    return mask
