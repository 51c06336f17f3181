"""RMSNorm, alone and with the residual add that precedes it."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


@_dispatch.public
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square normalisation of the last dimension.

    ``y = weight * round(x / sqrt(mean(x^2) + eps))``: statistics in float32, one rounding to x's dtype
    before the product with the weight and one after it, as both published Llama implementations do.

    Args:
        x: (..., E), float32, float16 or bfloat16 (float64 on CPU); leading dimensions may be strided.
        weight: (E,), dtype and device of x.
        eps: added to the mean square.
    Returns:
        (..., E) in x's dtype, contiguous.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Zhang, Sennrich 2019 (arXiv 1910.07467).
    """
    return torch.ops.mllama_kernels.rms_norm(x, weight, eps)


@_dispatch.public
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add, then :func:`rms_norm` of the sum, in one pass.

    ``t = residual + x``, or ``t = residual + tanh(gate) * row_mask * x`` with a gate, rounded as
    :func:`gated_residual` rounds; ``y = rms_norm(t, weight, eps)``.

    Args:
        x: (..., E), float32, float16 or bfloat16 (float64 on CPU).
        residual: shape and dtype of x.
        weight: (E,), dtype of x.
        eps: added to the mean square.
        gate: (1,), dtype of x; None adds x as it is.
        row_mask: x.shape[:-1] bool; a row marked False adds nothing. None: every row adds.
    Returns:
        (y, t), each (..., E) in x's dtype, contiguous.
    Raises:
        RuntimeError: naming what was given and what is expected.
    """
    return torch.ops.mllama_kernels.add_rms_norm(x, residual, weight, eps, gate, row_mask)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    row_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_dispatch.register("rms_norm", _rms_norm_fake, lowers=False)
_dispatch.register("add_rms_norm", _add_rms_norm_fake, lowers=False)
