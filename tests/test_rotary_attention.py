"""rotary_attention and rotary_attention_cached."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    FLOATS,
    assert_compiles,
    assert_no_worse,
    assert_same_bits_on_any_threads,
    compare,
    grid,
    opcheck,
    randn,
    several_blocks,
    simulated_share,
    to_double,
)

import mllama_kernels
from mllama_kernels import reference

# batch, length, query heads, key/value heads, head_dim
CASES = grid(
    [(1, 9, 4, 1, 64), (2, 67, 2, 1, 128), (1, 33, 2, 2, 80)],
    [(1, 1, 1, 1, 64), (2, 129, 8, 2, 128), (1, 200, 6, 2, 80), (1, 300, 8, 1, 64)],
)


def angles(positions, dim, dtype):
    frequency = 500000.0 ** (-torch.arange(0, dim, 2, device=positions.device) / dim)
    angle = positions[..., None].float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def make(case, dtype, device):
    batch, length, heads, kv_heads, dim = case
    qkv = randn(batch, length, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    cos, sin = angles(torch.arange(length, device=device)[None], dim, dtype)
    return q, k, v, cos, sin


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_matches_float64(device, dtype, case, interleaved):
    args = make(case, dtype, device)
    out = mllama_kernels.rotary_attention(*args, interleaved=interleaved)
    assert_no_worse(out, reference.rotary_attention, *args, interleaved=interleaved)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_shape(device, dtype):
    args = make((1, 2048, 32, 8, 128), dtype, device)
    assert_no_worse(mllama_kernels.rotary_attention(*args), reference.rotary_attention, *args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_equals_each_sequence_alone(device, dtype):
    lengths = grid([5, 0, 20], [130, 1])
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    total = int(bounds[-1])
    q, k, v, _, _ = (t[0] for t in make((1, total, 4, 2, 64), dtype, device))
    cos, sin = angles(torch.cat([torch.arange(n) for n in lengths]).to(device), 64, dtype)
    kwargs = {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
    out = mllama_kernels.rotary_attention(q, k, v, cos, sin, **kwargs)
    assert_no_worse(out, reference.rotary_attention, q, k, v, cos, sin, **kwargs)
    last = slice(int(bounds[-2]), total)
    alone = mllama_kernels.rotary_attention(*(t[last].unsqueeze(0) for t in (q, k, v, cos, sin)))
    assert torch.equal(out[last], alone[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_threads(device, dtype):
    """They set how many rows a task has."""
    args = make((1, several_blocks(), 4, 2, 64), dtype, device)
    assert_same_bits_on_any_threads(lambda: (mllama_kernels.rotary_attention(*args),))


class Paged:
    """A cache of shuffled pages filled with NaN, and a float64 copy for the reference."""

    def __init__(self, batch, capacity, kv_heads, dim, dtype, device, page_size=16):
        pages = -(-capacity // page_size)
        shape = (batch * pages + 2, kv_heads, page_size, dim)
        self.k, self.v = (
            torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)
        )
        order = torch.randperm(batch * pages, device=device) + 1
        self.table = order.view(batch, pages).int()
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)

    def clone(self, convert=lambda t: t):
        other = object.__new__(Paged)
        other.k, other.v = convert(self.k.clone()), convert(self.v.clone())
        other.table, other.lens = self.table, self.lens
        return other

    def run(self, ops, q, k, v, cos, sin, lengths, **kwargs):
        bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
        return ops.rotary_attention_cached(
            q, k, v, cos, sin, self.k, self.v, self.table, bounds, self.lens,
            max_seqlen=max(lengths), **kwargs,
        )  # fmt: skip


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", grid([(4, 2, 64), (2, 1, 128)], [(4, 1, 80), (8, 1, 128)]))
@pytest.mark.parametrize("interleaved", [False, True])
def test_cached_steps_match_float64(device, dtype, head, interleaved):
    """Prefill, a ragged chunk, then decode steps; the cache holds what the reference's holds."""
    heads, kv_heads, dim = head
    prompts = grid([[7, 0, 3]], [[70, 0, 129]])[-1]
    steps = [prompts, [1, 5, 2], *[[1, 1, 1]] * 6]
    decoded = []  # a single step has too few elements to judge its errors by
    cache = Paged(3, sum(max(s) for s in steps), kv_heads, dim, dtype, device)
    for lengths in steps:
        total = sum(lengths)
        q, k, v, _, _ = (t[0] for t in make((1, total, heads, kv_heads, dim), dtype, device))
        past = cache.lens.tolist()
        where = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths)]).to(device)
        args = (q, k, v, *angles(where, dim, dtype))
        double, plain = cache.clone(torch.Tensor.double), cache.clone()
        kwargs = {"interleaved": interleaved}
        exact = double.run(reference, *map(to_double, args), lengths, **kwargs)
        in_dtype = plain.run(reference, *args, lengths, **kwargs)
        out = cache.run(mllama_kernels, *args, lengths, **kwargs)
        if max(lengths) == 1:
            decoded.append((out, exact, in_dtype))
        else:
            compare(out, exact, in_dtype)
        assert torch.equal(cache.v.nan_to_num(7), plain.v.nan_to_num(7))
        written = cache.k.isfinite()
        assert torch.equal(written, plain.k.isfinite()), "rows outside the sequences were written"
        compare(cache.k[written], double.k[written], plain.k[written])
        cache.lens = cache.lens + torch.tensor(lengths, dtype=torch.int32, device=device)
    compare(*map(torch.cat, zip(*decoded)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("paged", [False, True])
def test_not_a_number_stays_in_its_sequence(device, dtype, paged):
    """What lies after a sequence's last key, here the next sequence or NaN, is never multiplied."""
    lengths, past = [21, 40, 130], 7
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v, _, _ = (t[0].clone() for t in make((1, sum(lengths), 4, 2, 64), dtype, device))
    where = torch.cat([torch.arange(n) for n in lengths]).to(device) + (past if paged else 0)
    cos, sin = angles(where, 64, dtype)

    def run():
        if not paged:
            kwargs = {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
            return mllama_kernels.rotary_attention(q, k, v, cos, sin, **kwargs)
        torch.manual_seed(1)  # the same pages again
        cache = Paged(3, 144, 2, 64, dtype, device, page_size=48)
        cache.lens += past
        cache.k[cache.table[:, 0].long(), :, :past] = 1
        cache.v[cache.table[:, 0].long(), :, :past] = 2
        return cache.run(mllama_kernels, q, k, v, cos, sin, lengths)

    clean = run()
    assert clean.isfinite().all()
    second = slice(int(bounds[1]), int(bounds[2]))
    k[second] = v[second] = float("nan")
    broken = run()
    assert broken[second].isnan().all()
    for other in (slice(0, int(bounds[1])), slice(int(bounds[2]), None)):
        assert torch.equal(broken[other], clean[other])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("page_size", grid([48, 128], [16, 80, 256]))
def test_long_sequences_in_pages_of_any_size(device, dtype, page_size):
    """Many key blocks, which pages do not align with, filled by two uneven chunks."""
    dim = 64
    cache = Paged(2, 700, 1, dim, dtype, device, page_size)
    for lengths in ([601, 37], [75, 6]):
        past = cache.lens.tolist()
        q, k, v, _, _ = (t[0] for t in make((1, sum(lengths), 2, 1, dim), dtype, device))
        where = torch.cat([torch.arange(p, p + n) for p, n in zip(past, lengths)]).to(device)
        args = (q, k, v, *angles(where, dim, dtype))
        exact = cache.clone(torch.Tensor.double).run(reference, *map(to_double, args), lengths)
        in_dtype = cache.clone().run(reference, *args, lengths)
        compare(cache.run(mllama_kernels, *args, lengths), exact, in_dtype)
        cache.lens = cache.lens + torch.tensor(lengths, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_is_batch_invariant_and_repeatable(device, dtype):
    past, dim = grid([50], [400])[-1], 64
    cache = Paged(3, past + 1, 2, dim, dtype, device)
    cache.k = randn(*cache.k.shape, dtype=dtype, device=device)
    cache.v = randn(*cache.v.shape, dtype=dtype, device=device)
    cache.lens = torch.tensor([past, 3, past // 2], dtype=torch.int32, device=device)
    q, k, v, _, _ = (t[0] for t in make((1, 3, 4, 2, dim), dtype, device))
    cos, sin = angles(cache.lens, dim, dtype)
    out = cache.clone().run(mllama_kernels, q, k, v, cos, sin, [1, 1, 1])
    assert torch.equal(cache.clone().run(mllama_kernels, q, k, v, cos, sin, [1, 1, 1]), out)
    alone = cache.clone()
    alone.table, alone.lens = cache.table[2:], cache.lens[2:]
    row = alone.run(mllama_kernels, q[2:], k[2:], v[2:], cos[2:], sin[2:], [1])
    assert torch.equal(row, out[2:])


# Cached keys before the new one: nothing, the edges of the 16 keys of a product, of a page, of the splits of
# both CUDA implementations (256 keys; 1024 keys to a round of 64 strands).
EDGES = [0, 1, 15, 16, 47, 48, 255, 256, 1023, 1024]


def filled(batch, capacity, kv_heads, dim, dtype, device, page_size=16):
    """A cache whose pages hold keys and values in every row."""
    cache = Paged(batch, capacity, kv_heads, dim, dtype, device, page_size)
    cache.k = randn(*cache.k.shape, dtype=dtype, device=device)
    cache.v = randn(*cache.v.shape, dtype=dtype, device=device)
    return cache


def decode_rows(cache, heads, kv_heads, dim, dtype, device):
    q, k, v, _, _ = (t[0] for t in make((1, len(cache.lens), heads, kv_heads, dim), dtype, device))
    return q, k, v, *angles(cache.lens, dim, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "case", grid([(EDGES, 16, 4, 1, 64)], [(EDGES, 48, 8, 1, 128), ([33000, 32767], 64, 2, 1, 64)])
)
def test_decode_at_the_edges_of_blocks_and_splits(device, dtype, case):
    """Ragged lengths, one row each; keys after a sequence's end are NaN and stay out."""
    pasts, page_size, heads, kv_heads, dim = case
    cache = filled(len(pasts), max(pasts) + 1, kv_heads, dim, dtype, device, page_size)
    cache.lens = torch.tensor(pasts, dtype=torch.int32, device=device)
    for b, past in enumerate(pasts):
        for slot, page in enumerate(cache.table[b].tolist()):
            cache.k[page, :, max(0, past - slot * page_size) :] = float("nan")
            cache.v[page, :, max(0, past - slot * page_size) :] = float("nan")
    args = decode_rows(cache, heads, kv_heads, dim, dtype, device)
    lengths = [1] * len(pasts)
    exact = cache.clone(torch.Tensor.double).run(reference, *map(to_double, args), lengths)
    plain = cache.clone()
    in_dtype = plain.run(reference, *args, lengths)
    out = cache.run(mllama_kernels, *args, lengths)
    compare(out, exact, in_dtype)
    assert torch.equal(cache.v.nan_to_num(7), plain.v.nan_to_num(7))
    assert torch.equal(cache.k.isfinite(), plain.k.isfinite())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", grid([(2, 1, 64)], [(8, 1, 128), (3, 1, 80)]))
def test_decode_bits_do_not_depend_on_the_batch(device, dtype, head):
    """Alone, among 20 and among 40 sequences of other lengths: the CUDA launches differ, the bits do not."""
    heads, kv_heads, dim = head
    cache = filled(40, 1100, kv_heads, dim, dtype, device)
    cache.lens = torch.randint(0, 40, (40,), dtype=torch.int32, device=device)
    cache.lens[0] = 1090
    args = decode_rows(cache, heads, kv_heads, dim, dtype, device)

    def first_row(batch):
        some = cache.clone()
        some.table, some.lens = cache.table[:batch], cache.lens[:batch]
        out = some.run(mllama_kernels, *(t[:batch] for t in args), [1] * batch)
        return out[0], some.k[cache.table[0]], some.v[cache.table[0]]

    alone = first_row(1)
    for batch in (20, 40):
        assert all(torch.equal(a, b) for a, b in zip(first_row(batch), alone))


def test_steps_equal_one_pass(device):
    """A prompt fed in three chunks and one token at a time gives what one dense call gives."""
    length, dim = 21, 64
    q, k, v, cos, sin = make((1, length, 4, 2, dim), torch.float32, device)
    whole = mllama_kernels.rotary_attention(q, k, v, cos, sin)[0]
    cache = Paged(1, length, 2, dim, torch.float32, device)
    outs = []
    for begin, end in [(0, 10), (10, 17), *((i, i + 1) for i in range(17, length))]:
        rows = slice(begin, end)
        outs.append(
            cache.run(mllama_kernels, *(t[0, rows] for t in (q, k, v, cos, sin)), [end - begin])
        )
        cache.lens = cache.lens + (end - begin)
    torch.testing.assert_close(torch.cat(outs), whole, rtol=1e-5, atol=1e-5)


def test_rotation_keeps_scores_relative(device):
    """Shifting every position by a constant changes nothing (float32 angles)."""
    q, k, v, _, _ = make((1, 12, 2, 1, 64), torch.float32, device)
    near = angles(torch.arange(12, device=device)[None], 64, torch.float32)
    far = angles(torch.arange(12, device=device)[None] + 100, 64, torch.float32)
    torch.testing.assert_close(
        mllama_kernels.rotary_attention(q, k, v, *far),
        mllama_kernels.rotary_attention(q, k, v, *near),
        rtol=1e-4,
        atol=1e-4,
    )


def test_causal(device):
    """A later token changes no earlier row."""
    q, k, v, cos, sin = (t.clone() for t in make((1, 70, 2, 1, 64), torch.float32, device))
    before = mllama_kernels.rotary_attention(q, k, v, cos, sin)
    k[:, 40:] *= 50
    v[:, 40:] = 1e30
    after = mllama_kernels.rotary_attention(q, k, v, cos, sin)
    assert torch.equal(after[:, :40], before[:, :40])
    assert not torch.isclose(after[:, 40:], before[:, 40:]).any()


def test_empty_and_torch_machinery(device):
    q, k, v, cos, sin = (t.contiguous() for t in make((1, 5, 2, 1, 64), torch.float32, device))
    assert mllama_kernels.rotary_attention(q[:0], k[:0], v[:0], cos, sin).shape == (0, 5, 2, 64)
    opcheck("rotary_attention", (q, k, v, cos, sin, 0.1, False, None, 5, False))
    assert_compiles(mllama_kernels.rotary_attention, q, k, v, cos, sin)
    cache = Paged(1, 5, 1, 64, torch.float32, device)
    bounds = torch.tensor([0, 5], dtype=torch.int32, device=device)
    tail = (cache.k.nan_to_num(), cache.v.nan_to_num(), cache.table, bounds, cache.lens)
    rows = (q[0], k[0], v[0], cos[0], sin[0])
    opcheck("rotary_attention_cached", (*rows, *tail, 5, 0.1, False))
    assert_compiles(mllama_kernels.rotary_attention_cached, *rows, *tail, max_seqlen=5)
    with pytest.raises(NotImplementedError, match="has no backward kernel"):
        wanted = (rows[0].clone().requires_grad_(), *rows[1:], *tail)
        mllama_kernels.rotary_attention_cached(*wanted, max_seqlen=5).sum().backward()


def test_errors(device):
    q, k, v, cos, sin = make((2, 5, 4, 2, 64), torch.float32, device)
    with pytest.raises(RuntimeError, match="softmax_scale must be positive"):
        mllama_kernels.rotary_attention(q, k, v, cos, sin, softmax_scale=float("nan"))
    with pytest.raises(RuntimeError, match=r"cos must have shape \(1, 5, 32\), got \(1, 5, 16\)"):
        mllama_kernels.rotary_attention(q, k, v, cos[..., :16], sin)
    with pytest.raises(RuntimeError, match=r"key/value heads \(2\) must divide .* \(3\)"):
        mllama_kernels.rotary_attention(q[:, :, :3], k, v, cos, sin)
    with pytest.raises(RuntimeError, match=r"q must be \(B, L, H, D\), got shape \(5, 4, 64\)"):
        mllama_kernels.rotary_attention(q[0], k[0], v[0], cos[0], sin[0])
    cache = Paged(1, 16, 2, 64, torch.float32, device)
    rows = (q[0], k[0], v[0], cos[0], sin[0])
    with pytest.raises(RuntimeError, match="page_table must be int32, got int64"):
        broken = cache.clone()
        broken.table = cache.table.long()
        broken.run(mllama_kernels, *rows, [5])
    if device.type == "cpu":
        cache.lens += 12
        with pytest.raises(
            RuntimeError, match="sequence 0 would hold 17 tokens; its pages hold 16"
        ):
            cache.run(mllama_kernels, *rows, [5])
        with pytest.raises(RuntimeError, match="cu_seqlens must run from 0 to 5, got 0 to 4"):
            cache.run(mllama_kernels, *rows, [4])
