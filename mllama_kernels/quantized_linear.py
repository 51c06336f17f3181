"""A projection by a weight of 8, 6 or 4 bits, and rows of such a weight."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _dispatch, _library, _product, reference
from mllama_kernels._arguments import FLOATS, check_activations, wrong_dtype
from mllama_kernels._steps import behind, check_options, rows_of
from mllama_kernels.gated_residual import gated_residual
from mllama_kernels.quantized_tensor import QuantizedTensor
from mllama_kernels.rms_norm import rms_norm
from mllama_kernels.swiglu import swiglu as _swiglu

# Rows of x that one call of the CUDA kernel takes; more are multiplied by decoded slabs.
MAX_ROWS = 64
_SLAB_BYTES = 64 << 20  # of decoded weight at a time
_TABLE, _BIAS = 2, 8  # their places among the op's arguments


class _Steps:
    """The ops around the product, where they are not one with it."""

    rms_norm = staticmethod(rms_norm)
    swiglu = staticmethod(_swiglu)
    gated_residual = staticmethod(gated_residual)


def _check_dtype(op: str, what: str, dtype: torch.dtype) -> None:
    if problem := wrong_dtype(what, dtype, FLOATS):
        hint = f"mllama_kernels.reference.{op} takes float64 too"
        raise RuntimeError(f"mllama_kernels.{op}: {problem}; {hint}")


def _check_x(x: Tensor, *_: Any, **__: Any) -> None:
    _check_dtype("quantized_linear", "x", x.dtype)


def _check_decoded(ids: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> None:
    _check_dtype("quantized_rows", "dtype", dtype)


@functools.partial(_dispatch.public, check=_check_x)
def quantized_linear(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
    swiglu: bool = False,
    weight_is_constant: bool = False,
    activations: str | None = None,
) -> Tensor:
    """A matrix product with any number of rows by a quantised weight, which is read as it is stored.

    In this order, each step where it is asked for and rounded as the op of its name rounds::

        h = rms_norm(x, norm_weight, eps)                  # with norm_weight
        y = F.linear(h, weight.dequantize(), bias)         # float32 sums, rounded to the dtype
        y = swiglu(y)                                      # with swiglu
        out = residual + y                                 # with residual
        out = gated_residual(y, residual, gate, row_mask)  # with residual and gate

    Without a gradient all of it is one op on CPU, on CUDA up to 64 rows; more rows there, and what records
    gradients, take the steps as ops of their own. The bits of a row do not depend on the other rows, but on
    CUDA with more than 64, where the product is the library's, of at most 64 MB of decoded weight at a time.

    Args:
        x: (..., K); float32, float16 or bfloat16.
        weight: (N, K), or (2 N, K) with `swiglu`, gate rows first; on x's device. One that is not packed, as
            where kernels were switched off when it was made, is decoded by plain PyTorch at every call.
        bias: (N,), or (2 N,) with `swiglu`, dtype of x.
        norm_weight: (K,), dtype of x; None: x is multiplied as it is.
        eps: of the norm.
        residual: (..., N), dtype of x.
        gate: (1,), dtype of x, read on the device; only with `residual`.
        row_mask: (...) bool; a row marked False adds nothing, whatever it holds; only with `gate`.
        swiglu: whether the product holds gate and up side by side.
        weight_is_constant: as for `skinny_linear`.
        activations: "int8" changes the numerics: h is rounded to 8-bit integers with a scale for every 32
            columns, the largest / 127, and these are multiplied by the weight's. None, the default, is as
            accurate as the decoded weight allows. Of integers only: fp8, nf4 and fp4 have no such kernel and
            refuse it. Rows with infinities, NaN or values beyond 2^100 (or blocks of none above 2^-80) are
            not rounded by a CPU's kernels: what they give is what None gives. On CUDA, and where the weight
            is not packed, rows with infinities or NaN give NaN. On CUDA blocks of none above 2^-112 are
            rounded as if one were; with more than 64 rows what the integers stand for is rounded to the
            dtype, for the library's product.
    Returns:
        (..., N) in x's dtype, contiguous. In an autocast region the product has the region's dtype.
    Gradients:
        of x, bias, norm_weight, residual and gate; with `activations` x, bias and norm_weight have
        none, and may not want one. That of x is made of the library's products, whose bits depend on what
        else is in the batch.
    Raises:
        RuntimeError: naming what was given and what is expected.
    """
    check_activations(
        activations, weight.encoding, {"x": x, "norm_weight": norm_weight, "bias": bias}
    )
    check_options("quantized_linear", residual, gate, row_mask)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"mllama_kernels.quantized_linear: x must be (..., {weight.shape[1]}), got shape {tuple(x.shape)}"
        )
    _check_x(x)
    if not weight.is_packed:
        return reference.quantized_linear(
            x,
            weight,
            bias,
            norm_weight=norm_weight,
            eps=eps,
            residual=residual,
            gate=gate,
            row_mask=row_mask,
            swiglu=swiglu,
            activations=activations,
        )
    rows, is_flat = math.prod(x.shape[:-1]), x.dim() == 2
    h, is_one_op = x, _is_one_op(x, rows)
    if not is_one_op and norm_weight is not None:
        h = rms_norm(x, norm_weight, eps)
    packed, table = weight.packed_and_table
    encoding, n, _, *types = weight.form
    y = torch.ops.mllama_kernels.quantized_linear(
        h if is_flat else h.reshape(rows, x.shape[-1]),
        packed,
        table,
        encoding,
        n,
        *types,
        bias,
        norm_weight if is_one_op else None,
        eps,
        rows_of("quantized_linear", "residual", residual, x, 1) if is_one_op else None,
        gate if is_one_op else None,
        rows_of("quantized_linear", "row_mask", row_mask, x, 0) if is_one_op else None,
        swiglu and is_one_op,
        weight_is_constant,
        activations is not None,
    )
    if not is_flat:
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    if is_one_op:
        return y
    return behind("quantized_linear", _Steps, y, x.dtype, residual, gate, row_mask, swiglu)


def _is_one_op(x: Tensor, rows: int) -> bool:
    if torch.is_grad_enabled():
        return False
    return (x.is_cpu and not _library.simulated) or rows <= MAX_ROWS


@functools.partial(_dispatch.public, check=_check_decoded)
def quantized_rows(ids: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Rows of a quantised weight, as an embedding reads them.

    Args:
        ids: int64, any shape.
        weight: (N, K), on the device of ids.
        dtype: float32, float16 or bfloat16.
    Returns:
        (*ids.shape, K) in `dtype`, contiguous, the values rounded once.
    Raises:
        RuntimeError: for an id that is no row, on CPU. On CUDA, where nobody can look without waiting, its
            row is NaN.
    """
    _check_decoded(ids, weight, dtype)
    if not weight.is_packed:
        return reference.quantized_rows(ids, weight, dtype)
    packed, table = weight.packed_and_table
    return torch.ops.mllama_kernels.quantized_rows(ids, packed, table, *weight.form, dtype)


def _fake(
    x: Tensor,
    packed: Tensor,
    table: Tensor | None,
    encoding: int,
    n: int,
    group: int,
    scale_type: int,
    zero_type: int,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Tensor | None,
    row_mask: Tensor | None,
    swiglu: bool,
    weight_is_constant: bool,
    int8_activations: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], n // 2 if swiglu else n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, table, encoding, n, *types = inputs[:8]
    norm_weight, _, residual, _, _, swiglu, _, int8_activations = inputs[9:]
    ctx.save_for_backward(packed, table)
    ctx.form = (encoding, n, x.shape[1], *types)
    ctx.is_product = norm_weight is None and residual is None and not (swiglu or int8_activations)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.is_product:
        raise NotImplementedError(
            "mllama_kernels.quantized_linear has a gradient as a product alone: the function takes its other "
            "steps as ops of their own where gradients are recorded, but for activations, which have none"
        )
    packed, table = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[_TABLE]:
        raise NotImplementedError("mllama_kernels.quantized_linear has no gradient for its weight")
    if ctx.needs_input_grad[0]:
        grads[0] = _grad_x(grad, packed, table, ctx.form)
    if ctx.needs_input_grad[_BIAS]:
        grads[_BIAS] = grad.sum(0)
    return tuple(grads)


def _grad_x(grad: Tensor, packed: Tensor, table: Tensor | None, form: tuple[int, ...]) -> Tensor:
    """``grad @ weight``, a slab of decoded rows at a time, in float32 where the device has no products of
    16 bits, and summed in it."""
    n, k = form[1:3]
    dtype = grad.dtype
    if grad.is_cpu and dtype != torch.float32 and not _product.multiplies(dtype):
        dtype = torch.float32
    step = max(1, _SLAB_BYTES // (dtype.itemsize * k))
    total = grad.new_zeros(grad.shape[0], k, dtype=torch.float32)
    for begin in range(0, n, step):
        end = min(begin + step, n)
        slab = torch.ops.mllama_kernels.quantized_dequantize(
            packed, table, *form, begin, end, dtype
        )
        part = grad[:, begin:end].to(dtype) @ slab
        if step >= n:
            return part.to(grad.dtype)
        total += part
    return total.to(grad.dtype)


_dispatch.register(
    "quantized_linear",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    kept=(_TABLE,),
)


def _fake_rows(
    ids: Tensor,
    packed: Tensor,
    table: Tensor | None,
    encoding: int,
    n: int,
    k: int,
    group: int,
    scale_type: int,
    zero_type: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(*ids.shape, k, dtype=dtype)


_dispatch.register("quantized_rows", _fake_rows, kept=(_TABLE,))
