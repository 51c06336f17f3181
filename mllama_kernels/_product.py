"""The matrix product of many rows, by whichever library is quick at it on this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's F.linear, which PyTorch has for its own compiler; None where it was built without.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_LARGE_PRODUCT = 1 << 23  # multiply-adds from which that is worth its 20 us of overhead
_WORTH_DECODING = 1 << 20  # multiply-adds from which decoding is
# Of float32 weights at a time: with less the library's products are slow, with more memory is touched anew.
_PANEL_BYTES = 16 << 20
_CAPABILITIES = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` of x (..., in), weight (out, in) and bias (out,).

    On a CPU PyTorch gives only those 16-bit products to oneDNN that the CPU has instructions for; the others
    run at a quarter of float32's rate or less, and go through float32 here, with one rounding at the end.
    Products of float32 it gives to the BLAS, which can be much the slower (see benchmarks/README.md). oneDNN
    sums in longer chains, so its rounding error is up to 2.2 times MKL's, and its product has no gradient.
    """
    if (
        x.device.type != "cpu"
        or type(x) is not Tensor
        or type(weight) not in (Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    size = x.numel() * weight.shape[0]
    operands = [x, weight] if bias is None else [x, weight, bias]
    dtype = _computed_in(operands)
    if dtype in _CAPABILITIES and size >= _WORTH_DECODING and not multiplies(dtype):
        return _Decoded.apply(*(t if t is None else t.to(dtype) for t in (x, weight, bias)))
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _float_product(x, weight, bias)


def product_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """:func:`product` of x (rows, in), without a gradient, into out (rows, out), part of wider rows perhaps:
    on a GPU a copy would take a tenth of the time."""
    if out.is_cpu:
        out.copy_(product(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _computed_in(operands: list[Tensor]) -> torch.dtype | None:
    """The dtype of their product, as they have it or as an autocast region casts them; None if neither."""
    dtypes = {t.dtype for t in operands}
    if torch.is_autocast_enabled("cpu") and dtypes <= {torch.float32, *_CAPABILITIES}:
        return torch.get_autocast_dtype("cpu")
    return operands[0].dtype if len(dtypes) == 1 else None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of a 16-bit dtype by this CPU's instructions for it."""
    supports = getattr(torch.ops.mkldnn, _CAPABILITIES[dtype], None)
    return supports is not None and torch.backends.mkldnn.enabled and supports()


def _float_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (
        _ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.enabled
        and x.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _LARGE_PRODUCT
        and not torch.is_grad_enabled()
    ):
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Decoded(torch.autograd.Function):
    """The product of 16-bit x and weight in float32, a panel of the weight's rows at a time."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        out = x.new_empty(rows.shape[0], weight.shape[0])
        for begin, end, panel in _panels(weight):
            part = None if bias is None else bias[begin:end].float()
            out[:, begin:end] = _float_product(rows, panel, part)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        grad = grad_out.reshape(-1, weight.shape[0]).float()
        if wants_x:
            total = grad.new_zeros(len(grad), weight.shape[1])
            for begin, end, panel in _panels(weight):
                total.addmm_(grad[:, begin:end], panel)
            grad_x = total.to(x.dtype).view(x.shape)
        if wants_weight:
            rows = x.reshape(-1, x.shape[-1]).float()
            grad_weight = torch.empty_like(weight)
            for begin, end in _panel_bounds(weight):
                grad_weight[begin:end] = grad[:, begin:end].T @ rows
        if wants_bias:
            grad_bias = grad.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def _panel_bounds(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Begin and end of the rows of weight (out, in) that make one panel."""
    out, width = weight.shape
    rows = max(1, _PANEL_BYTES // (4 * max(1, width)))
    return ((begin, min(begin + rows, out)) for begin in range(0, out, rows))


def _panels(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The rows of weight in float32, a panel at a time in the same memory: fresh pages cost more than it."""
    buffer: Tensor | None = None
    for begin, end in _panel_bounds(weight):
        if buffer is None:
            buffer = weight.new_empty(end - begin, weight.shape[1], dtype=torch.float32)
        yield begin, end, buffer[: end - begin].copy_(weight[begin:end])
