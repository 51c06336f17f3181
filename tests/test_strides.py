"""Strides without a meaning, of one element or of none, change nothing; expanded tensors work."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import strided
from torch import Tensor

import mllama_kernels
from mllama_kernels import QuantizedTensor, _library

Call = tuple[tuple[Any, ...], dict[str, Any]]
DRAWS = 4 if _library.simulated else 24
HEAD_DIM = 64


def hostile(t: Tensor) -> Tensor:
    """The same values; the stride of every dimension of one element is drawn from what torch allows."""
    if t.dim() > 1 and t.is_floating_point() and random.random() < 0.3:
        t = strided(t.contiguous())  # of the others too, but rows stay contiguous
    else:
        t = t.contiguous()
    drawn = [0, 1, 3, 8, 264, 10**6 + 1]
    strides = [random.choice(drawn) if n == 1 else s for n, s in zip(t.shape, t.stride())]
    return t.as_strided(t.shape, strides, t.storage_offset())


def contiguous(t: Tensor) -> Tensor:
    """A copy whose strides are those of its shape, which contiguous() does not promise."""
    return t.new_empty(t.shape).copy_(t)


def few() -> int:
    return random.choice((1, 1, 2, 3))


def ragged(batch: int) -> tuple[Tensor, int, int]:
    lengths = [few() for _ in range(batch)]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return bounds, sum(lengths), max(lengths)


def rms_norm(randn: Callable[..., Tensor]) -> Call:
    width = random.choice((1, 8, 24))
    return (randn(few(), few(), width), randn(width)), {}


def add_rms_norm(randn: Callable[..., Tensor]) -> Call:
    shape = few(), few(), random.choice((1, 8, 24))
    options = {"gate": randn(1), "row_mask": torch.rand(shape[:2]) < 0.7}
    kwargs = random.choice(({}, options))
    return (randn(*shape), randn(*shape), randn(shape[-1])), kwargs


def gated_residual(randn: Callable[..., Tensor]) -> Call:
    shape = few(), few(), random.choice((1, 8, 24))
    return (randn(*shape), randn(*shape), randn(1), torch.rand(shape[:2]) < 0.7), {}


def swiglu(randn: Callable[..., Tensor]) -> Call:
    return (randn(few(), few(), random.choice((2, 16, 48))),), {}


def skinny_linear(randn: Callable[..., Tensor]) -> Call:
    rows, n, k = few(), random.choice((1, 5, 16)), random.choice((1, 24, 64))
    swiglu = random.random() < 0.5
    kwargs = {"residual": randn(rows, n), "norm_weight": randn(k), "gate": randn(1)}
    kwargs["row_mask"] = torch.rand(rows) < 0.7
    return (randn(rows, k), randn(2 * n if swiglu else n, k)), {**kwargs, "swiglu": swiglu}


def quantized_linear(randn: Callable[..., Tensor]) -> Call:
    (x, weight), kwargs = skinny_linear(randn)
    data = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    parts = {"data": data, "scale": torch.rand(len(data)) / 1000}
    return (x, QuantizedTensor.from_parts("int8", parts), randn(len(data))), kwargs


def quantized_rows(randn: Callable[..., Tensor]) -> Call:
    parts = {"blocks": torch.randint(0, 60, (5, 36), dtype=torch.uint8)}
    ids = torch.randint(0, 5, (few(), few()))
    return (ids, QuantizedTensor.from_parts("q4_0", parts), torch.float16), {}


def rotary_attention(randn: Callable[..., Tensor]) -> Call:
    heads, angles = few(), HEAD_DIM // 2
    group = random.choice((1, 2))
    if random.random() < 0.5:
        bounds, tokens, longest = ragged(few())
        q, k, v = (randn(tokens, h, HEAD_DIM) for h in (heads * group, heads, heads))
        table = tokens, angles
        kwargs = {"cu_seqlens": bounds, "max_seqlen": longest}
    else:
        batch, length = few(), few()
        q, k, v = (randn(batch, length, h, HEAD_DIM) for h in (heads * group, heads, heads))
        table = random.choice((1, batch)), length, angles
        kwargs = {}
    return (q, k, v, randn(*table), randn(*table)), kwargs


def rotary_attention_cached(randn: Callable[..., Tensor]) -> Call:
    heads, batch = few(), few()
    bounds, tokens, longest = ragged(batch)
    q, k, v = (randn(tokens, h, HEAD_DIM) for h in (heads * 2, heads, heads))
    caches = [randn(batch, heads, 16, HEAD_DIM) for _ in range(2)]
    pages = torch.randperm(batch, dtype=torch.int32)[:, None]
    past = torch.randint(0, 16 - longest, (batch,), dtype=torch.int32)
    tables = randn(tokens, HEAD_DIM // 2), randn(tokens, HEAD_DIM // 2)
    return (q, k, v, *tables, *caches, pages, bounds, past), {"max_seqlen": longest}


def cross_attention(randn: Callable[..., Tensor]) -> Call:
    heads, tiles, patches = few(), few(), random.choice((1, 5, 20))
    kwargs: dict[str, Any] = {"q_norm_weight": randn(HEAD_DIM)}
    if random.random() < 0.5:
        batch, slots = few(), few()
        bounds, tokens, longest = ragged(batch)
        q = randn(tokens, heads * 2, HEAD_DIM)
        k, v = (randn(slots, patches, heads, HEAD_DIM) for _ in range(2))
        table = torch.randint(-1, slots, (batch, tiles), dtype=torch.int32)
        kwargs |= {"tile_table": table, "cu_seqlens": bounds, "max_seqlen": longest}
        mask = torch.rand(tokens, tiles) < 0.7
    else:
        batch, rows = few(), few()
        q = randn(batch, rows, heads * 2, HEAD_DIM)
        k, v = (randn(batch, tiles, patches, heads, HEAD_DIM) for _ in range(2))
        mask = torch.rand(batch, rows, tiles) < 0.7
    return (q, k, v, mask), kwargs


def vision_attention(randn: Callable[..., Tensor]) -> Call:
    batch, length, heads = few(), few(), few()
    q, k, v = (randn(batch, length, heads, HEAD_DIM) for _ in range(3))
    return (q, k, v, torch.rand(batch, length) < 0.5), {}


def patch_embed(randn: Callable[..., Tensor]) -> Call:
    images, tiles, channels, ratios = few(), few(), few(), few()
    patch, grid, width = random.choice((1, 2)), random.choice((1, 2)), random.choice((1, 8))
    tokens = grid**2 + 1
    pixels = randn(images, tiles, channels, grid * patch, grid * patch)
    ids = torch.randint(0, ratios, (images,))
    tables = randn(ratios, tiles * tokens * width), randn(ratios, tiles * width)
    weights = randn(width, channels, patch, patch), randn(width), randn(tokens, width)
    return (pixels, ids, *weights, randn(1), *tables, randn(1), randn(width), randn(width)), {}


def linear_cross_entropy(randn: Callable[..., Tensor]) -> Call:
    rows, width, vocab = few(), random.choice((1, 8)), random.choice((1, 5, 24))
    labels = torch.randint(0, vocab, (rows,))
    return (randn(rows, width), randn(vocab, width), labels), {"reduction": "none"}


def sample(randn: Callable[..., Tensor]) -> Call:
    rows, vocab = few(), random.choice((1, 7, 40))
    seeds, steps = torch.randint(0, 99, (2, rows))
    kwargs = {
        "temperature": torch.rand(rows, dtype=torch.float64) + 0.5,
        "repetition_penalty": torch.full((rows,), 1.5, dtype=torch.float64),
        "seen": torch.rand(rows, vocab) < 0.5,
        "frequency_penalty": torch.rand(rows, dtype=torch.float64),
        "counts": torch.randint(0, 3, (rows, vocab), dtype=torch.int32),
        "bias_tokens": torch.arange(vocab)[:3].expand(rows, -1),
        "bias": torch.randn(rows, min(vocab, 3)),
        "allowed": torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32),
    }
    return (randn(rows, vocab), seeds, steps), kwargs


CALLS = {
    call.__name__: call
    for call in (
        *(rms_norm, add_rms_norm, gated_residual, swiglu, skinny_linear, rotary_attention),
        *(quantized_linear, quantized_rows),
        *(rotary_attention_cached, cross_attention, vision_attention, patch_embed),
        *(linear_cross_entropy, sample),
    )
}
FORWARD_ONLY = {
    *("skinny_linear", "quantized_linear", "quantized_rows"),
    *("rotary_attention_cached", "sample"),
}


def outcome(name: str, call: Call, layout: Callable[[Tensor], Tensor], device: Any) -> list[Tensor]:
    """Results, what was written in place, and gradients, all tensors brought into a layout first."""

    def prepare(value: Any) -> Any:
        if isinstance(value, QuantizedTensor):
            return value.to(device)
        if not isinstance(value, Tensor):
            return value
        value = layout(value.to(device)).detach()
        return value.requires_grad_(value.is_floating_point() and name not in FORWARD_ONLY)

    args = [prepare(a) for a in call[0]]
    kwargs = {key: prepare(a) for key, a in call[1].items()}
    if name == "rotary_attention":  # no gradient for the tables
        args[3:5] = [a.detach() for a in args[3:5]]
    if name == "rotary_attention_cached":
        args[5:7] = [contiguous(a) for a in args[5:7]]
    out = getattr(mllama_kernels, name)(*args, **kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    found = [o.detach() for o in outs]
    if name == "rotary_attention_cached":
        found += args[5:7]
    if name not in FORWARD_ONLY:
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
        torch.autograd.backward(outs, [layout(g) for g in grads])
        leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        found += [leaf.grad for leaf in leaves]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _library.OPS)
def test_strides_without_meaning(name, dtype, device):
    """Every argument, tables, masks and gradients of results included: the bits of contiguous copies."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    for _ in range(DRAWS):
        call = CALLS[name](randn)
        expected = outcome(name, call, contiguous, device)
        for a, e in zip(outcome(name, call, hostile, device), expected, strict=True):
            assert a.equal(e), [tuple(t.shape) for t in call[0] if isinstance(t, Tensor)]


@pytest.mark.parametrize("batch", [2, 64])
def test_one_tile_of_each_image(batch, device):
    """Keys whose dimension of tiles came in front: torch calls them contiguous whatever its stride."""
    q = torch.randn(batch, 3, 2, HEAD_DIM, device=device)
    k, v = (torch.randn(1, batch, 7, 1, HEAD_DIM, device=device).transpose(0, 1) for _ in range(2))
    assert k.is_contiguous() and k.stride(1) == batch * k.stride(0)
    expected = mllama_kernels.cross_attention(q, contiguous(k), contiguous(v))
    assert mllama_kernels.cross_attention(q, k, v).equal(expected)


@pytest.mark.parametrize("batch", [2, 5000])
def test_angles_of_one_token_each(batch, device):
    q, k, v = (torch.randn(batch, 1, 1, HEAD_DIM, device=device) for _ in range(3))
    cos, sin = (torch.randn(1, batch, HEAD_DIM // 2, device=device).transpose(0, 1) for _ in "ab")
    expected = mllama_kernels.rotary_attention(q, k, v, contiguous(cos), contiguous(sin))
    assert mllama_kernels.rotary_attention(q, k, v, cos, sin).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_cut_out_of_an_odd_row(dtype, device):
    """No stride of this query matters, and none is a multiple of 16 bytes."""
    row = torch.randn(2 * HEAD_DIM + 1, device=device).to(dtype)
    q = row.as_strided((1, 1, 2, HEAD_DIM), (2 * HEAD_DIM + 1, 2 * HEAD_DIM + 1, HEAD_DIM, 1))
    expected = mllama_kernels.vision_attention(*[contiguous(q)] * 3)
    assert mllama_kernels.vision_attention(q, q, q).equal(expected)


TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.02, "atol": 0.02},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_rows(axis, dtype, device):
    """A dimension of stride 0 in every operand of attention: values and gradients of contiguous copies."""
    whole = [2, 3, 2, HEAD_DIM]
    base = [1 if i == axis else n for i, n in enumerate(whole)]
    rows = [torch.randn(base).to(device, dtype).expand(whole) for _ in range(4)]
    tables = [torch.randn(1, 3, HEAD_DIM // 2).to(device, dtype) for _ in range(2)]
    tiles = [t.unsqueeze(1).expand(2, 2, *whole[1:]) for t in rows]
    grad = rows.pop()
    for name, expanded in (
        ("vision_attention", rows),
        ("rotary_attention", [*rows, *tables]),
        ("cross_attention", [rows[0], *tiles[1:3]]),
        ("cross_attention", [rows[0][:, :1], *tiles[1:3]]),
    ):
        found = []
        for layout in (lambda t: t, contiguous):
            leaves = [layout(t).detach().requires_grad_() for t in expanded[:3]]
            out = getattr(mllama_kernels, name)(*leaves, *expanded[3:])
            out.backward(layout(grad[:, : out.shape[1]]))
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
            with torch.no_grad():  # by another kernel, where no gradient is wanted
                found[-1].append(getattr(mllama_kernels, name)(*leaves, *expanded[3:]))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_weight(dtype, device):
    """All rows of the weight are one."""
    x, weight = (torch.randn(n, 128).to(device, dtype) for n in (3, 1))
    expected = mllama_kernels.skinny_linear(x, contiguous(weight.expand(24, -1)))
    actual = mllama_kernels.skinny_linear(x, weight.expand(24, -1))
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_rows_of_a_pool(dtype, device):
    """Packed rows, and tiles of a pool that are all the same one."""
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32, device=device)
    table = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32, device=device)
    q = torch.randn(4, 1, HEAD_DIM).to(device, dtype).expand(-1, 2, -1)
    k, v = (torch.randn(1, 20, 1, HEAD_DIM).to(device, dtype).expand(3, -1, -1, -1) for _ in "kv")
    kwargs = {"tile_table": table, "cu_seqlens": bounds, "max_seqlen": 3}
    expected = mllama_kernels.cross_attention(*map(contiguous, (q, k, v)), **kwargs)
    actual = mllama_kernels.cross_attention(q, k, v, **kwargs)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


EMPTY = {
    "middle": lambda: torch.empty(3, 0, 8),
    "batch": lambda: torch.empty(0, 4, 6, 8).transpose(1, 2),
    "rows": lambda: torch.empty(3, 5, 0, 8)[:, :4].transpose(1, 2),
    "width": lambda: torch.empty(3, 4, 6, 0).transpose(1, 2),
    "columns": lambda: torch.empty(8, 0, 3).transpose(0, 2),
}


@pytest.mark.parametrize("where", EMPTY)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "gated_residual", "swiglu"])
def test_rows_without_elements(name, where, device):
    """No stride of an empty tensor matters, though its dimensions may not be merged by them."""
    x = EMPTY[where]().to(device).requires_grad_()
    weight = torch.randn(x.shape[-1], device=device, requires_grad=True)
    gate = torch.randn(1, device=device, requires_grad=True)
    args = {
        "rms_norm": (x, weight),
        "add_rms_norm": (x, x, weight),
        "gated_residual": (x, x, gate),
        "swiglu": (x,),
    }[name]
    out = getattr(mllama_kernels, name)(*args)
    outs = out if isinstance(out, tuple) else (out,)
    expected = getattr(mllama_kernels.reference, name)(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert [o.shape for o in outs] == [e.shape for e in expected]
    torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
    assert x.grad.shape == x.shape
    for leaf in args[1:]:
        assert leaf.grad.eq(0).all()


def test_attention_without_elements(device):
    """No patch in any tile, and rows whose last dimension is not the innermost of nothing."""
    q = torch.randn(2, 3, 2, HEAD_DIM, device=device)
    k = torch.empty(2, 5, 0, 1, HEAD_DIM, device=device)[:, :3]
    assert mllama_kernels.cross_attention(q, k, k).eq(0).all()
    rows = torch.empty(2, HEAD_DIM, 0, 2, device=device).permute(0, 2, 3, 1)
    angles = torch.empty(2, 0, HEAD_DIM // 2, device=device)
    assert mllama_kernels.vision_attention(rows, rows, rows).shape == rows.shape
    assert mllama_kernels.rotary_attention(rows, rows, rows, angles, angles).shape == rows.shape
