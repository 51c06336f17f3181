"""Causal self-attention with RoPE over whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled, sdpa, sdpa_backends, with_every_head
from benchmarks.shapes import HKV, HQ, D, angles, rotate, sample_rows, softmax
from benchmarks.training import ATTENTION_FLOPS, by_heads, trained
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST


def make(setting: Setting, length: int) -> Arguments:
    q = setting.randn(1, length, HQ, D)
    k, v = (setting.randn(1, length, HKV, D) for _ in range(2))
    cos, sin = angles(setting, 0, length)
    return q, k, v, cos[None], sin[None]


def truth(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The sampled rows in plain PyTorch: (1, rows, Hq, D)."""
    rows = sample_rows(q.shape[1]).to(q.device)
    q, k = rotate(q[:, rows], cos[0, rows], sin[0, rows]), rotate(k, cos[0], sin[0])
    k, v = with_every_head(k, v, q.shape[2])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[1], device=q.device) > rows.unsqueeze(-1)
    weights = softmax(scores.masked_fill(hidden, float("-inf")))
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def select(length: int, output: Tensor) -> tuple[Tensor, ...]:
    return (output[:, sample_rows(length).to(output.device)],)


def rotated_sdpa(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What an eager model does."""
    return sdpa(rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0]), v, is_causal=True)


def rotated_beforehand(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Arguments:
    return rotate(q, cos[0], sin[0]), rotate(k, cos[0], sin[0]), v


def every_head_beforehand(*args: Tensor) -> Arguments:
    q, k, v = rotated_beforehand(*args)
    return q, *with_every_head(k, v, q.shape[2])


def peers(setting: Setting) -> list[Impl]:
    """The whole work in plain PyTorch, then only the attention, on q and k that are rotated already."""
    causal = partial(sdpa, is_causal=True)
    return [
        Impl(PLAIN, rotated_sdpa),
        *sdpa_backends(setting, causal, rotated_beforehand, ", no RoPE", ("", "flash", "cudnn")),
        *sdpa_backends(
            setting, causal, every_head_beforehand, ", no RoPE, every head", ("cudnn", "efficient")
        ),
    ]


def causal_flops(length: int) -> int:
    """2 products of 2 operations each over the lower triangle."""
    return 4 * HQ * D * length * length // 2


def forward(setting: Setting, length: int) -> Case:
    return Case(
        op="rotary_attention",
        shape={"tokens": length},
        dtype=setting.dtype,
        make=partial(make, setting, length),
        truth=truth,
        select=partial(select, length),
        impls=(Impl(OURS, ours.rotary_attention), *peers(setting)),
        bytes=(2 * HQ + 2 * HKV + 1) * length * D * setting.element,
        flops=causal_flops(length),
    )


def turned_back(setting: Setting, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """From the gradients by q and k that were rotated beforehand to those by q and k."""
    q, k, v = grads
    cos, sin = angles(setting, 0, q.shape[1])
    return rotate(q, cos, -sin), rotate(k, cos, -sin), v


def peers_with_backward(setting: Setting) -> list[Impl]:
    attention_only = sdpa_backends(
        setting,
        partial(sdpa, is_causal=True),
        rotated_beforehand,
        ", no RoPE",
        ("", "flash", "cudnn"),
    )
    return [
        Impl(PLAIN, rotated_sdpa),
        compiled(rotated_sdpa),
        *(replace(impl, result=partial(turned_back, setting)) for impl in attention_only),
    ]


def forward_and_backward(setting: Setting, length: int) -> Case:
    """Backward reads q, k, v, the output and its gradient, and writes three gradients."""
    case = forward(setting, length)
    return trained(
        case,
        leaves=slice(3),
        largest=ATTENTION_LARGEST,
        truth=by_heads(reference.rotary_attention),
        impls=(case.impls[0], *peers_with_backward(setting)),
        bytes=case.bytes + (4 * HQ + 4 * HKV + 1) * length * D * setting.element,
        flops=int(ATTENTION_FLOPS * case.flops),
    )


def cases(setting: Setting) -> Iterator[Case]:
    for length in setting.sizes([512, 4096, 16384], [512], [4096, 512]):
        yield forward(setting, length)
    for length in setting.sizes([4096, 16384], [512], [4096, 512]):
        yield forward_and_backward(setting, length)
