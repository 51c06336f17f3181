"""Attention from text rows to image tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _attention, _dispatch


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
        tile_table: (B, T) int32, the slot of each tile of each sequence, -1 for none. On CUDA slots that
            the pool does not have count as none: that all are right is the caller's affair.
        cu_seqlens: (B + 1,) int32, first row of each packed sequence, then N.
        max_seqlen: bound on the rows of one sequence; default N. On CUDA, where bounds are not looked at,
            rows beyond it are of no sequence, as those after the last are: zeros.
    Returns:
        Shape and dtype of q, contiguous. A row that sees no tile gives zeros.
    Backward:
        gradients of q, k, v and q_norm_weight; saves them, the output and the log-sum-exp of each query's
        scores (float32, one per row and query head). Scores and normalised rows are recomputed, hidden
        tiles skipped: a tile that no row sees has gradient zero, whatever it holds.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Llama Team 2024 (arXiv 2407.21783) sec. 7; softmax after Milakov, Gimelshein 2018
        (arXiv 1805.02867).
    """
    scale = _attention.scale_for("cross_attention", q, softmax_scale)
    longest = q.shape[0] if max_seqlen is None else max_seqlen
    with_lse = _attention.wants_lse(q, k, v, q_norm_weight)
    return torch.ops.mllama_kernels.cross_attention(
        q, k, v, tile_mask, q_norm_weight, eps, scale, tile_table, cu_seqlens, longest, with_lse
    )[0]


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
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _attention.fake(q, cu_seqlens is not None, with_lse)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tile_mask: Tensor | None,
    q_norm_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = q.new_empty(0 if q_norm_weight is None else q.shape[-1])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), weight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tile_mask, q_norm_weight, eps, softmax_scale, *packed, max_seqlen, with_lse = inputs
    out, lse = output
    tensors = (q, k, v, tile_mask, q_norm_weight, *packed, out)
    _attention.save(ctx, "cross_attention", lse, with_lse, *tensors)
    ctx.options = eps, softmax_scale, max_seqlen


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, tile_mask, q_norm_weight, tile_table, cu_seqlens, out, lse = ctx.saved_tensors
    eps, softmax_scale, max_seqlen = ctx.options
    grad_q, grad_k, grad_v, grad_weight = torch.ops.mllama_kernels.cross_attention_backward(
        *(grad_out, q, k, v, out, lse, tile_mask, q_norm_weight),
        *(eps, softmax_scale, tile_table, cu_seqlens, max_seqlen),
    )
    grad_q_norm = None if q_norm_weight is None else grad_weight
    return grad_q, grad_k, grad_v, None, grad_q_norm, *[None] * 6


_dispatch.register("cross_attention", _fake, setup_context=_setup_context, backward=_backward)
_dispatch.register_backward("cross_attention", _backward_fake)
