"""One decode step: the latest token of each of some sequences, and where the step reads and writes.

A step reads nothing on the host. What changes from step to step lies on the device and goes on in place, so
that the step can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllama.engine.pages import SCRATCH_PAGE
from mllama.packed import PackedTokens
from mllama.stores import KeyValueStore, PagedRows
from mllama.tiles import TileView
from mllama.varlen import VarlenBatch


def power_of_two(count: int) -> int:
    """The next one that is no smaller; 0 for 0."""
    return 2 ** (count - 1).bit_length() if count else 0


class StepShape(NamedTuple):
    """How many sequences a step has, and pages and tiles for each: what a captured one cannot change."""

    rows: int
    pages: int
    tiles: int


@dataclass
class DecodeRows:
    """The sequences of a step.

    Attributes:
        tokens: (B,) int64, the latest of each; a negative marker where there is none.
        positions: (B,) int64, theirs.
        lengths: (B,) int32, the tokens before them.
        page_table: (B, P) int32.
        tile_table: (B, T) int32; None if no sequence has a tile.
        view: (B, T) and (B,), what the tokens see.
    """

    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    page_table: Tensor
    tile_table: Tensor | None
    view: TileView
    _varlen: VarlenBatch = field(init=False)

    def __post_init__(self) -> None:
        self._varlen = VarlenBatch.dense(len(self.tokens), 1, self.tokens.device)

    @classmethod
    def of_cache(cls, cache: Any) -> DecodeRows:
        """Those of a :class:`mllama.MllamaCache`, whose tensors go on with the steps, but for the count of
        columns; the tokens are still to be told."""
        return cls(
            tokens=torch.zeros_like(cache.lengths, dtype=torch.int64),
            positions=cache.next_position.squeeze(1),
            lengths=cache.lengths,
            page_table=cache.page_table,
            tile_table=cache.tile_table if cache.num_tiles else None,
            view=cache.visible_tiles.view,
        )

    @classmethod
    def of_tokens(cls, ids: Tensor, packed: PackedTokens) -> DecodeRows:
        """Of packed tokens, one of each sequence."""
        rows = packed.cache
        assert rows is not None
        return cls(
            ids, packed.positions, rows.lengths, rows.page_table, packed.tile_table, packed.view
        )

    @classmethod
    def buffers(cls, shape: StepShape, device: torch.device) -> DecodeRows:
        """Of a shape, to be loaded; written in any mode."""

        def made(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape.rows, *size, dtype=dtype, device=device)

        with torch.inference_mode(False):
            table, view = None, TileView(None, None)
            if shape.tiles:
                table = made(shape.tiles, dtype=torch.int32)
                view = TileView(made(shape.tiles, dtype=torch.bool), made(dtype=torch.bool))
            return cls(
                tokens=made(dtype=torch.int64),
                positions=made(dtype=torch.int64),
                lengths=made(dtype=torch.int32),
                page_table=made(shape.pages, dtype=torch.int32),
                tile_table=table,
                view=view,
            )

    @property
    def shape(self) -> StepShape:
        tiles = 0 if self.tile_table is None else self.tile_table.shape[1]
        return StepShape(*self.page_table.shape, tiles)

    def load(self, others: DecodeRows) -> None:
        """Take over other sequences, no larger in any number; rows that are left write to the scratch page
        and see nothing."""
        _put(self.tokens, others.tokens, 0)
        _put(self.positions, others.positions, 0)
        _put(self.lengths, others.lengths, 0)
        _put(self.page_table, others.page_table, SCRATCH_PAGE)
        if self.tile_table is None:
            return
        table, seen, sees = others.tile_table, others.view.tile_mask, others.view.row_mask
        _put(self.tile_table, table, -1)
        _put(self.view.tile_mask, torch.ones_like(table) if seen is None else seen, 0)
        _put(self.view.row_mask, torch.ones_like(table[:, 0]) if sees is None else sees, 0)

    def logits(self, model: Any, store: KeyValueStore) -> Tensor:
        """(B, V), of the tokens after these; then keys and values of these are stored, and counted."""
        packed = PackedTokens(
            self.positions,
            self._varlen,
            PagedRows(store, self.page_table, self.lengths),
            self.tile_table,
            self.view,
        )
        logits = model.packed_logits(self.tokens.clamp_min(0), packed)  # a marker has no embedding
        self.lengths.add_(1)
        self.positions.add_(1)
        return logits


def _put(buffer: Tensor, values: Tensor, rest: int) -> None:
    """The values at the beginning of a buffer, ``rest`` elsewhere."""
    if values.shape != buffer.shape:
        buffer.fill_(rest)
    buffer[tuple(map(slice, values.shape))] = values
