"""What the ops refuse of lengths, pages, slots and ids, for the reference: plain indexing would count a
negative one from the end, and allocate for a length that is none. Values are read, on any device."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor


def _refuse(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"mllama_kernels.{op}: {message}")


def bounds_of(op: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> list[int]:
    """The first row of each packed sequence and the end of the last, at most `tokens`."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        _refuse(op, f"cu_seqlens must be (batch + 1,), got shape {tuple(cu_seqlens.shape)}")
    if max_seqlen is not None and max_seqlen < 0:
        _refuse(op, f"max_seqlen must not be negative, got {max_seqlen}")
    bounds, longest = cu_seqlens.tolist(), tokens if max_seqlen is None else max_seqlen
    if bounds[0] != 0 or bounds[-1] > tokens:
        _refuse(op, f"cu_seqlens must run from 0 to {tokens}, got {bounds[0]} to {bounds[-1]}")
    for b, (begin, end) in enumerate(pairwise(bounds)):
        if not 0 <= end - begin <= longest:
            _refuse(
                op,
                f"by cu_seqlens sequence {b} has {end - begin} rows; max_seqlen says 0 to {longest}",
            )
    return bounds


def lengths_in_cache(
    op: str, bounds: list[int], cache_lens: Tensor, page_table: Tensor, k_cache: Tensor
) -> list[int]:
    """Of each sequence: how many tokens the cache holds before the call. Every page of a token, old or new,
    is one of the cache."""
    batch, (num_pages, _, page_size, _) = len(bounds) - 1, k_cache.shape
    if cache_lens.shape != (batch,):
        _refuse(op, f"cache_lens must have shape ({batch},), got {tuple(cache_lens.shape)}")
    if page_table.dim() != 2 or page_table.shape[0] != batch:
        shape = tuple(page_table.shape)
        _refuse(op, f"page_table must be a ({batch}, max_pages) tensor, got shape {shape}")
    lengths, table = cache_lens.tolist(), page_table.tolist()
    for b, (past, pages) in enumerate(zip(lengths, table, strict=True)):
        total = past + bounds[b + 1] - bounds[b]
        if past < 0:
            _refuse(op, f"cache_lens[{b}] must not be negative, got {past}")
        if total > len(pages) * page_size:
            _refuse(
                op,
                f"sequence {b} would hold {total} tokens; its pages hold {len(pages) * page_size} "
                "(cache_lens, page_table)",
            )
        for i, page in enumerate(pages[: -(-total // page_size)]):
            if not 0 <= page < num_pages:
                _refuse(
                    op,
                    f"page_table[{b}][{i}] is {page}; the cache has pages 0 to {num_pages - 1}",
                )
    return lengths


def check_written(op: str, **caches: Tensor) -> None:
    """What is written in place has a place for every element."""
    for name, cache in caches.items():
        if cache.dim() != 4 or not cache.is_contiguous():
            shape = tuple(cache.shape)
            _refuse(
                op, f"{name} must be (num_pages, Hkv, page_size, D) and contiguous, got {shape}"
            )


def check_slots(op: str, tile_table: Tensor, batch: int, num_slots: int) -> None:
    """Every slot is one of the pool, or -1."""
    if tile_table.dim() != 2 or tile_table.shape[0] != batch:
        _refuse(op, f"tile_table must be ({batch}, T), got shape {tuple(tile_table.shape)}")
    if tile_table.numel() == 0:
        return
    for slot in (end.item() for end in tile_table.aminmax()):
        if not -1 <= slot < num_slots:
            _refuse(
                op,
                f"tile_table holds slot {slot}; k has slots 0 to {num_slots - 1} and -1 means absent",
            )


def check_ids(op: str, ids: Tensor, ratios: int) -> None:
    """On the CPU, where reading the ids waits for nobody, all are in [0, ratios)."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for i, value in enumerate(ids.flatten().tolist()):
        if not 0 <= value < ratios:
            _refuse(op, f"aspect_ratio_ids[{i}] is {value}; the tables have ids 0 to {ratios - 1}")
