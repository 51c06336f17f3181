"""The tanh-gated residual of Mllama's cross-attention and global vision layers."""

from __future__ import annotations

from typing import Any

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
    Backward:
        saves x, gate and row_mask. The gate's gradient is a sum over all elements in a fixed order.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Alayrac et al. 2022 (arXiv 2204.14198) sec. 2.2; Llama Team 2024 (arXiv 2407.21783) sec. 7.
    """
    return torch.ops.mllama_kernels.gated_residual(x, residual, gate, row_mask)


def _fake(x: Tensor, residual: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(
    grad_out: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, gate, row_mask = inputs
    ctx.save_for_backward(x, gate, row_mask)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.mllama_kernels.gated_residual_backward
    grad_x, grad_gate = op(grad_out, *ctx.saved_tensors)
    return grad_x, grad_out, grad_gate, None


_dispatch.register(
    "gated_residual", _fake, setup_context=_setup_context, backward=_backward, lowers=False
)
_dispatch.register_backward("gated_residual", _backward_fake)
