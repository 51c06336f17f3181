"""From a plan to the tensors that a forward on packed tokens reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mllama.engine.plan import PENDING, Plan
from mllama.packed import PackedTokens
from mllama.semantics import Semantics
from mllama.stores import KeyValueStore, PagedRows
from mllama.tiles import TileView
from mllama.varlen import VarlenBatch


@dataclass(frozen=True)
class Batch:
    """The tokens of a step.

    Attributes:
        ids: (N,) int64.
        packed: where they are, and where their keys and values go.
        last: (S,) int64, the tokens among the N whose next one is sampled.
    """

    ids: Tensor
    packed: PackedTokens
    last: Tensor


def pack(
    plan: Plan,
    store: KeyValueStore,
    semantics: Semantics,
    is_real: np.ndarray,
    sampled: Tensor | None,
    places: Mapping[int, int],
) -> Batch:
    """The batch of a plan that has rows.

    Args:
        is_real: (num_slots,) bool, whether a slot's tile is one of its image, and not of its padding.
        sampled: the tokens of the step before, which PENDING ones are among.
        places: of each sequence there.
    """
    device = store.page_values.device

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    rows = plan.rows
    counts = np.array([len(row.tokens) for row in rows])
    ends = counts.cumsum()
    positions = [p for row in rows for p in range(row.start, row.start + len(row.tokens))]
    pages = np.zeros((len(rows), max(len(row.pages) for row in rows)), np.int32)
    for place, row in enumerate(rows):
        pages[place, : len(row.pages)] = row.pages
    lengths = np.array([row.start for row in rows], np.int32)
    table, view = _tiles(plan, counts, semantics, is_real)
    last = ends[[row.sample_step is not None for row in rows]] - 1
    return Batch(
        ids=_ids(plan, ends - counts, sampled, places, there),
        packed=PackedTokens(
            positions=there(np.array(positions)),
            varlen=_varlen(counts, ends, there),
            cache=PagedRows(store, there(pages), there(lengths)),
            tile_table=None if table is None else there(table),
            view=TileView(*(None if mask is None else there(mask) for mask in view)),
        ),
        last=there(last),
    )


def _ids(plan, begins, sampled, places, there) -> Tensor:
    ids = np.array([token for row in plan.rows for token in row.tokens])
    pending = np.flatnonzero(ids == PENDING)
    if not pending.size:
        return there(ids)
    ids[pending] = 0
    begin_of = dict(zip(begins.tolist(), plan.rows))
    sources = np.array([places[begin_of[at].sequence] for at in pending.tolist()])
    # What is not finite ends its sequence; its row of this step counts for nothing.
    return there(ids).index_copy_(0, there(pending), sampled[there(sources)].clamp_min(0))


def _varlen(counts: np.ndarray, ends: np.ndarray, there) -> VarlenBatch:
    batch, longest = len(counts), int(counts.max())
    cu_seqlens = there(np.concatenate([[0], ends]).astype(np.int32))
    rows = None
    if batch * longest != ends[-1]:
        begins = np.arange(batch) * longest - (ends - counts)
        rows = there(np.arange(ends[-1]) + begins.repeat(counts))
    return VarlenBatch(batch, longest, rows, cu_seqlens, longest, cu_seqlens)


def _tiles(
    plan: Plan, counts: np.ndarray, semantics: Semantics, is_real: np.ndarray
) -> tuple[np.ndarray | None, tuple[np.ndarray | None, np.ndarray | None]]:
    """The tile table, and the masks of all tokens; None where no sequence has a tile."""
    width = max(len(row.tiles) for row in plan.rows)
    if not width:
        return None, (None, None)
    leaks = semantics.imageless_rows == "leak"
    table = np.full((len(plan.rows), width), -1, np.int32)
    seen, sees = np.zeros((counts.sum(), width), bool), np.zeros(counts.sum(), bool)
    at = 0
    for place, row in enumerate(plan.rows):
        table[place, : len(row.tiles)] = row.tiles
        for count, begin, end in row.sights:
            if begin < end:
                seen[at : at + count, begin:end] = is_real[list(row.tiles[begin:end])]
                sees[at : at + count] = True
            elif leaks:
                # Quirk: a row that sees no image attends to every tile, padded ones included.
                seen[at : at + count, : len(row.tiles)] = True
            at += count
    return table, (seen, sees)
