"""Causal self-attention of the text model, with RoPE, on whole sequences or a paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _attention, _dispatch


@_dispatch.public
def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    softmax_scale: float | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """RoPE on q and k, then causal grouped-query attention.

    ``out[b,i,h] = sum_{j<=i} p_j v[b,j,h//G]``, ``p = softmax_j(scale * R q[b,i,h] . R k[b,j,h//G])``,
    G = Hq/Hkv. R turns the pair (x1, x2) into (x1 cos - x2 sin, x2 cos + x1 sin), each product and the
    sum rounded to the dtype; pairs are (i, i + D/2), or (2i, 2i + 1) with `interleaved`.

    Args:
        q: (B, L, Hq, D), or packed (N, Hq, D) with `cu_seqlens`; float32, float16 or bfloat16 (float64
            on CPU), last dimension contiguous. D: 64, 80 or 128 on CUDA; a multiple of 8 on CPU.
        k, v: (B, L, Hkv, D) or (N, Hkv, D), dtype of q; Hkv divides Hq.
        cos, sin: (B or 1, L, D/2) or (N, D/2), dtype of q: the angle of each token.
        softmax_scale: factor on q.k before the softmax; default 1/sqrt(D).
        interleaved: which elements form a pair (Meta's layout: True; that of transformers: False).
        cu_seqlens: (B + 1,) int32, first row of each packed sequence, then N.
        max_seqlen: bound on the rows of one packed sequence; default N. On CUDA, where bounds are not
            looked at, rows beyond it are of no sequence, as those after the last are: zeros.
    Returns:
        Shape and dtype of q, contiguous.
    Backward:
        gradients of q, k and v; saves them, cos, sin, the output and the log-sum-exp of each query's scores
        (float32, one per row and query head). Scores and rotated rows are recomputed.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Su et al. 2021 (arXiv 2104.09864); Ainslie et al. 2023 (arXiv 2305.13245); Dao 2023
        (arXiv 2307.08691) for the tiling.
    """
    scale = _attention.scale_for("rotary_attention", q, softmax_scale)
    longest = q.shape[0] if max_seqlen is None else max_seqlen
    with_lse = _attention.wants_lse(q, k, v, cos, sin)
    return torch.ops.mllama_kernels.rotary_attention(
        q, k, v, cos, sin, scale, interleaved, cu_seqlens, longest, with_lse
    )[0]


@_dispatch.public
def rotary_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    *,
    max_seqlen: int,
    softmax_scale: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Append rotated k, and v, to a paged cache, then attend to it: prefill, chunk or decode.

    Sequence b owns rows cu_seqlens[b] to cu_seqlens[b+1] of q, k, v. Its row i goes to position
    cache_lens[b] + i of its pages and attends to positions 0 to cache_lens[b] + i. Lengths and pages are
    read on the device; nothing synchronises.

    On CPU every length and every page that the call would read or write is checked before anything is
    written. On CUDA the host does not see them, and the kernels keep within the tensors: bounds that do not
    fit make rows of no sequence, positions beyond the pages and pages that the cache does not have are
    neither written nor read. That the values are right is then the caller's affair; that no two sequences
    append to one page is so on both devices.

    Args:
        q: (N, Hq, D) packed rows, dtypes and head sizes as in :func:`rotary_attention`.
        k, v: (N, Hkv, D).
        cos, sin: (N, D/2).
        k_cache, v_cache: (num_pages, Hkv, page_size, D) contiguous, written in place; page_size is a
            multiple of 16. Neither shares memory with another argument.
        page_table: (B, max_pages) int32: page i of sequence b holds its positions from i * page_size.
        cu_seqlens: (B + 1,) int32, first row of each sequence, then N.
        cache_lens: (B,) int32, tokens in the cache before the call.
        max_seqlen: bound on the rows of one sequence, as in :func:`rotary_attention` (rows beyond it are
            not appended either); 1 is decode.
        softmax_scale, interleaved: as in :func:`rotary_attention`.
    Returns:
        (N, Hq, D) in q's dtype, contiguous.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Kwon et al. 2023 (arXiv 2309.06180) for pages; Dao et al. 2023 (Flash-Decoding) for split keys.
    """
    scale = _attention.scale_for("rotary_attention_cached", q, softmax_scale)
    return _Cached.apply(
        *(q, k, v, cos, sin, k_cache, v_cache, page_table, cu_seqlens, cache_lens),
        *(max_seqlen, scale, interleaved),
    )


class _Cached(torch.autograd.Function):
    """An op that writes to its arguments takes no registered formula: this gives it its backward error."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return torch.ops.mllama_kernels.rotary_attention_cached(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _dispatch.no_backward("rotary_attention_cached")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    softmax_scale: float,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _attention.fake(q, cu_seqlens is not None, with_lse)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cos, sin, softmax_scale, interleaved, cu_seqlens, max_seqlen, with_lse = inputs
    out, lse = output
    _attention.no_gradient(ctx, "rotary_attention", cos=3, sin=4)
    _attention.save(ctx, "rotary_attention", lse, with_lse, q, k, v, cos, sin, cu_seqlens, out)
    ctx.options = softmax_scale, interleaved, max_seqlen


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cos, sin, cu_seqlens, out, lse = ctx.saved_tensors
    softmax_scale, interleaved, max_seqlen = ctx.options
    grads = torch.ops.mllama_kernels.rotary_attention_backward(
        grad_out, q, k, v, cos, sin, out, lse, softmax_scale, interleaved, cu_seqlens, max_seqlen
    )
    return (*grads, *[None] * 7)


def _cached_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    interleaved: bool,
) -> Tensor:
    return q.new_empty(q.shape)


_dispatch.register("rotary_attention", _fake, setup_context=_setup_context, backward=_backward)
_dispatch.register_backward("rotary_attention", _backward_fake)
_dispatch.register("rotary_attention_cached", _cached_fake, differentiable=False)
