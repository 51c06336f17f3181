"""A projection of any number of rows, with what stands before and after it in a decoder layer.

No op of its own: the one place that says which ops and which product a projection is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

import mllama_kernels
from mllama_kernels._arguments import FLOATS_AND_DOUBLE, check_dtype, checked
from mllama_kernels._product import product
from mllama_kernels._steps import StepOps, behind, check_devices, check_options, rows_of
from mllama_kernels.quantized_tensor import QuantizedTensor
from mllama_kernels.skinny_linear import MAX_ROWS


class LinearOps(StepOps, Protocol):
    """The ops that a projection is made of, as `mllama_kernels` and its reference have them."""

    @property
    def skinny_linear(self) -> Callable[..., Tensor]: ...

    @property
    def quantized_linear(self) -> Callable[..., Tensor]: ...


@checked
def linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    swiglu: bool = False,
    weight_is_constant: bool = False,
) -> Tensor:
    """A matrix product with any number of rows, by what is quickest for so many.

    In this order, each step where it is asked for and rounded as the op of its name rounds::

        h = rms_norm(x, norm_weight, eps)                  # with norm_weight
        y = F.linear(h, weight, bias)                      # float32 sums, rounded to the dtype
        y = swiglu(y)                                      # with swiglu
        out = residual + y                                 # with residual
        out = gated_residual(y, residual, gate, row_mask)  # with residual and gate

    Up to 16 rows without bias, where no gradients are recorded (:func:`fuses`), all of it is one call of
    :func:`mllama_kernels.skinny_linear`. Else the steps are ops of their own around the library's product,
    on a CPU by whichever library is the quicker (see `_product.py`). A quantised weight goes to
    :func:`mllama_kernels.quantized_linear`.

    Args:
        x: (..., K); float32, float16 or bfloat16 (float64 on CPU).
        weight: (N, K), or (2 N, K) with `swiglu`, gate rows first; dtype of x, any strides; or a
            QuantizedTensor.
        bias: (N,), or (2 N,) with `swiglu`, dtype of x.
        norm_weight: (K,), dtype of x; None: x is multiplied as it is.
        eps: of the norm.
        residual: (..., N), dtype of x.
        gate: (1,), dtype of x, read on the device; only with `residual`.
        row_mask: (...) bool; a row marked False adds nothing, whatever it holds; only with `gate`.
        swiglu: whether the product holds gate and up side by side.
        weight_is_constant: as for `skinny_linear`.
    Returns:
        (..., N) in x's dtype, contiguous. In an autocast region the product has the region's dtype, and
        what follows it is computed as its ops are there.
    Backward:
        that of the steps: gradients of x, weight, bias, norm_weight, residual and gate.
    Raises:
        RuntimeError: naming what was given and what is expected.
    """
    _check(x, weight, bias)
    return linear_by(
        mllama_kernels,
        x,
        weight,
        bias,
        norm_weight=norm_weight,
        eps=eps,
        residual=residual,
        gate=gate,
        row_mask=row_mask,
        swiglu=swiglu,
        weight_is_constant=weight_is_constant,
    )


def _check(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> None:
    """Raises: RuntimeError for what the product would take, and stretch, or what only one way of it takes."""
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        raise RuntimeError(f"mllama_kernels.linear: weight must be (out, in), got shape {shape}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        got = tuple(x.shape)
        raise RuntimeError(f"mllama_kernels.linear: x must be (..., {shape[1]}), got shape {got}")
    check_dtype("linear", "x", x.dtype, FLOATS_AND_DOUBLE)
    if bias is not None and bias.shape != weight.shape[:1]:
        got = tuple(bias.shape)
        raise RuntimeError(f"mllama_kernels.linear: bias must be ({shape[0]},), got shape {got}")
    check_devices("linear", x, weight, bias)


def linear_by(
    ops: LinearOps,
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    swiglu: bool = False,
    weight_is_constant: bool = False,
    is_fused: bool | None = None,
) -> Tensor:
    """:func:`linear` by the ops of a backend: `mllama_kernels`, its reference, or the `Ops` of a model.

    Args:
        is_fused: what :func:`fuses` says, where the caller has asked already.
    """
    if isinstance(weight, QuantizedTensor):
        return ops.quantized_linear(
            x,
            weight,
            bias,
            norm_weight=norm_weight,
            eps=eps,
            residual=residual,
            gate=gate,
            row_mask=row_mask,
            swiglu=swiglu,
            weight_is_constant=weight_is_constant,
        )
    check_options("linear", residual, gate, row_mask)
    rows, width, is_flat = math.prod(x.shape[:-1]), x.shape[-1], x.dim() == 2
    if is_fused is None:
        is_fused = fuses(rows)
    if is_fused and bias is None and width and weight.stride(1) == 1:
        y = ops.skinny_linear(
            x if is_flat else x.reshape(rows, width),
            weight,
            norm_weight=norm_weight,
            eps=eps,
            residual=rows_of("linear", "residual", residual, x, 1),
            gate=gate,
            row_mask=rows_of("linear", "row_mask", row_mask, x, 0),
            swiglu=swiglu,
            weight_is_constant=weight_is_constant,
        )
        return y if is_flat else y.reshape(*x.shape[:-1], y.shape[-1])
    h = x if norm_weight is None else ops.rms_norm(x, norm_weight, eps)
    y = product(h, weight, bias)
    return behind("linear", ops, y, x.dtype, residual, gate, row_mask, swiglu)


def fuses(rows: int) -> bool:
    """Whether :func:`linear` of so many rows, without bias, is one op: with more the library's product is
    better, and a gradient needs the steps. An exported program may be run with more than it was made with.
    """
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_exporting():
        return statically_known_true(rows <= MAX_ROWS)
    return rows <= MAX_ROWS
