"""Gradients of rotary_attention, and the log-sum-exp that they need."""

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
from test_rotary_attention import angles, make

import mllama_kernels
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST

# batch, length, query heads, key/value heads, head_dim
CASES = grid(
    [(1, 21, 4, 1, 64), (2, 67, 2, 2, 128), (1, 33, 8, 1, 80)],
    [(2, 129, 8, 2, 128), (1, 200, 6, 2, 80), (1, 300, 8, 1, 64)],
)


def fused(ops, heads, kv_heads, cos, sin, **kwargs):
    """Attention as a function of the fused projection, of which q, k and v are views."""

    def attention(qkv):
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-2)
        return ops.rotary_attention(q, k, v, cos.to(q.dtype), sin.to(q.dtype), **kwargs)

    return attention


def packed(lengths, dim, dtype, device, heads=4, kv_heads=2):
    """A fused projection of several sequences, and the other arguments of attention on it."""
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    where = torch.cat([torch.arange(n) for n in lengths]).to(device)
    qkv = randn(len(where), heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    kwargs = {"cu_seqlens": bounds, "max_seqlen": max(lengths)}
    return qkv, (heads, kv_heads, *angles(where, dim, dtype)), kwargs


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_match_float64(device, dtype, case, interleaved):
    batch, length, heads, kv_heads, dim = case
    qkv = randn(batch, length, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    args = (heads, kv_heads, *angles(torch.arange(length, device=device)[None], dim, dtype))
    kwargs = {"interleaved": interleaved, "softmax_scale": 0.11}
    assert_gradients_no_worse(
        fused(mllama_kernels, *args, **kwargs),
        fused(reference, *args, **kwargs),
        qkv,
        largest=ATTENTION_LARGEST,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_token(device, dtype):
    """Its weight is 1 whatever q and k are: their gradients are the rounding of what cancels."""
    q, k, v, cos, sin = make((2, 1, 4, 2, 64), dtype, device)
    grad = randn(*q.shape, dtype=dtype, device=device)
    attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
    grad_q, grad_k, grad_v = gradients(attention, (q, k, v), [grad])
    cancelled = (grad.float().abs() * v.float().abs().repeat_interleave(2, 2)).sum(-1).max()
    for actual, other in ((grad_q, k), (grad_k, 2 * q)):
        bound = (
            torch.finfo(torch.float32).eps * 8 * cancelled * other.float().abs().max() * 64**-0.5
        )
        assert actual.abs().max() <= 2 * bound
    expected = grad.float().unflatten(2, (2, 2)).sum(3)
    tolerance = max(torch.finfo(dtype).eps, 1e-5)  # the weight is exp(score - lse), both rounded
    torch.testing.assert_close(grad_v.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_shape(device, dtype):
    qkv = randn(1, 1024, 48, 128, dtype=dtype, device=device)
    args = (32, 8, *angles(torch.arange(1024, device=device)[None], 128, dtype))
    assert_gradients_no_worse(
        fused(mllama_kernels, *args), fused(reference, *args), qkv, largest=ATTENTION_LARGEST
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_packed_equals_each_sequence_alone(device, dtype):
    lengths = [5, 0, grid([40], [230])[-1], 1, 33]
    qkv, args, kwargs = packed(lengths, 64, dtype, device)
    ours, plain = fused(mllama_kernels, *args, **kwargs), fused(reference, *args, **kwargs)
    assert_gradients_no_worse(ours, plain, qkv, largest=ATTENTION_LARGEST)
    grad = randn(len(qkv), 4, 64, dtype=dtype, device=device)
    (together,) = gradients(ours, (qkv,), [grad])
    heads, kv_heads, cos, sin = args
    bounds = kwargs["cu_seqlens"].tolist()
    for begin, end in zip(bounds[:-1], bounds[1:]):
        own = fused(mllama_kernels, heads, kv_heads, cos[None, begin:end], sin[None, begin:end])
        (alone,) = gradients(own, (qkv[None, begin:end],), [grad[None, begin:end]])
        assert torch.equal(alone[0], together[begin:end])


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_the_batch(device, dtype):
    q, k, v, cos, sin = make((3, grid([40], [260])[-1], 4, 1, 64), dtype, device)
    grad = randn(*q.shape, dtype=dtype, device=device)

    def run(rows):
        attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
        return gradients(attention, (q[rows], k[rows], v[rows]), [grad[rows]])

    together = run(slice(None))
    assert all(a.equal(b) for a, b in zip(run(slice(None)), together))
    assert all(a.equal(b[1:2]) for a, b in zip(run(slice(1, 2)), together))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [(4, 1), (3, 3)])
def test_bits_do_not_depend_on_threads(device, dtype, heads):
    """Whole heads go to threads, or their keys and then their rows."""
    length = several_blocks()
    q, k, v, cos, sin = make((1, length, *heads, 64), dtype, device)
    grad = randn(*q.shape, dtype=dtype, device=device)
    attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
    assert_same_bits_on_any_threads(lambda: gradients(attention, (q, k, v), [grad]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sum_exp(device, dtype):
    q, k, v, cos, sin = make((2, grid([21], [140])[-1], 6, 2, 64), dtype, device)
    op = torch.ops.mllama_kernels.rotary_attention
    out, lse = op(q, k, v, cos, sin, 0.2, False, None, q.shape[1], True)
    assert out.equal(mllama_kernels.rotary_attention(q, k, v, cos, sin, softmax_scale=0.2))
    rotated_q, rotated_k = (reference.rotate(t, cos, sin).double().transpose(1, 2) for t in (q, k))
    scores = 0.2 * rotated_q @ rotated_k.repeat_interleave(3, 1).transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=device).triu(1)
    expected = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    torch.testing.assert_close(lse.double(), expected, rtol=2e-6, atol=2e-6)
    _, few_lse = op(q[:, :2], k[:, :2], v[:, :2], cos[:, :2], sin[:, :2], 0.2, False, None, 2, True)
    torch.testing.assert_close(few_lse.double(), expected[..., :2], rtol=2e-6, atol=2e-6)
    bounds = torch.tensor([0, 3, 3, q.shape[1]], device=device).int()
    rows = (q[0], k[0], v[0], cos[0], sin[0])
    _, lse = op(*rows, 0.2, False, bounds, q.shape[1], True)
    assert lse.shape == (6, q.shape[1])
    torch.testing.assert_close(lse[:, :3].double(), expected[0, :, :3], rtol=2e-6, atol=2e-6)
    assert op(*rows, 0.2, False, bounds, q.shape[1], False)[1].numel() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_a_number_stays_in_its_sequence(device, dtype):
    lengths = [21, 40, 130]
    qkv, args, kwargs = packed(lengths, 64, dtype, device)
    grad = randn(len(qkv), 4, 64, dtype=dtype, device=device)
    attention = fused(mllama_kernels, *args, **kwargs)
    (clean,) = gradients(attention, (qkv,), [grad])
    own = slice(21, 61)
    qkv[own] = grad[own] = float("nan")
    (broken,) = gradients(attention, (qkv,), [grad])
    assert broken[own].isnan().all() and clean.isfinite().all()
    assert torch.equal(broken[:21], clean[:21]) and torch.equal(broken[61:], clean[61:])


def test_later_tokens_get_nothing_from_earlier_rows(device):
    """The gradient of one row's output reaches the keys up to it, the others' are zero."""
    q, k, v, cos, sin = make((1, 300, 2, 1, 64), torch.float32, device)
    grad = torch.zeros_like(q)
    grad[:, 150] = 1
    attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
    grad_q, grad_k, grad_v = gradients(attention, (q, k, v), [grad])
    others = torch.arange(300, device=device) != 150
    assert grad_q[:, 150].all() and not grad_q[:, others].any()
    assert grad_v[:, :151].all() and not grad_v[:, 151:].any() and not grad_k[:, 151:].any()


def test_gradients_of_any_stride(device):
    q, k, v, cos, sin = make((2, 9, 4, 2, 64), torch.float32, device)
    attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
    grad = randn(2, 9, 4, 64, dtype=torch.float32, device=device)
    expected = gradients(attention, (q, k, v), [grad])
    for other in (
        grad.transpose(1, 2).contiguous().transpose(1, 2),
        grad.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        assert all(a.equal(b) for a, b in zip(gradients(attention, (q, k, v), [other]), expected))
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v).sum().backward()  # a gradient expanded from one number
    ones = gradients(attention, (q, k, v), [torch.ones_like(grad)])
    assert torch.equal(leaf.grad, ones[0])


def test_trains(device):
    q, k, v, cos, sin = (t.contiguous() for t in make((1, 5, 4, 2, 64), torch.float32, device))
    attention = partial(mllama_kernels.rotary_attention, cos=cos, sin=sin)
    assert_trains_compiled(attention, q, k, v)
    small = [t[..., :8].contiguous() for t in (q, k, v)]
    for interleaved in (False, True):
        tables = {"cos": cos[..., :4].double(), "sin": sin[..., :4].double()}
        attention = partial(mllama_kernels.rotary_attention, interleaved=interleaved, **tables)
        assert_gradcheck(attention, *small)
    empty = q[:0].clone().requires_grad_()
    mllama_kernels.rotary_attention(empty, k[:0], v[:0], cos, sin).sum().backward()
    assert empty.grad.shape == empty.shape
    out, lse = torch.ops.mllama_kernels.rotary_attention(
        q, k, v, cos, sin, 0.1, False, None, 5, True
    )
    opcheck("rotary_attention", (q.requires_grad_(), k, v, cos, sin, 0.1, False, None, 5, True))
    q = q.detach()
    opcheck("rotary_attention_backward", (out, q, k, v, cos, sin, out, lse, 0.1, False, None, 5))


def test_errors(device):
    q, k, v, cos, sin = make((1, 5, 4, 2, 64), torch.float32, device)
    with pytest.raises(NotImplementedError, match="rotary_attention has no gradient for sin"):
        mllama_kernels.rotary_attention(q, k, v, cos, sin.clone().requires_grad_())
    op = torch.ops.mllama_kernels.rotary_attention
    with pytest.raises(RuntimeError, match="a gradient needs with_lse=True"):
        op(q.clone().requires_grad_(), k, v, cos, sin, 0.1, False, None, 5, False)
    out, lse = op(q, k, v, cos, sin, 0.1, False, None, 5, True)

    def backward(grad=out, out=out, lse=lse):
        torch.ops.mllama_kernels.rotary_attention_backward(
            grad, q, k, v, cos, sin, out, lse, 0.1, False, None, 5
        )

    with pytest.raises(RuntimeError, match=r"lse must have shape \(1, 4, 5\), got \(1, 5, 4\)"):
        backward(lse=lse.transpose(1, 2))
    with pytest.raises(RuntimeError, match="lse must be float32, got float16"):
        backward(lse=lse.half())
    with pytest.raises(RuntimeError, match=r"grad_out must have shape .* got \(1, 4, 4, 64\)"):
        backward(grad=out[:, 1:])
    with pytest.raises(RuntimeError, match="out must have the dtype of q, float32, got float16"):
        backward(out=out.half())
