"""RMSNorm, alone and with the residual add that precedes it."""

from __future__ import annotations

from typing import Any

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
    Backward:
        saves x and weight; the inverse rms comes out of the reduction that the gradient takes anyway.
        The weight's gradient is a sum over the rows in a fixed order.
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
    Backward:
        saves t and weight, with a gate also x, gate and row_mask. Takes the gradients of both results;
        that of a result that nothing used costs nothing.
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


def _rms_norm_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _add_rms_norm_backward_fake(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    x: Tensor | None,
    gate: Tensor | None,
    row_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_x = gate is not None or row_mask is not None
    return (
        total.new_empty(total.shape),
        total.new_empty(total.shape if has_x else (0,)),
        weight.new_empty(weight.shape),
        total.new_empty((0,) if gate is None else gate.shape),
    )


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.mllama_kernels.rms_norm_backward
    return *op(grad_y, *ctx.saved_tensors, ctx.eps), None


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, ctx.eps, gate, row_mask = inputs
    ctx.save_for_backward(output[1], weight, None if gate is None else x, gate, row_mask)
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return *_of_the_sum_only(ctx, grad_total), None
    total, weight, x, gate, row_mask = ctx.saved_tensors
    op = torch.ops.mllama_kernels.add_rms_norm_backward
    grad_residual, grad_x, grad_weight, grad_gate = op(
        grad_y, grad_total, total, weight, ctx.eps, x, gate, row_mask
    )
    if gate is None and row_mask is None:
        grad_x = grad_residual
    return grad_x, grad_residual, grad_weight, None, None if gate is None else grad_gate, None


def _of_the_sum_only(ctx: Any, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the first five arguments where the norm's result was not used."""
    _, _, x, gate, row_mask = ctx.saved_tensors
    grad_x, grad_gate = grad_total, None
    if grad_total is not None and gate is not None:
        op = torch.ops.mllama_kernels.gated_residual_backward
        grad_x, grad_gate = op(grad_total, x, gate, row_mask)
    elif grad_total is not None and row_mask is not None:
        grad_x = grad_total.masked_fill(~row_mask.unsqueeze(-1), 0)
    return grad_x, grad_total, None, None, grad_gate


_dispatch.register(
    "rms_norm",
    _rms_norm_fake,
    setup_context=_rms_norm_setup,
    backward=_rms_norm_backward,
    lowers=False,
)
_dispatch.register(
    "add_rms_norm",
    _add_rms_norm_fake,
    setup_context=_add_rms_norm_setup,
    backward=_add_rms_norm_backward,
    lowers=False,
)
_dispatch.register_backward("rms_norm", _rms_norm_backward_fake)
_dispatch.register_backward("add_rms_norm", _add_rms_norm_backward_fake)
