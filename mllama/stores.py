"""Keys and values of pages of text and of image tiles, in all layers: the tensors, whoever holds their rows.

A page holds ``PAGE_SIZE`` tokens in every self-attention layer, a slot an image tile in every cross-attention
layer, its keys normalised already. Who holds which is said elsewhere: by :class:`mllama.MllamaCache` for a
fixed batch, by :mod:`mllama.engine` for sequences that come and go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mllama.config import MllamaTextConfig
from mllama.engine.pages import PAGE_SIZE
from mllama.wording import quoted


class KeyValueStore:
    """The pages and slots of one model.

    Args:
        config: of the text tower.
        dtype, device: of keys and values.
        num_pages, num_slots: to begin with.
        tokens_per_tile: P; 0 where there is no slot yet.

    Attributes:
        page_values: (layers, 2, num_pages, Hkv, PAGE_SIZE, D), of the self-attention layers.
        tile_values: (layers, 2, num_slots, P, Hkv, D), of the cross-attention layers.
    """

    def __init__(
        self,
        config: MllamaTextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        num_pages: int = 0,
        num_slots: int = 0,
        tokens_per_tile: int = 0,
    ) -> None:
        self._self_index = {layer: i for i, layer in enumerate(config.self_attention_layers)}
        self._cross_index = {
            layer: i for i, layer in enumerate(sorted(config.cross_attention_layers))
        }
        self._heads, self._head_dim = config.local_key_value_heads, config.head_dim
        self._options = {"dtype": dtype, "device": device}
        self.page_values = self._new_pages(num_pages)
        self.tile_values = self._new_tiles(num_slots, tokens_per_tile)

    def _new_pages(self, count: int) -> Tensor:
        layers = len(self._self_index)
        return torch.zeros(
            layers, 2, count, self._heads, PAGE_SIZE, self._head_dim, **self._options
        )

    def _new_tiles(self, count: int, tokens_per_tile: int) -> Tensor:
        layers = len(self._cross_index)
        return torch.empty(
            layers, 2, count, tokens_per_tile, self._heads, self._head_dim, **self._options
        )

    @property
    def num_pages(self) -> int:
        return self.page_values.shape[2]

    @property
    def num_slots(self) -> int:
        return self.tile_values.shape[2]

    @property
    def nbytes(self) -> int:
        return self.page_values.nbytes + self.tile_values.nbytes

    def page_nbytes(self) -> int:
        """Of one page."""
        layers, _, _, *page = self.page_values.shape
        return 2 * layers * math.prod(page) * self.page_values.itemsize

    def slot_nbytes(self, tokens_per_tile: int) -> int:
        """Of one slot."""
        layers, _, _, _, heads, head_dim = self.tile_values.shape
        return 2 * layers * tokens_per_tile * heads * head_dim * self.tile_values.itemsize

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of a self-attention layer, (num_pages, Hkv, PAGE_SIZE, D)."""
        k, v = self.page_values[self._self_index[layer]]
        return k, v

    def tiles(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of a cross-attention layer, (num_slots, P, Hkv, D)."""
        k, v = self.tile_values[self._cross_index[layer]]
        return k, v

    def add_pages(self, count: int) -> int:
        """Make room for so many more pages; returns the first of them."""
        first = self.num_pages
        grown = self._new_pages(first + count)
        grown[:, :, :first] = self.page_values
        self.page_values = grown
        return first

    def resize_tiles(self, num_slots: int, tokens_per_tile: int, kept: int) -> None:
        """Other slots, of which the first ``kept`` hold what they held."""
        resized = self._new_tiles(num_slots, tokens_per_tile)
        if kept:
            resized[:, :, :kept] = self.tile_values[:, :, :kept]
        self.tile_values = resized

    def check_made_for(
        self, config: MllamaTextConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises: ValueError if it has other layers, heads, a dtype or a device than a model's."""
        layers = (config.self_attention_layers, sorted(config.cross_attention_layers))
        heads = (config.local_key_value_heads, config.head_dim)
        expected = (*layers, *heads, dtype, device)
        own_layers = (list(self._self_index), list(self._cross_index))
        values = self.page_values
        made_for = (*own_layers, self._heads, self._head_dim, values.dtype, values.device)
        names = ("self-attention layers", "cross-attention layers", "key/value heads", "head_dim")
        for name, own, needed in zip((*names, "dtype", "device"), made_for, expected, strict=True):
            if own != needed:
                raise ValueError(
                    f"past_key_values was made for {name} {quoted(own)}, the model has {quoted(needed)}"
                )


class CacheRows(Protocol):
    """Rows of tables into a store, one for each sequence of a forward: what its layers read and write.

    Attributes:
        store: where keys and values are.
        page_table: (B, max_pages) int32, the pages of each sequence.
        lengths: (B,) int32, the tokens that they hold.
    """

    store: KeyValueStore
    page_table: Tensor
    lengths: Tensor

    def store_tiles(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the k and v of new tiles, (n, P, Hkv, D), of one layer to the slots that wait for them."""
        ...


@dataclass(frozen=True)
class LentRows:
    """Pages and slots of a store that several caches share.

    Attributes:
        pages: of each sequence.
        slots: for the tiles of all.
    """

    store: KeyValueStore
    pages: list[list[int]]
    slots: list[int]


@dataclass(frozen=True)
class PagedRows:
    """The rows of one forward, made for it.

    Attributes:
        store, page_table, lengths: see :class:`CacheRows`.
        new_slots: (n,) int64, of the tiles that are stored.
    """

    store: KeyValueStore
    page_table: Tensor
    lengths: Tensor
    new_slots: Tensor | None = None

    def store_tiles(self, layer: int, k: Tensor, v: Tensor) -> None:
        pool_k, pool_v = self.store.tiles(layer)
        pool_k[self.new_slots], pool_v[self.new_slots] = k, v
