"""Gradients of vision_attention, and the log-sum-exp that they need."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from numerics import (
    FLOATS,
    assert_gradcheck,
    assert_gradients_no_worse,
    assert_same_bits_on_any_threads,
    assert_trains_compiled,
    gradients,
    grid,
    opcheck,
    randn,
    several_blocks,
    simulated_share,
)
from test_vision_attention import make, tile_padding

import mllama_kernels
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST

CASES = grid(
    [(1, 40, 2, 64), (1, 72, 1, 80), (2, 65, 1, 128)],
    [(2, 127, 3, 80), (1, 129, 2, 128), (1, 516, 2, 80)],
)


def fused(ops, padding):
    """Attention as a function of the fused projection, of which q, k and v are views."""
    return lambda qkv: ops.vision_attention(*qkv.unbind(2), padding)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", ["none", "tiles", "random"])
def test_gradients_match_float64(device, dtype, case, padded):
    batch, seqlen, heads, dim = case
    qkv = randn(batch, seqlen, 3, heads, dim, dtype=dtype, device=device)
    padding = {
        "none": None,
        "tiles": tile_padding(batch, seqlen, device),
        "random": torch.rand(batch, seqlen, device=device) < 0.5,
    }[padded]
    assert_gradients_no_worse(
        fused(mllama_kernels, padding), fused(reference, padding), qkv, largest=ATTENTION_LARGEST
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("valid_tiles", [1, 4])
def test_checkpoint_shape(device, dtype, valid_tiles):
    qkv = randn(1, 6432, 3, 1, 80, dtype=dtype, device=device)
    padding = tile_padding(1, 6432, device, valid_tiles=valid_tiles, pad=7)
    assert_gradients_no_worse(
        fused(mllama_kernels, padding), fused(reference, padding), qkv, largest=ATTENTION_LARGEST
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sum_exp(device, dtype):
    q, k, v = make(2, grid([40], [200])[-1], 2, 80, dtype, device)
    padding = tile_padding(2, q.shape[1], device)
    padding[1] = True
    op = torch.ops.mllama_kernels.vision_attention
    out, lse = op(q, k, v, padding, 0.2, True)
    assert out.equal(mllama_kernels.vision_attention(q, k, v, padding, softmax_scale=0.2))
    scores = 0.2 * q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1)
    hidden = (padding[:, :, None] & padding[:, None, :]).unsqueeze(1)
    expected = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse[0].double(), expected[0], rtol=2e-6, atol=2e-6)
    assert lse.dtype == torch.float32 and (lse[1] == float("inf")).all()
    assert op(q, k, v, padding, 0.2, False)[1].numel() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_padding_gets_zeros(device, dtype):
    """Where padding sees nothing and nothing sees it, its gradients are 0 whatever it holds."""
    q, k, v = (t.contiguous() for t in make(2, 70, 2, 64, dtype, device))
    grad = randn(*q.shape, dtype=dtype, device=device)
    padding = torch.zeros(2, 70, dtype=torch.bool, device=device)
    padding[0] = True
    for t in (q, k, v, grad):
        t[0] = float("nan")
    for g in gradients(mllama_kernels.vision_attention, (q, k, v, padding), [grad]):
        assert not g[0].any() and g[1].isfinite().all() and g[1].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_gets_nothing_from_padding(device, dtype):
    """A gradient for padding queries only reaches no padding key, one for the others all keys."""
    q, k, v = make(1, 150, 1, 80, dtype, device)
    padding = torch.rand(1, 150, device=device) < 0.4
    padding[0, 0], padding[0, 1] = True, False
    for at_padding in (True, False):
        rows = padding if at_padding else ~padding
        grad = rows[..., None, None] * randn(*q.shape, dtype=dtype, device=device)
        grad_q, _, grad_v = gradients(mllama_kernels.vision_attention, (q, k, v, padding), [grad])
        assert not grad_q[~rows].any() and grad_q[rows].any(-1).all()
        assert grad_v[padding].any() != at_padding and grad_v[~padding].any(-1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_depend_on_neither_batch_nor_threads(device, dtype):
    q, k, v = make(3, several_blocks(), 2, 80, dtype, device)
    padding = torch.rand(q.shape[:2], device=device) < 0.3
    grad = randn(*q.shape, dtype=dtype, device=device)

    def run(rows=slice(None)):
        return gradients(
            mllama_kernels.vision_attention,
            (q[rows], k[rows], v[rows], padding[rows]),
            [grad[rows]],
        )

    together = run()
    assert all(a.equal(b[1:2]) for a, b in zip(run(slice(1, 2)), together))
    assert_same_bits_on_any_threads(run)


def test_trains(device):
    q, k, v = (t.contiguous() for t in make(1, 16, 2, 64, torch.float32, device))
    padding = tile_padding(1, 16, device, pad=1)
    attention = partial(mllama_kernels.vision_attention, padding=padding)
    assert_trains_compiled(attention, q, k, v)
    few = partial(mllama_kernels.vision_attention, padding=padding[:, 8:14])
    assert_gradcheck(few, *(t[:, 8:14, :, :8].contiguous() for t in (q, k, v)))
    for empty in (q[:0], q[:, :0]):
        leaf = empty.clone().requires_grad_()
        mllama_kernels.vision_attention(leaf, empty, empty).sum().backward()
        assert leaf.grad.shape == empty.shape
    out, lse = torch.ops.mllama_kernels.vision_attention(q, k, v, padding, 0.1, True)
    opcheck("vision_attention_backward", (out, q, k, v, out, lse, padding, 0.1))
    opcheck("vision_attention", (q.requires_grad_(), k, v, padding, 0.1, True))


def test_errors(device):
    q, k, v = make(1, 16, 2, 64, torch.float32, device)
    op = torch.ops.mllama_kernels.vision_attention
    with pytest.raises(RuntimeError, match="a gradient needs with_lse=True"):
        op(q.clone().requires_grad_(), k, v, None, 0.1, False)
    out, lse = op(q, k, v, None, 0.1, True)
    backward = torch.ops.mllama_kernels.vision_attention_backward
    with pytest.raises(RuntimeError, match=r"lse must have shape \(1, 2, 16\), got \(1, 16, 2\)"):
        backward(out, q, k, v, out, lse.transpose(1, 2), None, 0.1)
    with pytest.raises(RuntimeError, match=r"out must have shape .* got \(1, 15, 2, 64\)"):
        backward(out, q, k, v, out[:, 1:], lse, None, 0.1)
