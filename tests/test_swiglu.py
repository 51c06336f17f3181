"""swiglu."""

from __future__ import annotations

import pytest
import torch
from numerics import FLOATS, assert_compiles, assert_no_worse, grid, opcheck, randn, strided

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
    assert_compiles(mllama_kernels.swiglu, x)
    with pytest.raises(NotImplementedError, match="swiglu has no backward kernel"):
        mllama_kernels.swiglu(x.requires_grad_()).sum().backward()


def test_errors(device):
    with pytest.raises(RuntimeError, match=r"even last dimension, got shape \(2, 7\)"):
        mllama_kernels.swiglu(torch.randn(2, 7, device=device))
