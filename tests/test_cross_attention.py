"""cross_attention: dense and packed, prefill and decode."""

from __future__ import annotations

import numerics
import pytest
import torch
from numerics import (
    FLOATS,
    assert_compiles,
    assert_same_bits_on_any_threads,
    grid,
    opcheck,
    randn,
    several_blocks,
    simulated_share,
)

import mllama_kernels
import mllama_kernels._library as library
from mllama_kernels import reference

# batch, rows, tiles, tokens per tile, query heads, key/value heads, head_dim
CASES = grid(
    [(1, 9, 2, 17, 4, 1, 64), (2, 1, 3, 33, 2, 2, 128), (1, 20, 2, 65, 4, 2, 80)],
    [
        (1, 1, 1, 1, 1, 1, 64),
        (2, 70, 4, 65, 8, 2, 128),
        (1, 130, 5, 26, 3, 1, 64),
        (3, 1, 4, 257, 8, 2, 128),
        (1, 33, 4, 1601, 4, 1, 128),
        (2, 1, 4, 1601, 8, 1, 128),
    ],
)


def assert_no_worse(out, *args, **kwargs):
    """As in numerics. In float32 the 2-norm of the error is 0.7 to 1.4 times plain PyTorch's, but the
    largest of thousands of errors is that of the few rows with large scores: in 1 draw of 100 above twice
    plain PyTorch's, up to 2.5 times, so it may be 4 times that."""
    largest = 4.0 if out.dtype == torch.float32 else None
    numerics.assert_no_worse(out, *args, largest=largest, **kwargs)


def make(case, dtype, device):
    batch, rows, tiles, tokens, heads, kv_heads, dim = case
    q = randn(batch, rows, heads, dim, dtype=dtype, device=device)
    kv = randn(batch, tiles, tokens, 2, kv_heads, dim, dtype=dtype, device=device)
    mask = torch.rand(batch, rows, tiles, device=device) < 0.5
    return q, kv[:, :, :, 0], kv[:, :, :, 1], mask


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_float64(device, dtype, case, masked):
    q, k, v, mask = make(case, dtype, device)
    mask = mask if masked else None
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES[:3])
def test_q_norm(device, dtype, case):
    q, k, v, mask = make(case, dtype, device)
    weight = randn(q.shape[-1], dtype=dtype, device=device)
    out = mllama_kernels.cross_attention(q, k, v, mask, q_norm_weight=weight, softmax_scale=0.2)
    kwargs = {"q_norm_weight": weight, "softmax_scale": 0.2}
    assert_no_worse(out, reference.cross_attention, q, k, v, mask, **kwargs)
    normed = mllama_kernels.rms_norm(q, weight)
    apart = mllama_kernels.cross_attention(normed, k, v, mask, softmax_scale=0.2)
    torch.testing.assert_close(out, apart, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("longest", grid([1, 6], [40]))
def test_packed(device, dtype, longest):
    """Ragged rows over a pool of tiles, shared and absent ones included, equal each sequence alone."""
    lengths = [longest, 0, 1, max(1, longest - 1)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    total = int(bounds[-1])
    q = randn(total, 4, 64, dtype=dtype, device=device)
    k, v = (randn(5, 37, 2, 64, dtype=dtype, device=device) for _ in range(2))
    table = torch.tensor([[0, 1, -1], [2, 3, 4], [4, -1, 0], [-1, -1, -1]], device=device).int()
    mask = torch.rand(total, 3, device=device) < 0.7
    kwargs = {"tile_table": table, "cu_seqlens": bounds, "max_seqlen": longest}
    out = mllama_kernels.cross_attention(q, k, v, mask, **kwargs)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask, **kwargs)
    assert not out[bounds[3] :].any()
    everything = mllama_kernels.cross_attention(q, k, v, **kwargs)
    assert_no_worse(everything, reference.cross_attention, q, k, v, None, **kwargs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 7])
def test_hidden_tiles(device, dtype, rows):
    """Hiding a tile equals deleting it, NaN in it stays out, and hiding all gives exact zeros."""
    q, k, v, mask = make((2, rows, 3, 21, 4, 2, 64), dtype, device)
    k, v = k.contiguous(), v.contiguous()
    mask[:] = torch.tensor([True, False, True], device=device)
    k[:, 1] = v[:, 1] = float("nan")
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert out.isfinite().all()
    kept = mllama_kernels.cross_attention(q, k[:, ::2], v[:, ::2])
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, kept, rtol=tolerance, atol=tolerance)
    mask[0] = False
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert not out[0].any() and out[1].any()


def test_nan_in_a_tile_hidden_from_one_row_only(device):
    """Rows of one block: a NaN tile reaches the row that sees it and no other."""
    q, k, v, mask = make((1, 6, 2, 19, 2, 1, 64), torch.bfloat16, device)
    k, v = k.contiguous(), v.contiguous()
    v[:, 1, 3] = float("nan")
    mask[..., 0] = True
    mask[..., 1] = False
    mask[0, 4, 1] = True
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert out[0, 4].isnan().all()
    assert out[0, [0, 1, 2, 3, 5]].isfinite().all()


# Tokens per tile around the key blocks of 128 and 32.
@pytest.mark.parametrize("tokens", grid([31, 128, 257], [1, 127, 129, 255, 256]))
def test_tile_sizes_around_key_blocks(device, tokens):
    """More blocks than any ring of them holds, each tile's last one but partly filled."""
    q, k, v, mask = make((1, 9, 5, tokens, 4, 1, 64), torch.bfloat16, device)
    mask[0, 4] = True
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim, tiles", grid([(128, 6)], [(128, 9), (64, 9), (80, 6)]))
def test_visibility_patterns_within_a_block(device, dtype, dim, tiles):
    """A tile for one row only, for none, for all, for every other one, from some row on."""
    rows = 40  # 160 rows of packed heads: two blocks, the second partly filled
    q, k, v, mask = make((1, rows, tiles, 130, 4, 1, dim), dtype, device)
    row = torch.arange(rows, device=device)[:, None]
    columns = (row == 0, row < 0, row >= 0, row % 2 == 1, row >= 35, row == rows - 1)
    mask[0, :, :6] = torch.cat(columns, dim=1)
    mask[0, 7] = mask[0, 38] = False
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)
    assert not out[0, [7, 38]].any()
    # NaN that a row does not see leaves its bits alone.
    for tile in (1, 3, 4):
        spoiled_k, spoiled_v = k.clone(), v.clone()
        spoiled_k[:, tile] = spoiled_v[:, tile] = float("nan")
        spoiled = mllama_kernels.cross_attention(q, spoiled_k, spoiled_v, mask)
        blind = ~mask[0, :, tile]
        assert torch.equal(spoiled[0, blind], out[0, blind])
        assert spoiled[0, ~blind].isnan().all()


@pytest.mark.parametrize("dtype", grid([torch.bfloat16], [torch.float16, torch.float32]))
def test_packed_across_row_blocks(device, dtype):
    """Lengths below, at and above the 32 tokens of a block of packed heads, over one pool."""
    lengths = [31, 0, 32, 33, 65, 2]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    total = int(bounds[-1])
    q = randn(total, 4, 64, dtype=dtype, device=device)
    k, v = (randn(4, 140, 1, 64, dtype=dtype, device=device) for _ in range(2))
    table = torch.tensor(
        [[3, -1, 0], [0, 1, 2], [-1, -1, 2], [-1, -1, -1], [1, 3, 1], [2, 0, -1]], device=device
    ).int()
    mask = torch.rand(total, 3, device=device) < 0.6
    kwargs = {"tile_table": table, "cu_seqlens": bounds, "max_seqlen": max(lengths)}
    weight = randn(64, dtype=dtype, device=device)
    out = mllama_kernels.cross_attention(q, k, v, mask, q_norm_weight=weight, **kwargs)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask, q_norm_weight=weight, **kwargs)
    assert not out[bounds[3] : bounds[4]].any()
    for b, length in enumerate(lengths):
        if length < 2:
            continue
        own = slice(bounds[b], bounds[b + 1])
        only = {
            "tile_table": table[b : b + 1].contiguous(),
            "cu_seqlens": torch.tensor([0, length], device=device).int(),
            "max_seqlen": length,
        }
        alone = mllama_kernels.cross_attention(
            q[own], k, v, mask[own], q_norm_weight=weight, **only
        )
        assert torch.equal(alone, out[own])


def test_many_sequences_equal_one(device):
    """Enough blocks of rows to fill a device, where few might share theirs between blocks."""
    q, k, v, mask = make((132, 2, 3, 40, 1, 1, 64), torch.bfloat16, device)
    out = mllama_kernels.cross_attention(q, k, v, mask)
    for b in (0, 77, 131):
        alone = mllama_kernels.cross_attention(*(t[b : b + 1] for t in (q, k, v, mask)))
        assert torch.equal(alone[0], out[b])


@pytest.mark.parametrize("tiles", grid([130], [128, 129]))
def test_many_tiles(device, tiles):
    q, k, v, mask = make((1, 3, tiles, 2, 2, 1, 64), torch.bfloat16, device)
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)


def test_strided_and_repeated_tiles(device):
    """Views whose heads lie outside their tokens, and tiles that are all the same memory."""
    q, _, _, mask = make((1, 5, 3, 20, 4, 2, 64), torch.bfloat16, device)
    k, v = (randn(1, 3, 2, 20, 64, dtype=q.dtype, device=device).transpose(2, 3) for _ in range(2))
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)
    k, v = (t[:, :1].expand(-1, 3, -1, -1, -1) for t in (k, v))
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask)


@pytest.mark.parametrize("rows", [1, 9])
def test_gqa_equals_repeated_heads(device, rows):
    q, k, v, mask = make((1, rows, 2, 33, 6, 2, 64), torch.float32, device)
    shared = mllama_kernels.cross_attention(q, k, v, mask)
    repeated = mllama_kernels.cross_attention(
        q, k.repeat_interleave(3, 3), v.repeat_interleave(3, 3), mask
    )
    torch.testing.assert_close(shared, repeated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5])
def test_batch_invariant_and_repeatable(device, dtype, rows):
    q, k, v, mask = make((3, rows, 2, 40, 4, 2, 64), dtype, device)
    out = mllama_kernels.cross_attention(q, k, v, mask)
    assert torch.equal(mllama_kernels.cross_attention(q, k, v, mask), out)
    assert torch.equal(mllama_kernels.cross_attention(q[2:], k[2:], v[2:], mask[2:]), out[2:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, several_blocks()])
def test_bits_do_not_depend_on_threads(device, dtype, rows):
    """They set how many rows a task has."""
    q, k, v, mask = make((1, rows, 3, 40, 4, 2, 64), dtype, device)
    assert_same_bits_on_any_threads(lambda: (mllama_kernels.cross_attention(q, k, v, mask),))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", grid([(2, 1, 64)], [(8, 1, 128), (3, 1, 80)]))
def test_decode_bits_do_not_depend_on_the_batch(device, dtype, head):
    """Alone, among 20 and among 40 sequences: the CUDA launches differ, the bits do not.

    1100 visible keys: more than one round of 64 strands of 16 keys.
    """
    heads, kv_heads, dim = head
    q, k, v, mask = make((40, 1, 3, 550, heads, kv_heads, dim), dtype, device)
    mask[:] = torch.tensor([False, True, False], device=device)
    mask[0] = torch.tensor([True, False, True], device=device)
    alone = mllama_kernels.cross_attention(q[:1], k[:1], v[:1], mask[:1])
    for batch in (20, 40):
        out = mllama_kernels.cross_attention(q[:batch], k[:batch], v[:batch], mask[:batch])
        assert torch.equal(out[:1], alone)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_over_many_tiles(device, dtype):
    """More tiles than a warp has lanes, a few of them visible, two absent."""
    tiles = 70
    q = randn(2, 4, 64, dtype=dtype, device=device)
    k, v = (randn(9, 5, 2, 64, dtype=dtype, device=device) for _ in range(2))
    table = torch.randint(0, 9, (2, tiles), device=device).int()
    table[:, [3, 40]] = -1
    mask = torch.rand(2, tiles, device=device) < 0.3
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    kwargs = {"tile_table": table, "cu_seqlens": bounds, "max_seqlen": 1}
    out = mllama_kernels.cross_attention(q, k, v, mask, **kwargs)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask, **kwargs)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize(
    "head", grid([(9, 9, 64)], [(36, 12, 128), (17, 17, 80), (32, 8, 128), (10, 5, 72)])
)
def test_decode_of_many_heads(device, dtype, tokens, head):
    """More key heads than a CPU task takes at once, tiles that end within and at the end of its splits."""
    heads, kv_heads, dim = head
    if dim % 16 and (device.type == "cuda" or library.simulated):
        pytest.skip("head_dim of the CPU kernels only")
    for keys in (131, 256):
        q, k, v, mask = make((2, tokens, 2, keys, heads, kv_heads, dim), dtype, device)
        out = mllama_kernels.cross_attention(q, k, v, mask)
        assert_no_worse(out, reference.cross_attention, q, k, v, mask)
        q = q[:, :1]
        one = mllama_kernels.cross_attention(q, k, v, mask[:, :1])
        assert_no_worse(one, reference.cross_attention, q, k, v, mask[:, :1])


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 512])
def test_checkpoint_shape(device, dtype, rows):
    q, k, v, mask = make((1, rows, 4, 1601, 32, 8, 128), dtype, device)
    weight = randn(128, dtype=dtype, device=device)
    out = mllama_kernels.cross_attention(q, k, v, mask, q_norm_weight=weight)
    assert_no_worse(out, reference.cross_attention, q, k, v, mask, q_norm_weight=weight)


def test_empty_and_torch_machinery(device):
    q, k, v, mask = make((1, 3, 2, 9, 2, 1, 64), torch.float32, device)
    assert mllama_kernels.cross_attention(q[:, :0], k, v, mask[:, :0]).shape == (1, 0, 2, 64)
    assert not mllama_kernels.cross_attention(q, k[:, :0], v[:, :0]).any()
    absent = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 3], dtype=torch.int32, device=device)
    for ops in (mllama_kernels, reference):  # a pool without tiles
        out = ops.cross_attention(
            q[0], k[0, :0], v[0, :0], tile_table=absent, cu_seqlens=bounds, max_seqlen=3
        )
        assert out.shape == (3, 2, 64) and not out.any()
    opcheck(
        "cross_attention",
        (
            q,
            k.contiguous(),
            v.contiguous(),
            mask,
            torch.ones(64, device=device),
            1e-5,
            0.1,
            None,
            None,
            3,
            False,
        ),
    )
    assert_compiles(mllama_kernels.cross_attention, q, k, v, mask)


def test_errors(device):
    q, k, v, mask = make((1, 3, 2, 9, 4, 2, 64), torch.float32, device)
    with pytest.raises(RuntimeError, match="softmax_scale must be positive"):
        mllama_kernels.cross_attention(q, k, v, softmax_scale=-1.0)
    with pytest.raises(
        RuntimeError, match=r"tile_mask must have shape \(1, 3, 2\), got \(1, 3, 1\)"
    ):
        mllama_kernels.cross_attention(q, k, v, mask[..., :1])
    with pytest.raises(RuntimeError, match=r"key/value heads \(2\) must divide .* \(3\)"):
        mllama_kernels.cross_attention(q[:, :, :3], k, v)
    with pytest.raises(RuntimeError, match="tile_table and cu_seqlens are given together"):
        table = torch.zeros(1, 2, dtype=torch.int32, device=device)
        mllama_kernels.cross_attention(q[0], k[0], v[0], tile_table=table)
    with pytest.raises(RuntimeError, match="tile_mask must be bool, got int64"):
        mllama_kernels.cross_attention(q, k, v, mask.long())
    if device.type == "cpu":
        table = torch.tensor([[0, 2]], dtype=torch.int32)
        bounds = torch.tensor([0, 3], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="tile_table holds slot 2; k has slots 0 to 1"):
            mllama_kernels.cross_attention(
                q[0], k[0], v[0], tile_table=table, cu_seqlens=bounds, max_seqlen=3
            )
