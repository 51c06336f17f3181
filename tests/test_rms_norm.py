"""rms_norm and add_rms_norm."""

from __future__ import annotations

import pytest
import torch
from numerics import FLOATS, assert_compiles, assert_no_worse, grid, opcheck, randn, strided

import mllama_kernels
from mllama_kernels import reference

SHAPES = grid([(3, 7), (2, 129), (5, 64)], [(257, 1), (4, 1280), (33, 4096), (2, 8192), (3, 16384)])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device, dtype, shape):
    x = randn(*shape, dtype=dtype, device=device, scale=3)
    weight = randn(shape[-1], dtype=dtype, device=device)
    assert_no_worse(mllama_kernels.rms_norm(x, weight, 1e-5), reference.rms_norm, x, weight, 1e-5)
    residual = randn(*shape, dtype=dtype, device=device)
    out = mllama_kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert_no_worse(out, reference.add_rms_norm, x, residual, weight, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", grid([96], [4096, 37]))
def test_gate_and_row_mask(device, dtype, dim):
    x, residual = (randn(2, 9, dim, dtype=dtype, device=device) for _ in range(2))
    weight, gate = randn(dim, dtype=dtype, device=device), randn(1, dtype=dtype, device=device)
    mask = torch.rand(2, 9, device=device) < 0.5
    x[~mask] = float("nan")  # a hidden row adds nothing, whatever it holds
    kwargs = {"gate": gate, "row_mask": mask}
    out = mllama_kernels.add_rms_norm(x, residual, weight, 1e-5, **kwargs)
    assert_no_worse(out, reference.add_rms_norm, x, residual, weight, 1e-5, **kwargs)
    assert torch.equal(out[1][~mask], residual[~mask])
    assert torch.equal(out[1], mllama_kernels.gated_residual(x, residual, gate, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_transformers(device, dtype):
    """Almost every element has the very bits of the two-rounding formula; a single rounding has not."""
    x, weight = randn(16, 512, dtype=dtype, device=device), randn(512, dtype=dtype, device=device)
    out = mllama_kernels.rms_norm(x, weight)
    assert (out == reference.rms_norm(x, weight)).float().mean() > 0.99
    once = reference.rms_norm(x.double(), weight.double()).to(dtype)
    assert (out == once).float().mean() < 0.95


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_rows(device, dtype):
    x = strided(randn(3, 5, 40, dtype=dtype, device=device))
    weight = randn(40, dtype=dtype, device=device)
    assert torch.equal(
        mllama_kernels.rms_norm(x, weight), mllama_kernels.rms_norm(x.contiguous(), weight)
    )
    heads = randn(6, 3 * 64 + 16, dtype=dtype, device=device)[:, 8:200].unflatten(-1, (3, 64))
    weight = randn(64, dtype=dtype, device=device)
    assert torch.equal(
        mllama_kernels.rms_norm(heads, weight), mllama_kernels.rms_norm(heads.contiguous(), weight)
    )
    permuted = randn(2, 3, 4, 64, dtype=dtype, device=device).permute(2, 0, 1, 3)
    assert_no_worse(
        mllama_kernels.rms_norm(permuted, weight), reference.rms_norm, permuted.contiguous(), weight
    )


def test_properties(device):
    """Scaling x changes nothing at eps 0; one large element dominates its row; rows are independent."""
    x = randn(4, 256, dtype=torch.float32, device=device)
    weight = torch.ones(256, device=device)
    scaled = mllama_kernels.rms_norm(x * 4, weight, 0.0)
    assert torch.equal(scaled, mllama_kernels.rms_norm(x, weight, 0.0))
    one_hot = torch.eye(256, device=device) * 1e3  # a dropped element would give inf or nan
    out = mllama_kernels.rms_norm(one_hot, weight, 0.0)
    torch.testing.assert_close(out, torch.eye(256, device=device) * 16, rtol=1e-6, atol=0)
    assert torch.equal(
        mllama_kernels.rms_norm(x[1:2], weight), mllama_kernels.rms_norm(x, weight)[1:2]
    )
    x[0, 3] = float("nan")
    assert mllama_kernels.rms_norm(x, weight)[1:].isfinite().all()


def test_extremes(device):
    for value in (0.0, 1e-30, 1e18):
        x = torch.full((2, 64), value, device=device)
        weight = torch.ones(64, device=device)
        assert_no_worse(mllama_kernels.rms_norm(x, weight), reference.rms_norm, x, weight)


def test_empty(device):
    weight = torch.ones(8, device=device)
    assert mllama_kernels.rms_norm(torch.empty(0, 8, device=device), weight).shape == (0, 8)
    empty = torch.empty(2, 0, 8, device=device)
    assert mllama_kernels.add_rms_norm(empty, empty, weight)[1].shape == (2, 0, 8)


def test_torch_machinery(device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    gate, mask = torch.randn(1, device=device), torch.tensor([True, False, True], device=device)
    opcheck("rms_norm", (x, weight, 1e-5))
    opcheck("add_rms_norm", (x, x.clone(), weight, 1e-5, gate, mask))
    assert_compiles(mllama_kernels.rms_norm, x, weight)
    assert_compiles(mllama_kernels.add_rms_norm, x, x.clone(), weight, gate=gate, row_mask=mask)


def test_errors(device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(16,\), got \(8,\)"):
        mllama_kernels.rms_norm(x, weight[:8])
    with pytest.raises(
        RuntimeError, match=r"weight must have the dtype of x, float32, got float16"
    ):
        mllama_kernels.rms_norm(x, weight.half())
    with pytest.raises(
        RuntimeError, match=r"residual must have the shape of x, \(3, 16\), got \(3, 8\)"
    ):
        mllama_kernels.add_rms_norm(x, x[:, :8], weight)
    with pytest.raises(RuntimeError, match=r"row_mask must be bool, got int64"):
        mllama_kernels.add_rms_norm(
            x, x, weight, row_mask=torch.ones(3, dtype=torch.int64, device=device)
        )
    with pytest.raises(RuntimeError, match="eps must not be negative"):
        mllama_kernels.rms_norm(x, weight, -1.0)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        mllama_kernels.rms_norm(x.int(), weight.int())


def test_backward_says_that_there_is_none(device):
    x, weight = torch.randn(3, 16, device=device, requires_grad=True), torch.ones(16, device=device)
    out = mllama_kernels.rms_norm(x, weight)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match="rms_norm has no backward kernel"):
        out.sum().backward()
