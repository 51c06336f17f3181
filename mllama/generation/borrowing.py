"""The cache of a call that brings none and keeps none: rows of the store that the model keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mllama.cache import MllamaCache
from mllama.engine.lending import Need, rounded_pages
from mllama.engine.pages import PAGE_SIZE
from mllama.stores import KeyValueStore


def need_of(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Need:
    """What the call takes whose prompt is read with ``inputs``."""
    rows, columns = inputs["attention_mask"].shape
    slots, tokens_per_tile = 0, 0
    if (pixels := inputs.get("pixel_values")) is not None:
        slots = pixels.shape[:3].numel()
        tokens_per_tile = model.config.vision_config.num_patches
    elif (states := inputs.get("cross_attention_states")) is not None:
        slots, tokens_per_tile = states.shape[:2]
    return Need(
        rows=rows,
        pages=rounded_pages(columns + new_tokens),
        slots=slots,
        tokens_per_tile=tokens_per_tile,
        dtype=model.dtype,
        device=model.device,
    )


def require_borrowed_room(model: Any, need: Need, empty: MllamaCache) -> None:
    """Raises: ValueError if the store would have to be made anew and does not fit into memory."""
    if not model.kept_store.has_room(need):
        empty.require_room(need.pages * PAGE_SIZE, freed=model.kept_store.nbytes_freed)


@contextmanager
def borrowed_cache(model: Any, need: Need) -> Iterator[MllamaCache]:
    """A cache for the length of a call."""
    config = model.config.get_text_config()

    def make(pages: int, slots: int, tokens_per_tile: int) -> KeyValueStore:
        return KeyValueStore(
            config,
            dtype=need.dtype,
            device=need.device,
            num_pages=pages,
            num_slots=slots,
            tokens_per_tile=tokens_per_tile,
        )

    with model.kept_store.lend(need, make, model.kept_steps.has) as rows:
        yield MllamaCache(
            config,
            need.rows,
            dtype=need.dtype,
            device=need.device,
            max_tokens=need.pages * PAGE_SIZE,
            lent=rows,
        )
