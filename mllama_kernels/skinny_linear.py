"""A projection of a few rows, with what stands before and after it in a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch

# Rows of x at most.
MAX_ROWS = 16


@_dispatch.public
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    swiglu: bool = False,
    weight_is_constant: bool = False,
) -> Tensor:
    """A matrix product with at most MAX_ROWS rows, bound by the reading of the weight.

    In this order, each step where it is asked for and rounded as the op of its name rounds::

        h = rms_norm(x, norm_weight, eps)                  # with norm_weight
        y = F.linear(h, weight)                            # float32 sums, rounded to the dtype
        y = swiglu(y)                                      # with swiglu
        out = residual + y                                 # with residual
        out = gated_residual(y, residual, gate, row_mask)  # with residual and gate

    The weight is read once however many rows there are, and the bits of a row do not depend on the others.

    Args:
        x: (M, K), M from 0 to MAX_ROWS; float32, float16 or bfloat16 (float64 on CPU).
        weight: (N, K), or (2 N, K) with `swiglu`, gate rows first; dtype of x, contiguous in its last
            dimension. Rows may be strided.
        norm_weight: (K,), dtype of x; None: x is multiplied as it is.
        eps: of the norm.
        residual: (M, N), dtype of x.
        gate: (1,), dtype of x, read on the device; only with `residual`.
        row_mask: (M,) bool; a row marked False adds nothing, whatever it holds; only with `gate`.
        swiglu: whether the product holds gate and up side by side.
        weight_is_constant: promises that the launch just before on the same stream does not write the
            weight; on CUDA its reading then starts before that launch has ended. True suits parameters.
    Returns:
        (M, N) in x's dtype, contiguous.
    Raises:
        RuntimeError: naming what was given and what is expected.
    """
    return torch.ops.mllama_kernels.skinny_linear(
        x, weight, norm_weight, eps, residual, gate, row_mask, swiglu, weight_is_constant
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Tensor | None,
    row_mask: Tensor | None,
    swiglu: bool,
    weight_is_constant: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2 if swiglu else weight.shape[0])


_dispatch.register("skinny_linear", _fake)
