"""Keys and values of earlier tokens and of images, preallocated and paged.

Self-attention: every layer has a pool of pages, (num_pages, Hkv, page_size, D) for k and for v, and
``page_table`` (B, max_pages) int32 says which pages hold a sequence. Cross-attention: every layer has a
pool of tiles, (num_slots, P, Hkv, D), k already normalised, and ``tile_table`` (B, T) int32 says which
slots hold the tiles a sequence may see, -1 for a tile that is not stored.

``lengths`` and ``next_position`` live on the device and are updated in place, so a decode step needs
nothing from the host and can be captured in a CUDA graph. The pools stay where they are as long as
there is room; what a prefill makes anew, ``settle`` moves to the place it had before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor

from mllama.config import MllamaTextConfig
from mllama.config_fields import integer, value_problem
from mllama.memory import require_room
from mllama.tiles import LOOSE, PADDING, ImageTiles, TileView, VisibleTiles
from mllama.wording import quoted

PAGE_SIZE = 64
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
        captured: the step that ``generate`` has captured on these tensors. It lives as long as the
            cache and is left out when that is copied or pickled.
    """

    def __init__(
        self,
        config: MllamaTextConfig,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_tokens: int | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens}
        given = [name for name, value in sizes.items() if value is not None]
        if problems := [p for name in given for p in value_problem(name, _SIZES[name], sizes)]:
            raise ValueError("; ".join(problems))
        self.batch_size, self.max_tokens = sizes["batch_size"], sizes["max_tokens"]
        self._self_index = {layer: i for i, layer in enumerate(config.self_attention_layers)}
        self._cross_index = {
            layer: i for i, layer in enumerate(sorted(config.cross_attention_layers))
        }
        self._heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._options = {"dtype": dtype, "device": device}
        # (layers, 2, num_pages, Hkv, page_size, D) and (layers, 2, num_slots, P, Hkv, D)
        self._pages = torch.empty(
            len(self._self_index), 2, 0, self._heads, PAGE_SIZE, self._head_dim, **self._options
        )
        self._tiles = torch.empty(
            len(self._cross_index), 2, 0, 0, self._heads, self._head_dim, **self._options
        )
        self.page_table = torch.empty(batch_size, 0, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.next_position = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.captured: Any = None
        self._places: tuple[Tensor | None, ...] = (None, None, None)
        self.reset()
        if max_tokens is not None:
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
        visible = copy(self.visible_tiles)
        visible.view = visible.view.clone()  # settle() may write the next view over this one
        return self.num_tiles_stored, self.tile_table, self.tile_kinds, visible

    def restore_images(self, mark: tuple[int, Tensor, Tensor, VisibleTiles]) -> None:
        self.num_tiles_stored, self.tile_table, self.tile_kinds, self.visible_tiles = mark

    def settle(self) -> None:
        """Move what a prefill has made anew to its place of the last settle(), if that fits.

        A captured step reads the table and the view there, and everything else where it is.
        """
        view = self.visible_tiles.view
        made = (self.tile_table, view.tile_mask, view.row_mask)
        self._places = tuple(map(_moved, made, self._places))
        self.tile_table, tile_mask, row_mask = self._places
        self.visible_tiles.view = TileView(tile_mask, row_mask)

    def step_tensors(self) -> tuple[Tensor | None, ...]:
        """All that a decode step reads and writes here; None for a mask that there is not."""
        view = self.visible_tiles.view
        state = (self.page_table, self.lengths, self.next_position, self.tile_table)
        return (*state, view.tile_mask, view.row_mask, self._pages, self._tiles)

    @property
    def nbytes(self) -> int:
        """Of the pools; the rest is small."""
        return self._pages.nbytes + self._tiles.nbytes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"captured": None}

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

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v pools of a self-attention layer, (num_pages, Hkv, page_size, D)."""
        k, v = self._pages[self._self_index[layer]]
        return k, v

    def tiles(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v pools of a cross-attention layer, (num_slots, P, Hkv, D)."""
        k, v = self._tiles[self._cross_index[layer]]
        return k, v

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

    def check_made_for(
        self, config: MllamaTextConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises: ValueError if it has other layers, heads, a dtype or a device than a model's."""
        layers = (config.self_attention_layers, sorted(config.cross_attention_layers))
        heads = (config.num_key_value_heads, config.head_dim)
        expected = (*layers, *heads, dtype, device)
        own_layers = (list(self._self_index), list(self._cross_index))
        made_for = (*own_layers, self._heads, self._head_dim, self._pages.dtype, self._pages.device)
        names = ("self-attention layers", "cross-attention layers", "key/value heads", "head_dim")
        for name, own, needed in zip((*names, "dtype", "device"), made_for, expected, strict=True):
            if own != needed:
                raise ValueError(
                    f"past_key_values was made for {name} {quoted(own)}, the model has {quoted(needed)}"
                )

    def _require_room(self, max_pages: int, freed: int = 0) -> None:
        layers, _, _, *page = self._pages.shape
        pages = self.batch_size * max_pages
        what = f"a cache of {self.batch_size} sequences with room for {max_pages * PAGE_SIZE} tokens each"
        if pages >= 2**31:
            raise ValueError(f"{what} has {pages} pages; they are counted in 32 bits")
        nbytes = 2 * layers * pages * math.prod(page) * self._pages.itemsize
        require_room(self._pages.device, nbytes, what, freed=freed)

    def _add_pages(self, max_pages: int) -> None:
        batch, old = self.page_table.shape
        first = self._pages.shape[2]
        added = torch.arange(
            first, first + batch * (max_pages - old), dtype=torch.int32, device=self.lengths.device
        )
        self.page_table = torch.cat([self.page_table, added.view(batch, -1)], dim=1)
        layers, _, _, *page = self._pages.shape
        pages = torch.zeros(layers, 2, batch * max_pages, *page, **self._options)
        pages[:, :, :first] = self._pages
        self._pages = pages

    def add_tiles(self, tiles: ImageTiles) -> None:
        """Make room for new tiles, one place each."""
        table, (count, tokens_per_tile) = tiles.table, tiles.states.shape[:2]
        first, stored = self.num_tiles_stored, self._tiles
        if first + count > stored.shape[2] or tokens_per_tile != stored.shape[3]:
            layers, _, _, _, heads, head_dim = stored.shape
            slots = first + (count if self.max_tokens is None else table.numel())
            self._tiles = torch.empty(
                layers, 2, slots, tokens_per_tile, heads, head_dim, **self._options
            )
            if first:
                self._tiles[:, :, :first] = stored[:, :, :first]
        self.tile_table = torch.cat(
            [self.tile_table, torch.where(table >= 0, table + first, -1)], dim=1
        )
        kinds = torch.full_like(table, LOOSE, dtype=torch.int8)
        if tiles.kinds is not None:
            kinds = tiles.kinds.repeat_interleave(table.shape[1] // tiles.kinds.shape[1], dim=1)
        self.tile_kinds = torch.cat([self.tile_kinds, kinds], dim=1)
        self.num_tiles_stored = first + count

    def store_tiles(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the newest tiles' k and v, (n, P, Hkv, D), of one layer."""
        newest = slice(self.num_tiles_stored - k.shape[0], self.num_tiles_stored)
        pool_k, pool_v = self.tiles(layer)
        pool_k[newest], pool_v[newest] = k, v


def _moved(made: Tensor | None, place: Tensor | None) -> Tensor | None:
    """``made`` at ``place`` if that fits, else in a tensor of its own, the place from now on."""
    if made is None or made is place:
        return made
    if place is None or place.shape != made.shape:
        with torch.inference_mode(False):  # to be written in any mode
            return made.clone()
    return place.copy_(made)
