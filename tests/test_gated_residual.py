"""gated_residual."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import (
    FLOATS,
    assert_compiles,
    assert_gradcheck,
    assert_gradients_no_worse,
    assert_no_worse,
    assert_trains_compiled,
    grid,
    opcheck,
    randn,
    simulated_share,
    strided,
)

import mllama_kernels
from mllama_kernels import reference


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", grid([(3, 7), (2, 2, 136)], [(257, 1), (65, 4096), (9, 8193)]))
@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64(device, dtype, shape, masked):
    x, residual = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
    gate = randn(1, dtype=dtype, device=device)
    mask = torch.rand(shape[:-1], device=device) < 0.5 if masked else None
    out = mllama_kernels.gated_residual(x, residual, gate, mask)
    assert_no_worse(out, reference.gated_residual, x, residual, gate, mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_properties(device, dtype):
    """A zero gate and a hidden row leave the residual's bits; a large gate adds x whole."""
    x, residual = (randn(4, 72, dtype=dtype, device=device) for _ in range(2))
    zero = torch.zeros(1, dtype=dtype, device=device)
    assert torch.equal(mllama_kernels.gated_residual(x, residual, zero), residual)
    assert torch.equal(mllama_kernels.gated_residual(x, residual, zero + 20), x + residual)
    mask = torch.tensor([True, False, True, False], device=device)
    x[1::2] = float("inf")
    out = mllama_kernels.gated_residual(x, residual, zero + 1, mask)
    assert torch.equal(out[1::2], residual[1::2])


def test_strided_and_empty(device):
    x, residual = (randn(3, 5, 40, dtype=torch.float32, device=device) for _ in range(2))
    gate = torch.ones(1, device=device)
    expected = mllama_kernels.gated_residual(x, residual, gate)
    assert torch.equal(
        mllama_kernels.gated_residual(strided(x), strided(residual, 3), gate), expected
    )
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(mllama_kernels.gated_residual(swapped, residual, gate), expected)
    assert mllama_kernels.gated_residual(x[:0], residual[:0], gate).shape == (0, 5, 40)


def test_torch_machinery(device):
    x, residual = torch.randn(3, 16, device=device), torch.randn(3, 16, device=device)
    gate, mask = torch.randn(1, device=device), torch.tensor([True, False, True], device=device)
    opcheck("gated_residual", (x, residual, gate, mask))
    assert_compiles(mllama_kernels.gated_residual, x, residual, gate, mask)
    opcheck("gated_residual_backward", (residual, x, gate, mask))


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", grid([(3, 7), (2, 2, 136)], [(257, 1), (65, 4096), (9, 8193)]))
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_matches_float64(device, dtype, shape, masked):
    x, residual = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
    # Near x, so that the terms of the gate's gradient do not cancel: what is left would be chance.
    grads = [x + randn(*shape, dtype=dtype, device=device)]
    gate = randn(1, dtype=dtype, device=device)
    mask = torch.rand(shape[:-1], device=device) < 0.5 if masked else None
    if masked:
        x[~mask] = float("nan")
    grad_x, grad_residual, _ = assert_gradients_no_worse(
        mllama_kernels.gated_residual,
        reference.gated_residual,
        x,
        residual,
        gate,
        mask,
        grads=grads,
    )
    assert grad_residual.equal(grads[0])
    assert mask is None or not grad_x[~mask].any()
    backward = torch.ops.mllama_kernels.gated_residual_backward
    expected = backward(grads[0], x, gate, mask)
    views = strided(grads[0], 3), strided(x)
    assert all(map(torch.equal, backward(*views, gate, mask), expected))


def test_gradient_properties(device):
    """Every element counts once, a wide-open gate has a tiny gradient, and a hidden row none."""
    x, grad = torch.ones(300, 520, device=device), torch.ones(300, 520, device=device)
    backward = torch.ops.mllama_kernels.gated_residual_backward
    zero = torch.zeros(1, device=device)
    grad_x, grad_gate = backward(grad, x, zero, None)
    assert not grad_x.any() and grad_gate.item() == x.numel()
    wide = backward(grad, x, zero + 20, None)[1].item()
    assert wide == pytest.approx(x.numel() * 4 * math.exp(-40), rel=1e-6)
    mask = torch.arange(300, device=device) % 3 == 0
    grad[~mask] = float("inf")
    assert backward(grad, x, zero, mask)[1].item() == 100 * 520


def test_trains(device):
    x, residual = torch.randn(3, 16, device=device), torch.randn(3, 16, device=device)
    gate, mask = torch.randn(1, device=device), torch.tensor([True, False, True], device=device)
    assert_gradcheck(mllama_kernels.gated_residual, x, residual, gate)
    assert_gradcheck(mllama_kernels.gated_residual, x, residual, gate, mask)
    assert_trains_compiled(mllama_kernels.gated_residual, x, residual, gate, mask)
    leaf = gate.clone().requires_grad_()
    mllama_kernels.gated_residual(x[:0], residual[:0], leaf).sum().backward()
    assert leaf.grad.item() == 0


def test_errors(device):
    x, gate = torch.randn(3, 16, device=device), torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match=r"gate must have one element, got shape \(3,\)"):
        mllama_kernels.gated_residual(x, x, gate.expand(3))
    with pytest.raises(RuntimeError, match=r"row_mask must have the leading shape of x, \(3, 16\)"):
        mllama_kernels.gated_residual(x, x, gate, torch.ones(4, dtype=torch.bool, device=device))
    with pytest.raises(
        RuntimeError, match="residual must have the dtype of x, float32, got bfloat16"
    ):
        mllama_kernels.gated_residual(x, x.bfloat16(), gate)
    backward = torch.ops.mllama_kernels.gated_residual_backward
    with pytest.raises(RuntimeError, match=r"grad_out must have shape \(3, 16\), got \(3, 8\)"):
        backward(x[:, :8], x, gate, None)
    with pytest.raises(RuntimeError, match=r"gate must have one element, got shape \(2,\)"):
        backward(x, x, gate.expand(2), None)
