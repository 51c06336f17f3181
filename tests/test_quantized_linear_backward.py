"""Gradients of quantized_linear."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from numerics import compare, compare_sum, randn, simulated_share
from quantized_calls import FUSED, as_op, every_dtype, make
from torch import Tensor

import mllama_kernels
from mllama_kernels import QuantizedTensor, quantized_linear, reference
from mllama_kernels.testing import to_double


def _added(x: Tensor, weight: QuantizedTensor, **kwargs: Any) -> Tensor:
    """The derivative of each element of the result by the gate, in float64."""
    kwargs = {name: to_double(value) for name, value in kwargs.items()}
    gate, row_mask, _ = (kwargs.pop(name) for name in ("gate", "row_mask", "residual"))
    y = reference.quantized_linear(x.double(), weight, **kwargs)
    return y.masked_fill(~row_mask.unsqueeze(-1), 0) * (1 - gate.tanh().square())


@simulated_share(3)
@every_dtype
@pytest.mark.parametrize(
    ("fusion", "kind"), [case for case in FUSED if case.values[0] in ("product", "all")]
)
def test_gradients(device, dtype, kind, fusion):
    (x, weight), kwargs = make(kind, 5, 24, 300, fusion, dtype, device)
    named = {"x": x} | {n: v for n, v in kwargs.items() if torch.is_tensor(v) and n != "row_mask"}
    options = {name: value for name, value in kwargs.items() if name not in named}
    grad = randn(5, 24, dtype=dtype, device=device)

    def gradients(function: Any, to: torch.dtype) -> list[Tensor]:
        leaves = {name: t.detach().to(to).requires_grad_() for name, t in named.items()}
        out = function(
            leaves["x"], weight, **{n: t for n, t in leaves.items() if n != "x"}, **options
        )
        return list(torch.autograd.grad(out, list(leaves.values()), grad.to(to)))

    actual = gradients(quantized_linear, dtype)
    plain = gradients(reference.quantized_linear, dtype)
    exact = gradients(reference.quantized_linear, torch.float64)
    # Each op's gradient is stored; what they are made of has been, by the norm and for gate and up.
    roundings = 4 + 3 if fusion == "all" else 1
    for name, a, e, p in zip(named, actual, exact, plain, strict=True):
        if name == "gate":
            terms = grad * _added(x, weight, **kwargs)
            compare_sum(a, e, p, terms, roundings)
        else:
            compare(a.contiguous(), e, p, roundings=roundings)
    through_linear = gradients(mllama_kernels.linear, dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, through_linear, strict=True))


@every_dtype
def test_the_gradient_in_slabs(device, dtype, monkeypatch):
    module = sys.modules["mllama_kernels.quantized_linear"]  # the function has its name
    (x, weight), _ = make(("q4_k", 0, ()), 5, 300, 512, "product", dtype, device)
    x.requires_grad_()
    grad = randn(5, 300, dtype=dtype, device=device)
    (whole,) = torch.autograd.grad(quantized_linear(x, weight), x, grad)
    monkeypatch.setattr(module, "_SLAB_BYTES", 512 * 4 * 90)
    (slabs,) = torch.autograd.grad(quantized_linear(x, weight), x, grad)
    exact = grad.double() @ weight.dequantize(torch.float64)
    compare(slabs, exact, whole)


def test_gradients_that_do_not_exist(device):
    (x, weight), kwargs = make(("nf4", 0, ()), 3, 16, 64, "all", torch.float32, device)
    x.requires_grad_()
    op = torch.ops.mllama_kernels.quantized_linear
    with pytest.raises(NotImplementedError, match="has a gradient as a product alone"):
        op(*as_op(weight, x, **kwargs)).sum().backward()
    weight.planes[1].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient for its weight"):
        quantized_linear(x, weight).sum().backward()


def test_a_second_derivative(device):
    """Of what is done to the product behind it; the product is linear."""
    (x, weight), _ = make(("q8_0", 0, ()), 3, 16, 64, "product", torch.float32, device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(quantized_linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    decoded = weight.dequantize()
    expected = (torch.ones_like(x) @ decoded.T @ decoded) * 2
    torch.testing.assert_close(second, expected)


@every_dtype
def test_a_compiled_product_trains(device, dtype):
    (x, weight), kwargs = make(("q4_k", 0, ()), 5, 24, 300, "all", dtype, device)

    def gradient(function: Any) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        function(leaf, weight, **kwargs).sum().backward()
        return leaf.grad

    torch.compiler.reset()
    compiled = torch.compile(quantized_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), gradient(quantized_linear))
