"""What stands before and after the product of a projection, as ops of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mllama_kernels._arguments import FLOATS_AND_DOUBLE, check_dtype, dtype_name

if TYPE_CHECKING:
    from mllama_kernels.quantized_tensor import QuantizedTensor


class StepOps(Protocol):
    """The ops of the steps, as `mllama_kernels` and its reference have them."""

    @property
    def rms_norm(self) -> Callable[..., Tensor]: ...

    @property
    def swiglu(self) -> Callable[..., Tensor]: ...

    @property
    def gated_residual(self) -> Callable[..., Tensor]: ...


def check_options(
    op: str, residual: Tensor | None, gate: Tensor | None, row_mask: Tensor | None
) -> None:
    """Raises: RuntimeError for an option without the one that it belongs to."""
    if (gate is not None and residual is None) or (row_mask is not None and gate is None):
        raise RuntimeError(f"mllama_kernels.{op}: gate goes with residual, row_mask with gate")


def check_devices(op: str, *given: Tensor | QuantizedTensor | None) -> None:
    """Raises: RuntimeError for more than one: torch takes a weight on the meta device, and gives memory as
    it lay."""
    devices = {str(tensor.device) for tensor in given if tensor is not None}
    if len(devices) > 1:
        got = ", ".join(sorted(devices))
        raise RuntimeError(f"mllama_kernels.{op}: all tensors must be on one device, got {got}")


def check_quantized(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Tensor | None,
    row_mask: Tensor | None,
    swiglu: bool,
) -> None:
    """What the compiled op checks, for plain PyTorch, which would broadcast the one and promote the other.

    Raises: RuntimeError naming what was given and what is expected.
    """
    op = "mllama_kernels.quantized_linear:"
    check_options("quantized_linear", residual, gate, row_mask)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise RuntimeError(f"{op} x must be (..., {k}), got shape {tuple(x.shape)}")
    check_dtype("quantized_linear", "x", x.dtype, FLOATS_AND_DOUBLE)
    if not 0 <= eps < math.inf:
        raise RuntimeError(f"{op} eps must not be negative or infinite, got {eps:g}")
    if swiglu and n % 2:
        raise RuntimeError(f"{op} weight must have an even number of rows with swiglu, got {n}")
    check_devices("quantized_linear", x, weight, bias, norm_weight, residual, gate, row_mask)
    leading = tuple(x.shape[:-1])
    floating = {
        "bias": (bias, (n,)),
        "norm_weight": (norm_weight, (k,)),
        "residual": (residual, (*leading, n // 2 if swiglu else n)),
        "gate": (gate, None),
    }
    # There the ops are given one dtype.
    is_cast = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    for name, (given, sizes) in floating.items():
        if given is None:
            continue
        if given.dtype != x.dtype and not (is_cast and given.is_floating_point()):
            raise RuntimeError(
                f"{op} {name} must have the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(given.dtype)}"
            )
        if sizes is not None and given.shape != sizes:
            raise RuntimeError(f"{op} {name} must have shape {sizes}, got {tuple(given.shape)}")
    if gate is not None and gate.numel() != 1:
        raise RuntimeError(f"{op} gate must have one element, got shape {tuple(gate.shape)}")
    if row_mask is not None and row_mask.shape != leading:
        raise RuntimeError(f"{op} row_mask must have shape {leading}, got {tuple(row_mask.shape)}")
    if row_mask is not None and row_mask.dtype != torch.bool:
        raise RuntimeError(f"{op} row_mask must be bool, got {dtype_name(row_mask.dtype)}")


def check_rows(ids: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> None:
    """Raises: RuntimeError for what `quantized_rows` does not take."""
    op = "mllama_kernels.quantized_rows:"
    check_devices("quantized_rows", ids, weight)
    if ids.dtype != torch.int64:
        raise RuntimeError(f"{op} ids must be int64, got {dtype_name(ids.dtype)}")
    check_dtype("quantized_rows", "dtype", dtype, FLOATS_AND_DOUBLE)


def rows_of(op: str, name: str, given: Tensor | None, x: Tensor, trailing: int) -> Tensor | None:
    """What goes with each row of x (..., K), of shape (...) and `trailing` dimensions, row by row."""
    if given is None or x.dim() == 2:
        return given
    leading = x.shape[:-1]
    if given.dim() != len(leading) + trailing or given.shape[: len(leading)] != leading:
        expected = ", ".join(map(str, (*leading, *["N"] * trailing)))
        got = tuple(given.shape)
        raise RuntimeError(f"mllama_kernels.{op}: {name} must be ({expected}), got shape {got}")
    return given.reshape(math.prod(leading), *given.shape[len(leading) :])


def behind(
    op: str,
    ops: StepOps,
    y: Tensor,
    dtype: torch.dtype,
    residual: Tensor | None,
    gate: Tensor | None,
    row_mask: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """What `swiglu`, `residual`, `gate` and `row_mask` of a projection ask for, of its product y.

    Args:
        dtype: of the projection's x, which in an autocast region is not that of y.
    """
    if swiglu:
        y = ops.swiglu(y)
    if residual is None:
        return y
    if gate is not None:
        return ops.gated_residual(y, residual, gate, row_mask)
    # A sum would broadcast the one and promote the other.
    if residual.shape != y.shape or residual.dtype not in (dtype, y.dtype):
        expected, got = (f"{tuple(t.shape)} {t.dtype}" for t in (y, residual))
        raise RuntimeError(f"mllama_kernels.{op}: residual must be {expected}, got {got}")
    return residual + y
