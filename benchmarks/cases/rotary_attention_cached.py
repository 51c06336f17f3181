"""Self-attention on the paged cache: a first prompt, and one new token after a context."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.cases import rotary_attention as prefill
from benchmarks.peers import sdpa, sdpa_backends
from benchmarks.shapes import HKV, HQ, PAGE, D, angles, rotate, softmax


def make(setting: Setting, batch: int, new: int, past: int) -> Arguments:
    """``new`` tokens of each of ``batch`` sequences after ``past`` cached ones, on shuffled pages."""
    pages = -(-(past + new) // PAGE)
    q = setting.randn(batch * new, HQ, D)
    k, v = (setting.randn(batch * new, HKV, D) for _ in range(2))
    cos, sin = (t.repeat(batch, 1) for t in angles(setting, past, new))
    k_cache, v_cache = (setting.randn(batch * pages, HKV, PAGE, D) for _ in range(2))
    table = torch.randperm(batch * pages).int().view(batch, pages).to(setting.device)
    bounds = torch.arange(batch + 1, device=setting.device, dtype=torch.int32) * new
    lengths = torch.full((batch,), past, device=setting.device, dtype=torch.int32)
    return q, k, v, cos, sin, k_cache, v_cache, table, bounds, lengths


def unpaged(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """(B, Hkv, length, D), the layout of a contiguous static cache."""
    return cache[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()


def static_cache(
    new: int, past: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor
) -> Arguments:
    """The same arguments as a model with a static cache has them; q, k, v (B, new, H, D)."""
    k_cache, v_cache, table = cache[:3]
    q, k, v = (t.unflatten(0, (-1, new)) for t in (q, k, v))
    position = torch.arange(past, past + new, device=q.device)
    length = past + new
    k_cache, v_cache = (unpaged(t, table, length) for t in (k_cache, v_cache))
    return q, k, v, cos[:new], sin[:new], k_cache, v_cache, position


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> Tensor:
    """Rotate, write the new token to the static cache, attend to all of it: (B * new, Hq, D)."""
    k_cache.index_copy_(2, position, rotate(k, cos, sin).transpose(1, 2))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    causal = q.shape[1] > 1  # a prompt fills the empty cache; a new token sees all of it
    return sdpa(rotate(q, cos, sin), keys, values, is_causal=causal).flatten(0, 1)


def attention_beforehand(new: int, past: int, *args: Tensor) -> Arguments:
    """For attention only: q rotated, and the cache with the new token in it."""
    q, k, v, cos, sin, k_cache, v_cache, position = static_cache(new, past, *args)
    append_and_attend(q, k, v, cos, sin, k_cache, v_cache, position)
    return rotate(q, cos, sin), k_cache.transpose(1, 2), v_cache.transpose(1, 2)


def decode_truth(past: int, *args: Tensor) -> Tensor:
    q, k, v, cos, sin, k_cache, v_cache, position = static_cache(1, past, *args)
    k_cache.index_copy_(2, position, rotate(k, cos, sin).transpose(1, 2))
    v_cache.index_copy_(2, position, v.transpose(1, 2))
    q = rotate(q, cos, sin)[:, 0].unflatten(1, (HKV, -1))
    scores = torch.einsum("bhgd,bhjd->bhgj", q, k_cache) * D**-0.5
    return torch.einsum("bhgj,bhjd->bhgd", softmax(scores), v_cache).flatten(1, 2)


def prefill_truth(*args: Tensor) -> Tensor:
    q, k, v, cos, sin = args[:5]
    return prefill.truth(q[None], k[None], v[None], cos[None], sin[None])[0]


def select_rows(length: int, output: Tensor) -> tuple[Tensor, ...]:
    return (prefill.select(length, output[None])[0][0],)


def flat_attention(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=causal).flatten(0, 1)


def peers(setting: Setting, new: int, past: int) -> list[Impl]:
    attention = partial(flat_attention, new > 1)
    prepare = partial(attention_beforehand, new, past)
    names = ("", "flash", "cudnn") if new > 1 else ("", "flash", "cudnn", "math")
    return [
        Impl(PLAIN, append_and_attend, partial(static_cache, new, past)),
        *sdpa_backends(setting, attention, prepare, ", no RoPE, no cache write", names),
    ]


def cases(setting: Setting) -> Iterator[Case]:
    for length in setting.sizes([4096, 8192, 16384], [512], [4096, 512]):
        yield Case(
            op="rotary_attention_cached",
            shape={"batch": 1, "new": length, "context": length},
            dtype=setting.dtype,
            make=partial(make, setting, 1, length, 0),
            truth=prefill_truth,
            select=partial(select_rows, length),
            impls=(
                Impl(OURS, partial(ours.rotary_attention_cached, max_seqlen=length)),
                *peers(setting, length, 0),
            ),
            # q, k, v and the angles in, the output and both caches out
            bytes=(2 * HQ + 4 * HKV + 1) * length * D * setting.element,
            flops=prefill.causal_flops(length),
        )
    decode = setting.sizes(
        [(1, 1024), (1, 8192), (1, 32768), (8, 4096), (32, 4096)],
        [(1, 1024), (1, 8192)],
        [(1, 1024), (32, 4096)],
    )
    for batch, context in decode:
        yield Case(
            op="rotary_attention_cached",
            shape={"batch": batch, "new": 1, "context": context},
            dtype=setting.dtype,
            make=partial(make, setting, batch, 1, context - 1),
            truth=partial(decode_truth, context - 1),
            impls=(
                Impl(OURS, partial(ours.rotary_attention_cached, max_seqlen=1)),
                *peers(setting, 1, context - 1),
            ),
            bytes=batch * (2 * HKV * context + 2 * HQ + 2 * HKV) * D * setting.element,
            flops=4 * batch * HQ * context * D,
            bound="read",
        )
