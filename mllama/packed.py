"""What a forward on packed tokens reads: the text tower computes nothing else, for padded batches as well."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllama.stores import CacheRows
from mllama.tiles import TileView
from mllama.varlen import VarlenBatch


@dataclass(frozen=True)
class PackedTokens:
    """N tokens of B sequences, one sequence after another, and where keys and values are.

    Attributes:
        positions: (N,) int64.
        varlen: how the tokens form sequences (``cu_seqlens``).
        cache: the rows of the sequences, with page table and lengths; None to attend within this call only.
        tile_table: (B, T) int32 slots of the tiles, -1 for none; None if there is no image at all, and then
            the cross-attention layers are skipped.
        view: which tiles each token sees, (N, T), and whether it sees any, (N,).
        tile_states: (n, P, E) of images that are new in this call; None if none is.
    """

    positions: Tensor
    varlen: VarlenBatch
    cache: CacheRows | None
    tile_table: Tensor | None
    view: TileView
    tile_states: Tensor | None = None
