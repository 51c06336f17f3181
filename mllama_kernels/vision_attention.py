"""Self-attention of the vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


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
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Llama Team 2024 (arXiv 2407.21783) sec. 7; Dao 2023 (arXiv 2307.08691) for the tiling.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.ops.mllama_kernels.vision_attention(q, k, v, padding, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, softmax_scale: float) -> Tensor:
    return q.new_empty(q.shape)


_dispatch.register("vision_attention", _fake)
