"""swiglu."""

from __future__ import annotations

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
    strided,
)

import mllama_kernels
from mllama_kernels import reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", grid([(3, 14), (2, 2, 264)], [(1, 2), (65, 4096), (2, 28672)]))
def test_matches_float64(device, dtype, shape):
    x = randn(*shape, dtype=dtype, device=device, scale=3)
    assert_no_worse(mllama_kernels.swiglu(x), reference.swiglu, x)
    assert torch.equal(mllama_kernels.swiglu(strided(x)), mllama_kernels.swiglu(x))


def test_extremes(device):
    """Large negative gates give zero, large positive ones pass; nothing overflows on the way."""
    gate = torch.tensor(
        [-1e4, -100.0, -88.0, 0.0, 88.0, 1e4, float("inf"), float("nan")], device=device
    )
    out = mllama_kernels.swiglu(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))[0]
    assert torch.equal(out[[0, 3]], torch.zeros(2, device=device))
    assert torch.equal(out[[4, 5, 6]], gate[[4, 5, 6]])
    assert out[7].isnan() and out[1:3].abs().max() < 1e-30


def test_empty_and_torch_machinery(device):
    assert mllama_kernels.swiglu(torch.empty(0, 8, device=device)).shape == (0, 4)
    x = torch.randn(3, 32, device=device)
    opcheck("swiglu", (x,))
    opcheck("swiglu_backward", (x[:, :16], x))
    assert_compiles(mllama_kernels.swiglu, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", grid([(3, 14), (2, 2, 264)], [(1, 2), (65, 4096), (2, 28672)]))
def test_gradient_matches_float64(device, dtype, shape):
    x = randn(*shape, dtype=dtype, device=device, scale=3)
    assert_gradients_no_worse(mllama_kernels.swiglu, reference.swiglu, x)
    grad = randn(*shape[:-1], shape[-1] // 2, dtype=dtype, device=device)
    backward = torch.ops.mllama_kernels.swiglu_backward
    assert backward(strided(grad), strided(x)).equal(backward(grad, x))
    assert backward(grad.transpose(0, -2).contiguous().transpose(0, -2), x).equal(backward(grad, x))


def test_gradient_extremes(device):
    """Where the sigmoid is flat the gradient is 0 or that of the identity, without overflow."""
    gate = torch.tensor([-1e4, -100.0, -88.0, 88.0, 1e4], device=device)
    x = torch.cat([gate, 2 * torch.ones_like(gate)]).requires_grad_()
    mllama_kernels.swiglu(x).sum().backward()
    grad_gate, grad_up = x.grad.chunk(2)
    assert grad_gate[:3].abs().max() < 1e-30 and grad_up[:3].abs().max() < 1e-30
    assert grad_gate[3:].tolist() == [2, 2] and grad_up[3:].equal(gate[3:])


def test_trains(device):
    x = torch.randn(3, 32, device=device)
    assert_gradcheck(mllama_kernels.swiglu, x)
    assert_trains_compiled(mllama_kernels.swiglu, x)
    empty = torch.empty(0, 8, device=device, requires_grad=True)
    mllama_kernels.swiglu(empty).sum().backward()
    assert empty.grad.shape == (0, 8)


def test_errors(device):
    with pytest.raises(RuntimeError, match=r"even last dimension, got shape \(2, 7\)"):
        mllama_kernels.swiglu(torch.randn(2, 7, device=device))
    backward = torch.ops.mllama_kernels.swiglu_backward
    x = torch.randn(2, 8, device=device)
    with pytest.raises(RuntimeError, match=r"grad_out must have shape \(2, 4\), got \(2, 8\)"):
        backward(x, x)
    with pytest.raises(RuntimeError, match="grad_out must have the dtype of gate_up, float32"):
        backward(x[:, :4].bfloat16(), x)
