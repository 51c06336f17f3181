"""A projection and what stands around it in plain PyTorch: part of :mod:`mllama_kernels.reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_kernels._arguments import check_activations, checked
from mllama_kernels._steps import check_quantized, check_rows
from mllama_kernels.quantized_decoding import decode, round_to_int8

if TYPE_CHECKING:
    from mllama_kernels.quantized_tensor import QuantizedTensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@checked
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``weight * round(x / sqrt(mean(x^2) + eps))``; see :func:`mllama_kernels.rms_norm`."""
    wide = x.to(statistics_dtype(x.dtype))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalized.to(x.dtype) * weight


@checked
def gated_residual(
    x: Tensor, residual: Tensor, gate: Tensor, row_mask: Tensor | None = None
) -> Tensor:
    """``residual + tanh(gate) * row_mask * x``; see :func:`mllama_kernels.gated_residual`."""
    if row_mask is not None:  # selects rather than multiplies: a hidden row may hold anything
        x = x.masked_fill(~row_mask.unsqueeze(-1), 0)
    return residual + gate.tanh() * x


@checked
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add, then :func:`rms_norm` of the sum; see :func:`mllama_kernels.add_rms_norm`."""
    if gate is not None:
        total = gated_residual(x, residual, gate, row_mask)
    elif row_mask is not None:
        total = residual + x.masked_fill(~row_mask.unsqueeze(-1), 0)
    else:
        total = residual + x
    return rms_norm(total, weight, eps), total


@checked
def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :func:`mllama_kernels.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


_swiglu = swiglu  # an argument of linear has the name


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
    """Norm, product, SwiGLU and residual; see :func:`mllama_kernels.linear`."""
    if not isinstance(weight, Tensor):
        return quantized_linear(
            x,
            weight,
            bias,
            norm_weight=norm_weight,
            eps=eps,
            residual=residual,
            gate=gate,
            row_mask=row_mask,
            swiglu=swiglu,
        )
    if (gate is not None and residual is None) or (row_mask is not None and gate is None):
        raise ValueError("gate goes with residual, row_mask with gate")
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    y = F.linear(x, weight, bias)
    if swiglu:
        y = _swiglu(y)
    if residual is None:
        return y
    return residual + y if gate is None else gated_residual(y, residual, gate, row_mask)


@checked
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
    """:func:`linear` of a few rows; see :func:`mllama_kernels.skinny_linear`."""
    fused = {"residual": residual, "gate": gate, "row_mask": row_mask, "swiglu": swiglu}
    return linear(x, weight, norm_weight=norm_weight, eps=eps, **fused)


@checked
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
    """:func:`linear` by the decoded weight, in x's dtype; see :func:`mllama_kernels.quantized_linear`."""
    check_activations(
        activations, weight.encoding, {"x": x, "norm_weight": norm_weight, "bias": bias}
    )
    check_quantized(x, weight, bias, norm_weight, eps, residual, gate, row_mask, swiglu)
    if activations is not None:
        if norm_weight is not None:
            x, norm_weight = rms_norm(x, norm_weight, eps), None
        x = round_to_int8(x)
    fused = {"residual": residual, "gate": gate, "row_mask": row_mask, "swiglu": swiglu}
    decoded = weight.decoded().to(x.dtype)
    return linear(x, decoded, bias, norm_weight=norm_weight, eps=eps, **fused)


@checked
def quantized_rows(ids: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """``F.embedding(ids, weight)`` by the decoded weight; see :func:`mllama_kernels.quantized_rows`.

    Raises: RuntimeError for an id that is no row, on CPU; elsewhere its row is NaN.
    """
    check_rows(ids, weight, dtype)
    flat, parts, n = ids.reshape(-1), weight.parts(), weight.shape[0]
    table = {name: parts.pop(name) for name in ("table",) if name in parts}
    beyond = None
    if not flat.is_cpu:  # nobody can look without waiting
        beyond = (flat < 0) | (flat >= n)
        flat = flat.masked_fill(beyond, 0)
    try:
        rows = {name: part.index_select(0, flat) for name, part in parts.items()}
    except IndexError:
        wrong = flat[(flat < 0) | (flat >= n)][0]
        raise RuntimeError(
            f"mllama_kernels.quantized_rows: ids must be within 0..{n - 1}, got {wrong}"
        ) from None
    values = decode(weight.encoding, rows | table).to(dtype)
    if beyond is not None:
        values = values.masked_fill(beyond.unsqueeze(1), torch.nan)
    return values.view(*ids.shape, weight.shape[1])
