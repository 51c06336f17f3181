"""The images of a prompt: which of them a cache has, and the inputs of the forward that reads the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllama.cache import MllamaCache
from mllama.tiles import LOOSE, PADDING

IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@dataclass(frozen=True)
class CachedImages:
    """Where a cache has the images that a prompt continues with.

    A row has its images in the order of the text, at places that every row has: a turn gives each row
    as many places as the row with the most new images needs. So rows have gaps, and the j-th image of a
    row need not be at place j.

    Attributes:
        tiles: per image.
        count: places per row, up to the last that is in use.
        places: those of each row's images.
        has_tokens: whether images belong to image tokens. Without, all of a cache's images stay.
        is_all: whether these are all images that the cache has.
    """

    tiles: int
    count: int
    places: list[list[int]]
    has_tokens: bool
    is_all: bool

    @classmethod
    def of(
        cls, cache: MllamaCache, tiles: int, old: Sequence[int], new: Sequence[int]
    ) -> CachedImages:
        """Those of the ``old`` image tokens of each row; ``new`` tokens follow.

        Raises: ValueError if the cache has fewer, or images that belong to no token besides.
        """
        stored = cache.num_tiles // tiles
        kinds = cache.image_kinds(tiles) if stored else [[] for _ in old]
        places = [[i for i, kind in enumerate(row) if kind != PADDING] for row in kinds]
        is_loose = any(kind == LOOSE for row in kinds for kind in row)
        if is_loose and not any(old) and not any(new):
            return cls(tiles, stored, places, has_tokens=False, is_all=True)
        held = [len(row) for row in places]
        if any(has < count for has, count in zip(held, old)) or (is_loose and held != list(old)):
            raise ValueError(
                f"past_key_values holds {held} images and the text of {list(old)} image tokens: start "
                "without past_key_values"
            )
        kept = [row[:count] for row, count in zip(places, old)]
        count = 1 + max((place for row in kept for place in row), default=-1)
        return cls(tiles, count, kept, has_tokens=True, is_all=kept == places and count == stored)

    def forget_others(self, cache: MllamaCache) -> None:
        """Make the cache forget its other images."""
        if not self.is_all:
            cache.keep_images(self.places, self.tiles)


def new_images(
    inputs: Mapping[str, Any],
    cached: CachedImages | None,
    old: Sequence[int],
    new: Sequence[int],
    index: Tensor,
    real: Tensor,
) -> dict[str, Any]:
    """The image inputs of a forward over the new columns of a prompt.

    Args:
        inputs: those of a forward over the whole prompt, which may leave out the images in the cache.
        cached: what the cache has; None where no token tells, and the inputs stay as they are.
        old, new: image tokens of each row in the cached and in the new part of its text.
        index: (B, width) the columns of the prompt that are new, from the left.
        real: (B, width) bool, False for padding.
    Raises: ValueError if the images are neither the new ones nor all.
    """
    inputs = dict(inputs)
    if cached is not None and cached.count:
        inputs = _without_old(inputs, cached, old, new)
    mask = inputs.get("cross_attention_mask")
    if mask is not None:
        rows = index[:, :, None, None].expand(-1, -1, *mask.shape[2:])
        mask = mask.gather(1, rows) * real[:, :, None, None]
        most = max(a + b for a, b in zip(old, new))
        if mask.shape[2] < most:
            raise ValueError(
                f"cross_attention_mask covers {mask.shape[2]} images, input_ids has {most}"
            )
        if cached is not None and cached.count and cached.has_tokens:
            mask = _at_places(mask, cached, max(new))
        inputs["cross_attention_mask"] = mask
    return inputs


def _without_old(
    inputs: dict[str, Any], cached: CachedImages, old: Sequence[int], new: Sequence[int]
) -> dict[str, Any]:
    """Without the images that the cache has."""
    states = inputs.get("cross_attention_states")
    if "aspect_ratio_ids" in inputs:
        given = (inputs["aspect_ratio_ids"] > 0).sum(1).tolist()
        if not cached.has_tokens:
            _expect_same(given, [len(row) for row in cached.places], "pixel_values")
            skip = [0] * len(new)
        elif given == [a + b for a, b in zip(old, new)]:
            skip = list(old)
        elif given == list(new):
            skip = [0] * len(new)
        else:
            raise ValueError(
                f"the rows have {given} images in pixel_values; expected the {list(new)} that are new "
                f"in input_ids, or those and the {list(old)} in past_key_values"
            )
        for name in IMAGE_INPUTS:
            if name in inputs:
                inputs[name] = _shift_left(inputs[name], skip, max(new))
        if "aspect_ratio_mask" in inputs:  # a processor gives the first tile of padding, too
            inputs["aspect_ratio_mask"][:, :, 0].masked_fill_(inputs["aspect_ratio_ids"] == 0, 1)
    elif states is not None:
        by_image = states.unflatten(0, (len(new), -1, cached.tiles))
        skip = _images_to_skip(by_image.shape[1], cached, old, new)
        kept = _shift_left(by_image, skip, max(new))
        inputs["cross_attention_states"] = kept.flatten(0, 2)
    elif any(new):
        raise ValueError(
            f"input_ids has {list(new)} new image tokens per row, but no images were given"
        )
    if not any(new):
        return {k: v for k, v in inputs.items() if k == "cross_attention_mask"}
    return inputs


def _images_to_skip(
    given: int, cached: CachedImages, old: Sequence[int], new: Sequence[int]
) -> list[int]:
    """How many images per row of ``cross_attention_states``, ``given`` for every row, the cache has."""
    if not cached.has_tokens:
        _expect_same(given, cached.count, "cross_attention_states")
        return [0] * len(old)
    is_all = given == max(a + b for a, b in zip(old, new))
    is_new = given == max(new)
    if not any(new) or (is_new and all(a == 0 for a, b in zip(old, new) if b)):
        return [0] * len(old)
    if is_all == is_new:
        raise ValueError(
            f"cross_attention_states has {given} images per row; the rows of input_ids have {list(new)} "
            f"new ones besides the {list(old)} in past_key_values, so it is "
            f"{'not clear which these are' if is_all else 'neither the new ones nor all'}: "
            "start without past_key_values"
        )
    return list(old) if is_all else [0] * len(old)


def _expect_same(given: Any, held: Any, name: str) -> None:
    """Without image tokens the images have to be those in the cache."""
    if given != held:
        raise ValueError(
            f"{name} has {given} images per row and past_key_values {held}, and no image token in "
            "input_ids says which of them are new: start without past_key_values"
        )


def _at_places(mask: Tensor, cached: CachedImages, most_new: int) -> Tensor:
    """mask (B, L, M, tiles) of the j-th image of each row to one of the places in the cache."""
    out = mask.new_zeros(*mask.shape[:2], cached.count + most_new, mask.shape[3])
    for row, places in enumerate(cached.places):
        out[row, :, places] = mask[row, :, : len(places)]
        rest = mask[row, :, len(places) : len(places) + most_new]
        out[row, :, cached.count : cached.count + rest.shape[1]] = rest
    return out


def _shift_left(x: Tensor, by: Sequence[int], keep: int) -> Tensor:
    """x (B, M, ...) to (B, keep, ...): each row without its first by[b] entries, zeros after."""
    out = x.new_zeros(x.shape[0], keep, *x.shape[2:])
    for row, count in enumerate(by):
        part = x[row, count : count + keep]
        out[row, : len(part)] = part
    return out
