"""vision_attention."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    FLOATS,
    assert_compiles,
    assert_no_worse,
    assert_same_bits_on_any_threads,
    grid,
    opcheck,
    randn,
    several_blocks,
    simulated_share,
)

import mllama_kernels
from mllama_kernels import reference

CASES = grid(
    [(1, 40, 2, 64), (1, 72, 1, 80), (2, 65, 1, 128)],
    [(1, 1, 1, 80), (2, 127, 3, 80), (1, 129, 2, 128), (1, 516, 2, 80), (1, 4 * 264, 2, 80)],
)


def make(batch, seqlen, heads, dim, dtype, device):
    """q, k, v as views of one fused projection, as the encoder has them."""
    qkv = randn(batch, seqlen, 3, heads, dim, dtype=dtype, device=device)
    return qkv.unbind(2)


def tile_padding(batch, seqlen, device, tiles=4, valid_tiles=2, pad=3):
    """The encoder's padding: the last tokens of every tile and all tokens of absent tiles."""
    token = torch.arange(seqlen, device=device)
    per_tile = -(-seqlen // tiles)
    padding = (token % per_tile >= per_tile - pad) | (token // per_tile >= valid_tiles)
    return padding.expand(batch, -1).clone()


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_matches_float64(device, dtype, case, padded):
    q, k, v = make(*case, dtype, device)
    padding = tile_padding(case[0], case[1], device) if padded else None
    out = mllama_kernels.vision_attention(q, k, v, padding)
    assert_no_worse(out, reference.vision_attention, q, k, v, padding)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("valid_tiles", [1, 2, 3, 4])
def test_checkpoint_shape(device, dtype, valid_tiles):
    q, k, v = make(1, 6432, 2, 80, dtype, device)
    padding = tile_padding(1, 6432, device, valid_tiles=valid_tiles, pad=7)
    out = mllama_kernels.vision_attention(q, k, v, padding)
    assert_no_worse(out, reference.vision_attention, q, k, v, padding)


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_padding_and_scale(device, dtype):
    q, k, v = make(2, grid([75], [200])[-1], 2, 80, dtype, device)
    padding = torch.rand(q.shape[:2], device=device) < 0.5
    out = mllama_kernels.vision_attention(q, k, v, padding, softmax_scale=0.3)
    assert_no_worse(out, reference.vision_attention, q, k, v, padding, softmax_scale=0.3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_padding_gives_zeros(device, dtype):
    """Padding that sees only padding sees nothing; one real token changes that."""
    q, k, v = make(1, 24, 1, 64, dtype, device)
    padding = torch.ones(1, 24, dtype=torch.bool, device=device)
    assert not mllama_kernels.vision_attention(q, k, v, padding).any()
    padding[0, 5] = False
    out = mllama_kernels.vision_attention(q, k, v, padding)
    torch.testing.assert_close(out[0, 0], v[0, 5], rtol=1e-6, atol=1e-6)


def test_permuting_keys_changes_nothing(device):
    q, k, v = make(1, 70, 2, 80, torch.float32, device)
    padding = torch.rand(1, 70, device=device) < 0.3
    padding[:, 0] = False
    order = torch.randperm(70, device=device)
    # With the permuted padding applied to keys only through the class of each query, permute both.
    out = mllama_kernels.vision_attention(q, k, v, padding)
    moved = mllama_kernels.vision_attention(
        q[:, order], k[:, order], v[:, order], padding[:, order]
    )
    torch.testing.assert_close(moved, out[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_invariant_and_repeatable(device, dtype):
    q, k, v = make(2, 70, 2, 80, dtype, device)
    out = mllama_kernels.vision_attention(q, k, v)
    assert torch.equal(mllama_kernels.vision_attention(q, k, v), out)
    assert torch.equal(mllama_kernels.vision_attention(q[1:], k[1:], v[1:]), out[1:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_threads(device, dtype):
    """They set how many rows a task has."""
    q, k, v = make(1, several_blocks(), 2, 80, dtype, device)
    padding = torch.rand(q.shape[:2], device=device) < 0.3
    assert_same_bits_on_any_threads(lambda: (mllama_kernels.vision_attention(q, k, v, padding),))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_scores_do_not_overflow(device, dtype):
    q, k, v = (t * 60 for t in make(4, 64, 4, 64, dtype, device))
    out = mllama_kernels.vision_attention(q, k, v)
    assert out.isfinite().all()
    if dtype != torch.float32:  # plain PyTorch rounds the scores themselves
        assert_no_worse(out, reference.vision_attention, q, k, v, times=4.0)
        return
    # A score near 2^15 rounds about ten times by 2^-24 of itself, in its sum, its scaling and its
    # exponent. Where two nearly tie, a quarter of their difference's error goes from one value to
    # another, at most 10 sqrt(2) / 4 * 2 times the largest value; which library is lucky there is chance.
    q, k, v = (t.double() for t in (q, k, v))
    largest = torch.einsum("bihd,bjhd->bhij", q, k).abs().max() * q.shape[-1] ** -0.5
    error = (out.double() - reference.vision_attention(q, k, v)).abs().max()
    assert error <= 7 * 2**-24 * largest * v.abs().max()


def test_empty_and_torch_machinery(device):
    q, k, v = make(1, 16, 1, 64, torch.float32, device)
    assert mllama_kernels.vision_attention(q[:0], k[:0], v[:0]).shape == (0, 16, 1, 64)
    assert mllama_kernels.vision_attention(q[:, :0], k[:, :0], v[:, :0]).shape == (1, 0, 1, 64)
    padding = torch.rand(1, 16, device=device) < 0.5
    opcheck(
        "vision_attention", (q.contiguous(), k.contiguous(), v.contiguous(), padding, 0.1, False)
    )
    assert_compiles(mllama_kernels.vision_attention, q, k, v, padding)


def test_misaligned_operands(device):
    """Rows that do not start on a 16-byte boundary give the same result."""
    q, k, v = make(1, 33, 2, 80, torch.bfloat16, device)
    expected = mllama_kernels.vision_attention(q, k, v)

    def shift(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        flat[1:] = t.reshape(-1)
        return flat[1:].view(t.shape)

    assert torch.equal(mllama_kernels.vision_attention(shift(q), shift(k), shift(v)), expected)


def test_errors(device):
    q, k, v = make(1, 16, 2, 64, torch.float32, device)
    with pytest.raises(RuntimeError, match="softmax_scale must be positive"):
        mllama_kernels.vision_attention(q, k, v, softmax_scale=0.0)
    with pytest.raises(
        RuntimeError, match=r"k must have shape \(1, 16, 2, 64\), got \(1, 15, 2, 64\)"
    ):
        mllama_kernels.vision_attention(q, k[:, 1:], v)
    with pytest.raises(RuntimeError, match=r"padding must have shape \(1, 16\)"):
        mllama_kernels.vision_attention(q, k, v, torch.zeros(16, dtype=torch.bool, device=device))
    with pytest.raises(RuntimeError, match="head_dim must be"):
        mllama_kernels.vision_attention(q[..., :4], k[..., :4], v[..., :4])
    with pytest.raises(RuntimeError, match="v must have the dtype of q, float32, got float16"):
        mllama_kernels.vision_attention(q, k, v.half())
    with pytest.raises(RuntimeError, match="q must be contiguous in its last dimension"):
        mllama_kernels.vision_attention(q.transpose(1, 3).contiguous().transpose(1, 3), k, v)
