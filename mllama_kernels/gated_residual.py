"""The tanh-gated residual of Mllama's cross-attention and global vision layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


@_dispatch.public
def gated_residual(
    x: Tensor, residual: Tensor, gate: Tensor, row_mask: Tensor | None = None
) -> Tensor:
    """Adds a branch to the residual stream through a learned gate.

    ``out = residual + tanh(gate) * row_mask * x``; tanh, product and sum are each rounded to x's dtype.

    Args:
        x: (..., E), float32, float16 or bfloat16 (float64 on CPU).
        residual: shape and dtype of x.
        gate: (1,), dtype of x, read on the device.
        row_mask: x.shape[:-1] bool; a row marked False adds nothing, whatever it holds. None: all add.
    Returns:
        (..., E) in x's dtype, contiguous.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Alayrac et al. 2022 (arXiv 2204.14198) sec. 2.2; Llama Team 2024 (arXiv 2407.21783) sec. 7.
    """
    return torch.ops.mllama_kernels.gated_residual(x, residual, gate, row_mask)


def _fake(x: Tensor, residual: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


_dispatch.register("gated_residual", _fake, lowers=False)
