"""What stands before and after the product of a projection, as ops of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


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
