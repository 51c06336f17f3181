"""Attention from text rows to image tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


@_dispatch.public
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_mask: Tensor | None = None,
    *,
    q_norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    softmax_scale: float | None = None,
    tile_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Grouped-query attention from text to image tiles, with a mask per tile.

    ``out[b,i,h] = sum_{t,j} p_{t,j} v[b,t,j,h//G]``, ``p = softmax(scale * q[b,i,h].k[b,t,j,h//G] +
    M[b,i,t])`` with G = Hq/Hkv and M zero for a visible tile, -inf for a hidden one. Hidden tiles are
    skipped, not multiplied by zero.

    Args:
        q: (B, Lq, Hq, D), or packed (N, Hq, D) with `tile_table`; float32, float16 or bfloat16
            (float64 on CPU), last dimension contiguous.
        k, v: (B, T, P, Hkv, D), or with `tile_table` a pool of tiles (num_slots, P, Hkv, D); dtype of q;
            Hkv divides Hq. k is normalised already.
        tile_mask: (B, Lq, T) or (N, T) bool, True where the row sees the tile. None: all tiles.
        q_norm_weight: (D,); when given, q is first `rms_norm(q, q_norm_weight, eps)` per head.
        eps: of that norm.
        softmax_scale: factor on q.k before the softmax; default 1/sqrt(D).
        tile_table: (B, T) int32, the slot of each tile of each sequence, -1 for none.
        cu_seqlens: (B + 1,) int32, first row of each packed sequence, then N.
        max_seqlen: bound on the rows of one sequence; default N.
    Returns:
        Shape and dtype of q, contiguous. A row that sees no tile gives zeros.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Llama Team 2024 (arXiv 2407.21783) sec. 7; softmax after Milakov, Gimelshein 2018
        (arXiv 1805.02867).
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    longest = q.shape[0] if max_seqlen is None else max_seqlen
    return torch.ops.mllama_kernels.cross_attention(
        q, k, v, tile_mask, q_norm_weight, eps, scale, tile_table, cu_seqlens, longest
    )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_mask: Tensor | None,
    q_norm_weight: Tensor | None,
    eps: float,
    softmax_scale: float,
    tile_table: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    return q.new_empty(q.shape)


_dispatch.register("cross_attention", _fake)
