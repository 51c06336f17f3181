"""How large an engine's pools and batches are: as asked for, or by what there is memory for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllama.engine.pages import PAGE_SIZE
from mllama.engine.plan import Limits
from mllama.memory import free_bytes, require_room
from mllama.stores import KeyValueStore

# What a prompt may take of a step besides the tokens that are decoded.
_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
# Of the memory that is free, for pages and for tiles, where nobody says how many.
_PAGE_SHARE, _TILE_SHARE = 0.5, 0.25
_PICTURES = 4  # of a prompt, for which there are slots at least


@dataclass(frozen=True)
class Sizes:
    """What an engine is made with.

    Attributes:
        limits: of steps and sequences.
        num_pages: without the scratch page.
        num_slots: for image tiles.
        tokens_per_tile: that a slot holds.
        slot_bytes: of one.
    """

    limits: Limits
    num_pages: int
    num_slots: int
    tokens_per_tile: int
    slot_bytes: int


def engine_sizes(
    model: Any,
    store: KeyValueStore,
    *,
    max_batch_size: int,
    max_batch_tokens: int | None,
    max_prefills: int,
    max_new_pictures: int,
    max_length: int | None,
    num_pages: int | None,
    num_slots: int | None,
) -> Sizes:
    """Settle what is None; the arguments are those of the engine.

    Args:
        store: of the model, empty.
    Raises: ValueError with the numbers for what contradicts another, or the model, or memory does not hold.
    """
    context = model.config.get_text_config().max_position_embeddings
    if max_length is not None and max_length > context:
        raise ValueError(f"max_length={max_length} is beyond the model's context, {context}")
    longest = context if max_length is None else max_length
    free = free_bytes(model.device)
    if num_pages is None:
        num_pages = max_batch_size * _pages_for(longest)
        if free is not None:
            num_pages = min(num_pages, int(free * _PAGE_SHARE) // store.page_nbytes())
    if num_pages < 1:
        raise ValueError(f"an engine needs a page at least, got num_pages={num_pages}")
    if max_length is None:
        longest = min(longest, num_pages * PAGE_SIZE)
    elif num_pages < _pages_for(longest):
        raise ValueError(
            f"max_length={max_length} takes {_pages_for(longest)} pages of {PAGE_SIZE} tokens, there are "
            f"{num_pages}"
        )
    num_slots, tokens_per_tile, slot_bytes = _slots(model, store, max_batch_size, num_slots, free)
    nbytes = (num_pages + 1) * store.page_nbytes() + num_slots * slot_bytes
    what = f"{num_pages} pages of {PAGE_SIZE} tokens and {num_slots} image tiles"
    require_room(model.device, nbytes, what, "give fewer by num_pages and num_slots")
    if max_batch_tokens is None:
        max_batch_tokens = max(_BATCH_TOKENS.get(model.device.type, 512), max_batch_size)
    limits = Limits(
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        max_prefills=max_prefills,
        max_new_pictures=max_new_pictures,
        max_length=longest,
    )
    return Sizes(limits, num_pages, num_slots, tokens_per_tile, slot_bytes)


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _slots(
    model: Any, store: KeyValueStore, max_batch_size: int, num_slots: int | None, free: int | None
) -> tuple[int, int, int]:
    """How many, of how many tokens and bytes; none for a model without images."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return 0, 0, 1
    nbytes = store.slot_nbytes(vision.num_patches)
    if num_slots is None:
        fewest = _PICTURES * vision.max_num_tiles
        num_slots = fewest * max_batch_size
        if free is not None:
            num_slots = min(num_slots, max(int(free * _TILE_SHARE) // nbytes, fewest))
    return num_slots, vision.num_patches, nbytes
