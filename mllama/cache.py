"""Keys and values of earlier tokens and of images of a fixed batch: rows of tables into a store, its own or
one that is lent.

``page_table`` (B, max_pages) int32 says which pages of the store hold a sequence, and ``tile_table`` (B, T)
int32 which of its slots hold the tiles a sequence may see, -1 for a tile that is not stored.

``lengths`` and ``next_position`` live on the device and are updated in place, so a decode step needs
nothing from the host. The store stays where it is as long as there is room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor

from mllama.config import MllamaTextConfig
from mllama.config_fields import integer, value_problem
from mllama.engine.pages import PAGE_SIZE
from mllama.memory import require_room
from mllama.stores import KeyValueStore, LentRows
from mllama.tiles import LOOSE, PADDING, ImageTiles, VisibleTiles

_SIZES = {"batch_size": integer(1, 2**20), "max_tokens": integer(1, 2**31 - 1)}


class MllamaCache:
    """The ``past_key_values`` of the models in this package.

    Args:
        config: of the text tower.
        batch_size: B, the number of sequences.
        dtype, device: of keys and values.
        max_tokens: tokens per sequence to make room for. None: pages are added as needed, each time at
            least doubling. A number: all room is made now, and needing more is an error; images take
            room for all their tiles, so that after reset() others fit where they were.

    Attributes:
        store: the keys and values.
        lengths: (B,) int32, tokens stored per sequence (padding is not stored).
        next_position: (B, 1) int64, default position of the next token of each sequence.
        columns: text columns seen so far, padding included: what `transformers` calls the sequence
            length. Kept on the host; no sequence is longer.
        tile_table: (B, T) int32; T grows when images are added.
        tile_kinds: (B, T) int8, of which kind of image a tile is, see :mod:`mllama.tiles`; PADDING also
            where the image is forgotten.
        visible_tiles: those that the next token of each sequence sees without a mask of its own.
        texts: the tokens of each sequence, if ``generate`` has put them there; then it tells from
            them how much of the next prompt is here already.
        prompt_lengths: then also how many of these tokens each sequence has read; it has made the rest.
    """

    def __init__(
        self,
        config: MllamaTextConfig,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int | None = None,
        lent: LentRows | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        given = [name for name, value in sizes.items() if value is not None]
        if problems := [p for name in given for p in value_problem(name, _SIZES[name], sizes)]:
            raise ValueError("; ".join(problems))
        self.batch_size, self.max_tokens = sizes["batch_size"], sizes["max_tokens"]
        self._slots: Tensor | None = None
        if lent is None:
            self.store = KeyValueStore(config, dtype=dtype, device=device)
            self.page_table = torch.empty(batch_size, 0, dtype=torch.int32, device=device)
        else:
            self.store = lent.store
            self.page_table = torch.tensor(lent.pages, dtype=torch.int32).to(device)
            self._slots = torch.tensor(lent.slots, dtype=torch.int64).to(device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.next_position = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.reset()
        if max_tokens is not None and lent is None:
            self._require_room(-(-max_tokens // PAGE_SIZE))
            self._add_pages(-(-max_tokens // PAGE_SIZE))

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Within it tokens are added in several steps; where one fails, those before it are forgotten too."""
        lengths, position = self.lengths.clone(), self.next_position.clone()
        columns = self.columns
        try:
            yield
        except BaseException:
            self.lengths.copy_(lengths)
            self.next_position.copy_(position)
            self.columns = columns
            raise

    def reset(self) -> None:
        """Forget all tokens and images; the memory is kept for the next use."""
        self.lengths.zero_()
        self.next_position.zero_()
        self.columns = 0
        self.num_tiles_stored = 0
        self.tile_table = torch.empty(
            self.batch_size, 0, dtype=torch.int32, device=self.lengths.device
        )
        self.tile_kinds = torch.empty_like(self.tile_table, dtype=torch.int8)
        self.visible_tiles = VisibleTiles()
        self.texts: list[list[int]] | None = None
        self.prompt_lengths: list[int] | None = None

    def truncate(self, lengths: list[int], offset: Tensor | None = None) -> None:
        """Forget the tokens of each sequence after the first ``lengths[b]``.

        Images stay, and a ``cross_attention_mask`` for a forward still covers them. Without a mask the
        next token sees what the last kept one saw. ``generate`` forgets the images whose token is gone.

        Args:
            offset: (B, 1) int64, how far the position of a sequence's next token is ahead of its
                length: 0 unless padding was counted. By default as far as it is.
        """
        if offset is None:
            offset = self.next_position - self.lengths.unsqueeze(1)
        kept = torch.tensor(lengths, dtype=torch.int32)
        self.lengths.copy_(kept)
        self.visible_tiles.truncate(self.lengths)
        self.next_position.copy_(self.lengths.unsqueeze(1) + offset)
        self.columns = max(lengths)
        if self.texts is not None:
            self.texts = [text[:length] for text, length in zip(self.texts, lengths)]

    def image_kinds(self, tiles_per_image: int) -> list[list[int]]:
        """The kind of image at each place of each sequence.

        Every forward with new images appends as many places to each sequence as the one with the most
        needs; they are PADDING in the others.
        """
        return self.tile_kinds[:, ::tiles_per_image].tolist()

    def keep_images(self, places: list[list[int]], tiles_per_image: int) -> None:
        """Forget all images but those at the ``places`` of each sequence."""
        count = 1 + max((place for row in places for place in row), default=-1)
        kept = torch.zeros(self.batch_size, count, tiles_per_image, dtype=torch.bool)
        for sequence, row in zip(kept, places):
            sequence[row] = True
        kept = kept.to(self.tile_kinds.device)
        self.visible_tiles.keep_images(kept)
        kinds = self.tile_kinds[:, : count * tiles_per_image]
        self.tile_kinds = kinds.masked_fill(~kept.flatten(1), PADDING)
        is_forgotten = (kinds != PADDING) & (self.tile_kinds == PADDING)
        table = self.tile_table[:, : count * tiles_per_image]
        self.tile_table = table.masked_fill(is_forgotten, -1)
        self.num_tiles_stored = int(self.tile_table.max()) + 1 if count else 0

    def mark_images(self) -> tuple[int, Tensor, Tensor, VisibleTiles]:
        """What restore_images() needs to forget the images that are added from here on."""
        return self.num_tiles_stored, self.tile_table, self.tile_kinds, copy(self.visible_tiles)

    def restore_images(self, mark: tuple[int, Tensor, Tensor, VisibleTiles]) -> None:
        self.num_tiles_stored, self.tile_table, self.tile_kinds, self.visible_tiles = mark

    @property
    def nbytes(self) -> int:
        """Of the store; the rest is small."""
        return self.store.nbytes

    def get_seq_length(self) -> int:
        """Text columns seen so far, padding included."""
        return self.columns

    @property
    def capacity(self) -> int:
        """Tokens per sequence that fit without another allocation."""
        return self.page_table.shape[1] * PAGE_SIZE

    @property
    def num_tiles(self) -> int:
        """Tiles per sequence, T, stored or not; 0 before any image."""
        return self.tile_table.shape[1]

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more text columns.

        Raises: ValueError when the cache was made with ``max_tokens`` and they do not fit.
        """
        max_pages = self._pages_for(self.columns, tokens)
        if max_pages > self.page_table.shape[1]:
            self._add_pages(max_pages)

    def require_room(self, tokens: int, columns: int = 0, freed: int = 0) -> None:
        """What reserve() of so many after ``columns`` raises, and a ValueError with the numbers where the
        device has no memory for them, also when ``freed`` bytes are; nothing is allocated."""
        max_pages = self._pages_for(columns, tokens)
        if max_pages > self.page_table.shape[1]:
            self._require_room(max_pages, freed)

    def _pages_for(self, columns: int, tokens: int) -> int:
        """Pages per sequence with room for ``tokens`` more than ``columns``."""
        needed, held = columns + tokens, self.page_table.shape[1]
        if self.max_tokens is not None and needed > self.max_tokens:
            raise ValueError(
                f"the cache was made for max_tokens={self.max_tokens}; it holds {columns} "
                f"and {tokens} more do not fit"
            )
        if needed <= self.capacity:
            return held
        return max(-(-needed // PAGE_SIZE), 2 * held)

    def _require_room(self, max_pages: int, freed: int = 0) -> None:
        pages = self.batch_size * max_pages
        what = f"a cache of {self.batch_size} sequences with room for {max_pages * PAGE_SIZE} tokens each"
        if pages >= 2**31:
            raise ValueError(f"{what} has {pages} pages; they are counted in 32 bits")
        nbytes = pages * self.store.page_nbytes()
        require_room(self.lengths.device, nbytes, what, freed=freed)

    def _add_pages(self, max_pages: int) -> None:
        batch, old = self.page_table.shape
        count = batch * (max_pages - old)
        first = self.store.add_pages(count)
        added = torch.arange(first, first + count, dtype=torch.int32, device=self.lengths.device)
        self.page_table = torch.cat([self.page_table, added.view(batch, -1)], dim=1)

    def add_tiles(self, tiles: ImageTiles) -> None:
        """Make room for new tiles, one place each."""
        table, (count, tokens_per_tile) = tiles.table, tiles.states.shape[:2]
        first, places = self.num_tiles_stored, table + self.num_tiles_stored
        if self._slots is None:
            self._make_room_for_tiles(first, table, count, tokens_per_tile)
        else:
            places = self._slots[places.clamp_min(0)].int()
        self.tile_table = torch.cat([self.tile_table, torch.where(table >= 0, places, -1)], dim=1)
        kinds = torch.full_like(table, LOOSE, dtype=torch.int8)
        if tiles.kinds is not None:
            kinds = tiles.kinds.repeat_interleave(table.shape[1] // tiles.kinds.shape[1], dim=1)
        self.tile_kinds = torch.cat([self.tile_kinds, kinds], dim=1)
        self.num_tiles_stored = first + count

    def _make_room_for_tiles(
        self, first: int, table: Tensor, count: int, tokens_per_tile: int
    ) -> None:
        slots, stored_tokens = self.store.tile_values.shape[2:4]
        if first + count > slots or tokens_per_tile != stored_tokens:
            slots = first + (count if self.max_tokens is None else table.numel())
            self.store.resize_tiles(slots, tokens_per_tile, kept=first)

    def store_tiles(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the newest tiles' k and v, (n, P, Hkv, D), of one layer."""
        newest: Any = slice(self.num_tiles_stored - k.shape[0], self.num_tiles_stored)
        if self._slots is not None:
            newest = self._slots[newest]
        pool_k, pool_v = self.store.tiles(layer)
        pool_k[newest], pool_v[newest] = k, v
