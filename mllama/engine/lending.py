"""The pages and slots that a model keeps for calls without a cache of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mllama.engine.pages import PAGE_SIZE, PagePool
from mllama.engine.step import power_of_two
from mllama.memory import free_bytes
from mllama.stores import KeyValueStore, LentRows


class Need(NamedTuple):
    """What a call takes.

    rows, pages: sequences, and pages of each.
    slots: for tiles, of all sequences.
    tokens_per_tile: 0 without slots.
    """

    rows: int
    pages: int
    slots: int
    tokens_per_tile: int
    dtype: torch.dtype
    device: torch.device


def rounded_pages(tokens: int) -> int:
    """Pages with room for ``tokens``, rounded up to a power of two.

    No result depends on the rounding: the splits of decode attention change at powers of two alone
    (csrc/cuda/attention/decode.h).
    """
    return power_of_two(-(-tokens // PAGE_SIZE))


class KeptStore:
    """A store whose rows are lent to the calls of a model, so that steps captured on it serve the next.

    It never grows, which would take it away from captured steps: a call that finds no room makes another,
    which takes its place. That is as large as the one before, and has room for what is lent of it, within a
    sixteenth of the device's memory; a larger one is kept until a call comes that takes less than half of it.

    Copying or pickling gives none.
    """

    def __init__(self) -> None:
        self._pool: _Pool | None = None
        # Reentrant, since the garbage collector may close a suspended stream() anywhere.
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[KeptStore], tuple[()]]:
        return KeptStore, ()

    @property
    def store(self) -> KeyValueStore | None:
        """The one that is kept."""
        pool = self._pool
        return None if pool is None else pool.store

    def clear(self) -> None:
        """Free it; what is lent is not kept either when the calls end."""
        with self._lock:
            self._pool = None

    def has_room(self, need: Need) -> bool:
        """Whether a call would take rows of the one there is."""
        with self._lock:
            return self._pool is not None and self._pool.serves(need)

    @property
    def nbytes_freed(self) -> int:
        """What is given up before another one is made."""
        with self._lock:
            pool = self._pool
            return 0 if pool is None or pool.holders else pool.store.nbytes

    @contextmanager
    def lend(
        self,
        need: Need,
        make: Callable[[int, int, int], KeyValueStore],
        is_worth_keeping: Callable[[KeyValueStore], bool],
    ) -> Iterator[LentRows]:
        """Rows for one call, and nobody else's meanwhile.

        Args:
            make: a store, from pages, slots and tokens per tile.
            is_worth_keeping: asked when nobody has rows any more.
        """
        with self._lock:
            if not self.has_room(need):
                self._replace(need, make)
            pool = self._pool
            assert pool is not None
            rows = pool.take(need)
        try:
            yield rows
        finally:
            with self._lock:
                pool.give_back(rows)
                if pool is self._pool and not pool.holders and not is_worth_keeping(pool.store):
                    self._pool = None

    def _replace(self, need: Need, make: Callable[[int, int, int], KeyValueStore]) -> None:
        old, pages, slots = self._pool, need.rows * need.pages, need.slots
        per_tile = need.tokens_per_tile
        if old is not None and not old.is_wasted_on(need):
            kept_pages = max(old.num_pages, pages + old.num_pages_lent)
            kept_slots, kept_per_tile = slots, per_tile
            if old.tokens_per_tile and per_tile in (0, old.tokens_per_tile):
                kept_per_tile = old.tokens_per_tile
                kept_slots = max(old.num_slots, slots + old.num_slots_lent)
            nbytes = kept_pages * old.store.page_nbytes()
            nbytes += kept_slots * old.store.slot_nbytes(kept_per_tile)
            if nbytes <= min(_budget(need.device), (free_bytes(need.device) or 0) // 2):
                pages, slots, per_tile = kept_pages, kept_slots, kept_per_tile
        self._pool = old = None  # freed first, unless rows of it are lent
        with torch.inference_mode(False):  # to be written in any mode
            self._pool = _Pool(make(pages + 1, slots, per_tile))


class _Pool:
    """A store, and what of it is lent.

    Attributes:
        holders: calls that have rows.
    """

    def __init__(self, store: KeyValueStore) -> None:
        self.store, self.holders = store, 0
        self._pages, self._slots = PagePool(store.num_pages), list(range(store.num_slots))
        self._left: torch.cuda.Event | None = None

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_slots(self) -> int:
        return self.store.num_slots

    @property
    def num_pages_lent(self) -> int:
        return self.num_pages - self._pages.num_free

    @property
    def num_slots_lent(self) -> int:
        return self.num_slots - len(self._slots)

    @property
    def tokens_per_tile(self) -> int:
        return self.store.tile_values.shape[3] if self.num_slots else 0

    def serves(self, need: Need) -> bool:
        values = self.store.page_values
        return (
            (values.dtype, values.device) == (need.dtype, need.device)
            and need.rows * need.pages <= self._pages.num_free
            and need.slots <= len(self._slots)
            and need.tokens_per_tile in (0, self.tokens_per_tile)
            and not self.is_wasted_on(need)
        )

    def is_wasted_on(self, need: Need) -> bool:
        """Whether it is much larger than a call needs, and than what may be kept for any."""
        nbytes = need.rows * need.pages * self.store.page_nbytes()
        nbytes += need.slots * self.store.slot_nbytes(need.tokens_per_tile)
        return 2 * nbytes < self.store.nbytes > _budget(need.device)

    def take(self, need: Need) -> LentRows:
        self._follow()
        pages = [[self._pages.take() for _ in range(need.pages)] for _ in range(need.rows)]
        slots = [self._slots.pop() for _ in range(need.slots)]
        self.holders += 1
        return LentRows(self.store, pages, slots)

    def give_back(self, rows: LentRows) -> None:
        self._follow()
        device = self.store.page_values.device
        if device.type == "cuda":
            self._left = torch.cuda.Event()
            self._left.record(torch.cuda.current_stream(device))
        for page in (page for row in rows.pages for page in row):
            self._pages.release(page)
        self._slots += rows.slots
        self.holders -= 1

    def _follow(self) -> None:
        """What comes is done after the work of the calls that have given their rows back, on whatever
        streams."""
        if self._left is not None:
            device = self.store.page_values.device
            torch.cuda.current_stream(device).wait_event(self._left)


def _budget(device: torch.device) -> int:
    """Of a device's memory what may be kept for calls to come."""
    return torch.cuda.get_device_properties(device).total_memory // 16
