"""rms_norm and add_rms_norm."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SIMULATED
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

SHAPES = grid([(3, 7), (2, 129), (5, 64)], [(257, 1), (4, 1280), (33, 4096), (2, 8192), (3, 16384)])


@simulated_share(2)
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


# An element and the mean square of its row, such that the product with the inverse of the root rounds
# to one number or its neighbour, depending on the last bit of that inverse.
CLOSE_CALLS = {
    torch.bfloat16: [(7, 14213 / 64), (5, 173802 / 64), (9, 104110 / 64), (7, 147023 / 128)],
    torch.float16: [(1, 65954 / 64), (1, 74838 / 64), (2, 65954 / 64), (1, 114521 / 128)],
    torch.float32: [(7, 14213 / 64), (1, 65954 / 64)],
}


def close_calls(dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of small integers, whose squares have one sum whatever the order of adding them is."""
    rows = []
    for value, mean in CLOSE_CALLS[dtype]:
        row, left = [value], int(mean * dim) - value * value
        for place in range(dim - 1, 0, -1):  # even shares, and the largest squares of the rest
            row.append(math.isqrt(left // place if place > 8 else left))
            left -= row[-1] ** 2
        assert left == 0 and max(row) <= 256
        rows.append(row)
    return torch.tensor(rows, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", grid([64, 128], [1024, 4096]))
def test_fused_norms_have_its_bits(device, dtype, dim):
    """Inside skinny_linear, and in the gradient."""
    x, ones = close_calls(dim, dtype, device), torch.ones(dim, dtype=dtype, device=device)
    expected = mllama_kernels.rms_norm(x, ones, 0.0)
    if device.type == "cuda" or SIMULATED:
        mean = x.double().square().mean(-1, keepdim=True)
        assert torch.equal(expected, (x.float() * (1 / mean.sqrt()).float()).to(dtype))
    identity = torch.eye(dim, dtype=dtype, device=device)[:64]
    for rows in (x, x.repeat(4, 1)[:16]):
        out = mllama_kernels.skinny_linear(rows, identity, norm_weight=ones, eps=0.0)
        assert torch.equal(out, mllama_kernels.rms_norm(rows, ones, 0.0)[:, :64])
    for row, normed in zip(x, expected):
        leaf = ones.clone().requires_grad_()  # its gradient is the normalised row
        mllama_kernels.rms_norm(row[None], leaf, 0.0).sum().backward()
        assert torch.equal(leaf.grad, normed)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", grid([64, 80, 320], [128, 1024, 4096, 4104, 16392]))
def test_fused_norms_add_squares_in_any_order(device, dtype, dim):
    """Kernels divide a row among threads as suits them; no bit shows it, whatever the row holds."""
    x = randn(16, dim, dtype=dtype, device=device) * torch.logspace(-3, 3, dim, device=device).to(
        dtype
    )
    norm = {"norm_weight": randn(dim, dtype=dtype, device=device), "eps": 1e-3}
    normed = mllama_kernels.rms_norm(x, norm["norm_weight"], norm["eps"])
    weight = randn(24, dim, dtype=dtype, device=device)
    for rows in (1, 3, 16):
        out = mllama_kernels.skinny_linear(x[:rows], weight, **norm)
        assert torch.equal(out, mllama_kernels.skinny_linear(normed[:rows], weight)), rows
    apart = torch.full((16, dim + 3), torch.nan, dtype=dtype, device=device)  # alignment
    apart[:, :dim] = x
    assert torch.equal(mllama_kernels.rms_norm(apart[:, :dim], *norm.values()), normed)
    for row, y in zip(x, normed):
        ones = torch.ones_like(row).requires_grad_()
        mllama_kernels.rms_norm(row[None], ones, norm["eps"]).sum().backward()
        assert torch.equal(ones.grad * norm["norm_weight"], y)
    if dim > 128:
        return
    keys, values = (randn(1, 1, 40, 1, dim, dtype=dtype, device=device) for _ in range(2))
    norm = {"q_norm_weight": norm["norm_weight"], "eps": norm["eps"]}
    for rows in (1, 16, 130):
        q, normed_q = (t.repeat(9, 1)[:rows].view(1, rows, 1, dim) for t in (x, normed))
        out = mllama_kernels.cross_attention(q, keys, values, **norm)
        assert torch.equal(out, mllama_kernels.cross_attention(normed_q, keys, values)), rows


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


# One lane to several warps per row, rows of any alignment, and sums over the rows in registers, in
# shared memory and outside of it.
GRADIENT_SHAPES = grid(
    [(3, 7), (2, 129), (45, 64), (5, 264)],
    [(257, 9), (9, 1280), (33, 4096), (2, 8192), (3, 16384), (2, 40000), (1030, 24)],
)


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
def test_gradient_matches_float64(device, dtype, shape):
    x = randn(*shape, dtype=dtype, device=device, scale=3)
    weight = randn(shape[-1], dtype=dtype, device=device)
    assert_gradients_no_worse(mllama_kernels.rms_norm, reference.rms_norm, x, weight)
    residual = randn(*shape, dtype=dtype, device=device)
    assert_gradients_no_worse(
        mllama_kernels.add_rms_norm, reference.add_rms_norm, x, residual, weight
    )


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", grid([24], [264, 37, 8200]))
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "mask"])
def test_gradient_of_gate_and_row_mask(device, dtype, dim, gated):
    x, residual = (randn(2, 19, dim, dtype=dtype, device=device) for _ in range(2))
    weight, gate = randn(dim, dtype=dtype, device=device), randn(1, dtype=dtype, device=device)
    # Near x, so that the terms of the gate's gradient do not cancel: what is left would be chance.
    grads = [x + randn(2, 19, dim, dtype=dtype, device=device), 3 * x]
    mask = torch.rand(2, 19, device=device) < 0.5
    x[~mask] = float("nan")  # a hidden row adds nothing, whatever it holds
    kwargs = {"gate": gate if gated else None, "row_mask": mask}
    arguments = (mllama_kernels.add_rms_norm, reference.add_rms_norm, x, residual, weight)
    grad_x, *_ = assert_gradients_no_worse(*arguments, grads=grads, **kwargs)
    assert not grad_x[~mask].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", grid([24], [520]))
def test_weight_gradient_of_many_rows(device, dtype, dim):
    x, weight = randn(8195, dim, dtype=dtype, device=device), randn(dim, dtype=dtype, device=device)
    assert_gradients_no_worse(mllama_kernels.rms_norm, reference.rms_norm, x, weight)


def test_gradient_of_one_result_only(device):
    """The other counts as zero, and an argument that it alone depends on gets none."""
    x, residual, weight = (
        randn(*s, dtype=torch.float32, device=device) for s in [(5, 64)] * 2 + [(64,)]
    )
    gate, mask = (
        torch.ones(1, device=device),
        torch.tensor([True, False] * 2 + [True], device=device),
    )
    for kwargs in ({}, {"row_mask": mask}, {"gate": gate}, {"gate": gate, "row_mask": mask}):
        for used in (0, 1):
            both = [torch.zeros_like(x), torch.zeros_like(x)]
            both[used] = torch.randn_like(x)
            leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
            outs = mllama_kernels.add_rms_norm(*leaves, **kwargs)
            alone = torch.autograd.grad(outs[used], leaves, both[used], allow_unused=True)
            leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
            together = torch.autograd.grad(
                mllama_kernels.add_rms_norm(*leaves, **kwargs), leaves, both
            )
            assert (alone[2] is None) == (used == 1)
            for a, t in zip(alone[: 3 - used], together):
                torch.testing.assert_close(a, t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_strided_rows(device, dtype):
    x, grad = (randn(3, 5, 40, dtype=dtype, device=device) for _ in range(2))
    weight = randn(40, dtype=dtype, device=device)
    backward = torch.ops.mllama_kernels.rms_norm_backward
    expected = backward(grad, x, weight, 1e-5)
    swapped = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for views in ((strided(grad), strided(x)), (strided(grad, 3), x), (swapped, strided(x))):
        assert all(map(torch.equal, backward(*views, weight, 1e-5), expected))


def test_gradient_properties(device):
    """Moving along x changes nothing at eps 0; a row's gradient depends on no other row, and NaN stays."""
    x, grad = (randn(9, 256, dtype=torch.float32, device=device) for _ in range(2))
    weight = torch.randn(256, device=device)
    backward = torch.ops.mllama_kernels.rms_norm_backward
    grad_x, grad_weight = backward(grad, x, weight, 0.0)
    assert (grad_x * x).sum(-1).abs().max() < 1e-5 * (grad_x.abs() * x.abs()).sum(-1).max()
    assert torch.equal(backward(grad[3:4], x[3:4], weight, 0.0)[0], grad_x[3:4])
    assert torch.equal(backward(grad, x, weight, 0.0)[1], grad_weight)
    one_hot = torch.zeros_like(grad)
    one_hot[:, 17] = 1.0  # a row left out or counted twice would show
    normalized = mllama_kernels.rms_norm(x, torch.ones_like(weight), 0.0)
    assert backward(one_hot, x, weight, 0.0)[1].count_nonzero() == 1
    torch.testing.assert_close(
        backward(one_hot, x, weight, 0.0)[1][17], normalized[:, 17].sum(), rtol=1e-6, atol=1e-6
    )
    x[0, 3] = float("nan")
    assert backward(grad, x, weight, 0.0)[0][1:].equal(grad_x[1:])


def test_trains(device):
    x, residual = torch.randn(2, 3, 16, device=device), torch.randn(2, 3, 16, device=device)
    weight, gate = torch.randn(16, device=device), torch.randn(1, device=device)
    mask = torch.tensor([[True, False, True], [True, True, False]], device=device)
    assert_gradcheck(mllama_kernels.rms_norm, x, weight)
    assert_gradcheck(mllama_kernels.add_rms_norm, x, residual, weight)
    double = gate.double()
    assert_gradcheck(mllama_kernels.add_rms_norm, x, residual, weight, gate=double, row_mask=mask)
    assert_gradcheck(
        lambda g: mllama_kernels.add_rms_norm(*(t.double() for t in (x, residual, weight)), gate=g),
        gate,
    )
    assert_trains_compiled(mllama_kernels.rms_norm, x, weight)
    assert_trains_compiled(mllama_kernels.add_rms_norm, x, residual, weight)
    assert_trains_compiled(
        mllama_kernels.add_rms_norm, x, residual, weight, gate=gate, row_mask=mask
    )
    opcheck("rms_norm_backward", (x, residual, weight, 1e-5))
    opcheck("add_rms_norm_backward", (x, None, residual, weight, 1e-5, None, None, None))
    opcheck("add_rms_norm_backward", (x, x, residual, weight, 1e-5, x, gate, mask))


def test_gradient_of_no_rows(device):
    x = torch.empty(0, 8, device=device, requires_grad=True)
    weight, gate = (torch.ones(n, device=device, requires_grad=True) for n in (8, 1))
    mllama_kernels.add_rms_norm(x, x.detach(), weight, gate=gate)[0].sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8, device=device)) and gate.grad.item() == 0


def test_backward_errors(device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    backward = torch.ops.mllama_kernels.rms_norm_backward
    with pytest.raises(RuntimeError, match=r"grad_y must have shape \(3, 16\), got \(3, 8\)"):
        backward(x[:, :8], x, weight, 1e-5)
    with pytest.raises(RuntimeError, match="grad_y must have the dtype of x, float32"):
        backward(x.half(), x, weight, 1e-5)
    backward = torch.ops.mllama_kernels.add_rms_norm_backward
    with pytest.raises(RuntimeError, match="x and gate must be given together"):
        backward(x, None, x, weight, 1e-5, None, weight[:1], None)
    with pytest.raises(RuntimeError, match=r"leading shape of total, \(3, 16\), got \(4,\)"):
        mask = torch.ones(4, dtype=torch.bool, device=device)
        backward(x, None, x, weight, 1e-5, None, None, mask)
