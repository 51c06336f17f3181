"""Gradients of cross_attention, and the log-sum-exp that they need."""

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
from test_cross_attention import make

import mllama_kernels
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST

# batch, rows, tiles, tokens per tile, query heads, key/value heads, head_dim
CASES = grid(
    [(1, 23, 2, 17, 4, 1, 64), (2, 21, 3, 33, 2, 2, 128), (1, 20, 2, 65, 8, 1, 80)],
    [(2, 70, 4, 65, 8, 2, 128), (1, 130, 5, 26, 3, 1, 64), (1, 17, 2, 1601, 4, 1, 128)],
)


def fused(ops, mask, **kwargs):
    """Attention as a function of q and of keys and values side by side in memory, and of a weight."""

    def attention(q, kv, weight=None):
        k, v = kv.unbind(-3)
        return ops.cross_attention(q, k, v, mask, q_norm_weight=weight, **kwargs)

    return attention


def make_fused(case, dtype, device):
    batch, rows, tiles, tokens, heads, kv_heads, dim = case
    q = randn(batch, rows, heads, dim, dtype=dtype, device=device)
    kv = randn(batch, tiles, tokens, 2, kv_heads, dim, dtype=dtype, device=device)
    return q, kv, torch.rand(batch, rows, tiles, device=device) < 0.5


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_match_float64(device, dtype, case, masked):
    q, kv, mask = make_fused(case, dtype, device)
    mask = mask if masked else None
    assert_gradients_no_worse(
        fused(mllama_kernels, mask), fused(reference, mask), q, kv, largest=ATTENTION_LARGEST
    )


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_through_the_norm_match_float64(device, dtype, case):
    q, kv, mask = make_fused(case, dtype, device)
    weight = randn(case[-1], dtype=dtype, device=device)
    kwargs = {"softmax_scale": 0.1, "eps": 1e-2}
    ours, plain = (fused(ops, mask, **kwargs) for ops in (mllama_kernels, reference))
    assert_gradients_no_worse(ours, plain, q, kv, weight, largest=ATTENTION_LARGEST)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_shape(device, dtype):
    q, kv, mask = make_fused((1, 256, 4, 1601, 8, 2, 128), dtype, device)
    weight = randn(128, dtype=dtype, device=device)
    assert_gradients_no_worse(
        fused(mllama_kernels, mask),
        fused(reference, mask),
        q,
        kv,
        weight,
        largest=ATTENTION_LARGEST,
    )


def pool(dtype, device, longest, dim=64):
    """Ragged rows over a pool of tiles: shared, repeated, absent and unused ones."""
    lengths = [longest, 0, 33, longest - 1, 37]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    total = int(bounds[-1])
    q = randn(total, 4, dim, dtype=dtype, device=device)
    kv = randn(7, 37, 2, 2, dim, dtype=dtype, device=device)
    table = [[0, 1, -1], [2, 3, 4], [4, -1, 0], [-1, -1, -1], [6, 1, 6]]
    mask = torch.rand(total, 3, device=device) < 0.7
    kwargs = {
        "tile_table": torch.tensor(table, device=device).int(),
        "cu_seqlens": bounds,
        "max_seqlen": longest,
    }
    return q, kv, mask, kwargs


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("longest", grid([40], [130]))
def test_packed(device, dtype, longest):
    q, kv, mask, kwargs = pool(dtype, device, longest)
    weight = randn(64, dtype=dtype, device=device)
    for visible in (mask, None):
        ours, plain = (fused(ops, visible, **kwargs) for ops in (mllama_kernels, reference))
        grad_q, grad_kv, _ = assert_gradients_no_worse(
            ours, plain, q, kv, weight, largest=ATTENTION_LARGEST
        )
        assert not grad_kv[[2, 3, 5]].any()  # tiles of a sequence without rows, and of none
        blind = slice(int(kwargs["cu_seqlens"][3]), int(kwargs["cu_seqlens"][4]))
        assert not grad_q[blind].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_shared_tiles_sum_in_order(device, dtype):
    """What a sequence alone gives its tiles is what it adds among others."""
    q, kv, mask, kwargs = pool(dtype, device, 40)
    grad = randn(*q.shape, dtype=dtype, device=device)
    grad_q, grad_kv = gradients(fused(mllama_kernels, mask, **kwargs), (q, kv), [grad])
    bounds = kwargs["cu_seqlens"].tolist()
    parts = torch.zeros_like(grad_kv, dtype=torch.float32)
    for b, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        own = {
            "tile_table": kwargs["tile_table"][b : b + 1],
            "cu_seqlens": torch.tensor([0, end - begin], device=device).int(),
            "max_seqlen": max(1, end - begin),
        }
        rows = slice(begin, end)
        alone = fused(mllama_kernels, mask[rows].contiguous(), **own)
        alone_q, alone_kv = gradients(alone, (q[rows], kv), [grad[rows]])
        assert alone_q.equal(grad_q[rows])
        parts += alone_kv.float()
        if b == 4:  # the only user of slot 6, which is two of its tiles
            assert alone_kv[6].equal(grad_kv[6])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad_kv.float(), parts, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sum_exp(device, dtype):
    q, k, v, mask = make((2, grid([9], [70])[-1], 3, 37, 4, 2, 64), dtype, device)
    mask[0, 3] = False
    op = torch.ops.mllama_kernels.cross_attention
    args = (mask, None, 1e-5, 0.2, None, None, 0)
    out, lse = op(q, k, v, *args, True)
    assert out.equal(mllama_kernels.cross_attention(q, k, v, mask, softmax_scale=0.2))
    keys = k.flatten(1, 2).double().permute(0, 2, 3, 1).repeat_interleave(2, 1)
    scores = 0.2 * q.double().transpose(1, 2) @ keys
    visible = mask.repeat_interleave(37, -1).unsqueeze(1)
    expected = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    blind = ~mask.any(-1).unsqueeze(1).expand_as(lse)
    assert blind.any() and (lse[blind] == float("inf")).all() and lse.dtype == torch.float32
    torch.testing.assert_close(lse[~blind].double(), expected[~blind], rtol=2e-6, atol=2e-6)
    one, row = q[:, 3:4].contiguous(), (mask[:, 3:4].contiguous(), *args[1:])  # as in decoding
    _, few = op(one, k, v, *row, True)
    torch.testing.assert_close(few, lse[:, :, 3:4], rtol=2e-6, atol=2e-6)
    assert op(one, k, v, *row, False)[1].numel() == 0
    assert (op(q, k[:, :0], v[:, :0], mask[..., :0], *args[1:], True)[1] == float("inf")).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", [False, True])
def test_hidden_tiles_and_blind_rows(device, dtype, normed):
    """A tile that no row sees and a row that sees no tile get zeros; NaN in them reaches nothing."""
    q, kv, mask = make_fused((2, grid([9], [80])[-1], 3, 140, 4, 2, 64), dtype, device)
    mask[:] = torch.tensor([True, False, True], device=device)
    mask[1, 2:] = False
    grad = randn(*q.shape, dtype=dtype, device=device)
    weight = (randn(64, dtype=dtype, device=device),) if normed else ()
    attention = fused(mllama_kernels, mask)
    clean = gradients(attention, (q, kv, *weight), [grad])
    kv[:, 1] = float("nan")
    if not normed:  # the weight's gradient sums over all rows
        q[1, 2:] = grad[1, 2:] = float("nan")
    spoiled = gradients(attention, (q, kv, *weight), [grad])
    assert all(a.equal(b) for a, b in zip(clean, spoiled))
    assert all(g.isfinite().all() for g in spoiled)
    assert not spoiled[0][1, 2:].any() and not spoiled[1][:, 1].any()
    assert spoiled[0][0].any() and spoiled[1][:, [0, 2]].any(-1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_in_a_tile_hidden_from_some_rows(device, dtype):
    """Rows of one block: only those that see the tile have NaN, whichever they are."""
    q, kv, mask = make_fused((1, 40, 4, 130, 4, 1, 64), dtype, device)
    row = torch.arange(40, device=device)
    mask[..., 0] = True
    mask[0, :, 1], mask[0, :, 2], mask[0, :, 3] = row == 4, row % 2 == 1, row >= 35
    grad = randn(*q.shape, dtype=dtype, device=device)
    attention = fused(mllama_kernels, mask)
    clean = gradients(attention, (q, kv), [grad])
    for tile in (1, 2, 3):
        spoiled = kv.clone()
        spoiled[:, tile] = float("nan")
        grad_q, _ = gradients(attention, (q, spoiled), [grad])
        blind = ~mask[0, :, tile]
        assert torch.equal(grad_q[0, blind], clean[0][0, blind])
        assert grad_q[0, ~blind].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shared", [False, True])
def test_bits_depend_on_neither_batch_nor_threads(device, dtype, shared):
    if shared:
        q, kv, mask, kwargs = pool(dtype, device, grid([38], [90])[-1])
    else:
        case = (3, grid([9], [90])[-1], 3, several_blocks(), 4, 2, 64)
        (q, kv, mask), kwargs = make_fused(case, dtype, device), {}
    weight = randn(64, dtype=dtype, device=device)
    grad = randn(*q.shape, dtype=dtype, device=device)
    attention = fused(mllama_kernels, mask, **kwargs)

    def run():
        return gradients(attention, (q, kv, weight), [grad])

    assert_same_bits_on_any_threads(run)
    if not shared:
        grad_q, grad_kv, _ = run()
        alone = fused(mllama_kernels, mask[1:2])
        own_q, own_kv, _ = gradients(alone, (q[1:2], kv[1:2], weight), [grad[1:2]])
        assert own_q.equal(grad_q[1:2]) and own_kv.equal(grad_kv[1:2])


def test_repeated_tiles(device):
    """Tiles that are the same memory get gradients of their own, which autograd sums."""
    q, k, v, mask = make((1, 5, 3, 20, 4, 2, 64), torch.bfloat16, device)

    def repeated(ops):
        return lambda q, k, v: ops.cross_attention(
            q, *(t[:, :1].expand(-1, 3, -1, -1, -1) for t in (k, v)), mask
        )

    assert_gradients_no_worse(
        repeated(mllama_kernels), repeated(reference), q, k, v, largest=ATTENTION_LARGEST
    )


def test_trains(device):
    q, k, v, mask = make((1, 4, 2, 5, 4, 2, 64), torch.float32, device)
    k, v = k.contiguous(), v.contiguous()
    mask[0, 0], mask[0, 1] = False, True
    weight = torch.randn(64, device=device)

    def attention(q, k, v, weight, mask=mask):
        return mllama_kernels.cross_attention(q, k, v, mask, q_norm_weight=weight)

    assert_trains_compiled(attention, q, k, v, weight)
    small = [t[..., :8].contiguous() for t in (q[:, :3], k[:, :, :3], v[:, :, :3])]
    few = partial(attention, mask=mask[:, :3])
    assert_gradcheck(few, *small, weight[:8].contiguous())
    assert_gradcheck(partial(mllama_kernels.cross_attention, tile_mask=mask[:, :3]), *small)
    for shapes in ((q[:, :0], k, v), (q, k[:, :0], v[:, :0]), (q, k[:, :, :0], v[:, :, :0])):
        leaves = [t.clone().requires_grad_() for t in (*shapes, weight)]
        attention(*leaves, mask=None).sum().backward()
        assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)
    options = (1e-5, 0.1, None, None, 4)
    op = torch.ops.mllama_kernels.cross_attention
    out, lse = op(q, k, v, mask, weight, *options, True)
    opcheck("cross_attention_backward", (out, q, k, v, out, lse, mask, weight, *options))
    out, lse = op(q, k, v, None, None, *options, True)
    opcheck("cross_attention_backward", (out, q, k, v, out, lse, None, None, *options))
    wanted = (t.clone().requires_grad_() for t in (q, k, v))
    opcheck("cross_attention", (*wanted, mask, weight, *options, True))


def test_errors(device):
    q, k, v, mask = make((1, 3, 2, 9, 4, 2, 64), torch.float32, device)
    options = (mask, None, 1e-5, 0.1, None, None, 3)
    op = torch.ops.mllama_kernels.cross_attention
    with pytest.raises(RuntimeError, match="a gradient needs with_lse=True"):
        op(q.clone().requires_grad_(), k, v, *options, False)
    out, lse = op(q, k, v, *options, True)
    backward = torch.ops.mllama_kernels.cross_attention_backward
    with pytest.raises(RuntimeError, match=r"grad_out must have shape .* got \(1, 2, 4, 64\)"):
        backward(out[:, 1:], q, k, v, out, lse, *options)
    with pytest.raises(RuntimeError, match=r"lse must have shape \(1, 4, 3\), got \(1, 4, 2\)"):
        backward(out, q, k, v, out, lse[..., 1:], *options)
    with pytest.raises(RuntimeError, match="grad_out must have the dtype of q, float32"):
        backward(out.half(), q, k, v, out, lse, *options)
