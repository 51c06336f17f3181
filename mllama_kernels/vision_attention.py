"""Self-attention of the vision encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _attention, _dispatch


@_dispatch.public
def vision_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Full attention in which a padding token does not see padding tokens.

    ``out[b,i,h] = sum_j p_j v[b,j,h]``, ``p = softmax_j(scale * q[b,i,h].k[b,j,h] + M[b,i,j])`` with M
    -inf where both i and j are padding and 0 elsewhere: real tokens see everything, as in Mllama's
    encoder, whose mask is the outer product of the padding vector with itself. The mask is never built.

    Args:
        q, k, v: (B, S, H, D), one dtype, last dimension contiguous, other dimensions strided at will
            (a fused projection is read in place). D: 64, 80 or 128 on CUDA; a multiple of 8 on CPU.
        padding: (B, S) bool, True where the token is padding. None: no padding.
        softmax_scale: factor on q.k before the softmax; default 1/sqrt(D).
    Returns:
        (B, S, H, D) in q's dtype, contiguous. A padding query that sees no key gives zeros.
    Backward:
        gradients of q, k and v; saves them, the output and the log-sum-exp of each query's scores (float32,
        one per row and head). Scores are recomputed.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Llama Team 2024 (arXiv 2407.21783) sec. 7; Dao 2023 (arXiv 2307.08691) for the tiling.
    """
    scale = _attention.scale_for("vision_attention", q, softmax_scale)
    with_lse = _attention.wants_lse(q, k, v)
    return torch.ops.mllama_kernels.vision_attention(q, k, v, padding, scale, with_lse)[0]


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    softmax_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return _attention.fake(q, False, with_lse)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, padding, ctx.softmax_scale, with_lse = inputs
    out, lse = output
    _attention.save(ctx, "vision_attention", lse, with_lse, q, k, v, padding, out)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, padding, out, lse = ctx.saved_tensors
    grads = torch.ops.mllama_kernels.vision_attention_backward(
        grad_out, q, k, v, out, lse, padding, ctx.softmax_scale
    )
    return (*grads, None, None, None)


_dispatch.register("vision_attention", _fake, setup_context=_setup_context, backward=_backward)
_dispatch.register_backward("vision_attention", _backward_fake)
