"""Attention from text to the tiles of one image, the norm of the queries included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import flex, sdpa, sdpa_backends, with_every_head
from benchmarks.shapes import HKV, HQ, TILE_TOKENS, TILES, D, sample_rows
from benchmarks.training import ATTENTION_FLOPS, by_heads, trained
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST


def make(setting: Setting, rows: int, visible: int) -> Arguments:
    """q, k, v, the first ``visible`` tiles of four, and the weight of the queries' norm."""
    q = setting.randn(1, rows, HQ, D)
    k, v = (setting.randn(1, TILES, TILE_TOKENS, HKV, D) for _ in range(2))
    mask = torch.zeros(1, rows, TILES, dtype=torch.bool, device=setting.device)
    mask[..., :visible] = True
    return q, k, v, mask, 1 + setting.randn(D, scale=0.1)


def call_ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return ours.cross_attention(q, k, v, mask, q_norm_weight=weight)


def truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    rows = sample_rows(q.shape[1]).to(q.device)
    return reference.cross_attention(q[:, rows], k, v, mask[:, rows], q_norm_weight=weight)


def select(rows: int, output: Tensor) -> tuple[Tensor, ...]:
    return (output[:, sample_rows(rows).to(output.device)],)


def normed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor) -> Tensor:
    return sdpa(reference.rms_norm(q, weight), k, v, attn_mask=mask)


def no_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Arguments:
    return q, k.flatten(1, 2), v.flatten(1, 2), None, weight


def dense_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Arguments:
    dense = mask.repeat_interleave(TILE_TOKENS, -1)[:, None]
    return q, k.flatten(1, 2), v.flatten(1, 2), dense, weight


def dense_mask_every_head(*args: Tensor) -> Arguments:
    q, k, v, mask, weight = dense_mask(*args)
    return q, *with_every_head(k, v, q.shape[2]), mask, weight


def additive_mask(*args: Tensor) -> Arguments:
    """The mask that `transformers` makes: the smallest number where a tile is hidden."""
    q, k, v, mask, weight = dense_mask(*args)
    additive = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    return q, k, v, additive.masked_fill_(~mask, torch.finfo(q.dtype).min), weight


def transformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """`transformers` with a mask: keys and values repeated for every head, then SDPA."""
    k, v = with_every_head(k, v, q.shape[2])
    return normed_sdpa(q, k, v, mask, weight)


def flex_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.rms_norm(q, weight), k.flatten(1, 2), v.flatten(1, 2)


def flex_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor):
    return lambda b, h, i, j: mask[b, i, j // TILE_TOKENS]


def peers(setting: Setting, rows: int, visible: int) -> list[Impl]:
    impls = [
        Impl(PLAIN, normed_sdpa, dense_mask),
        Impl("transformers", transformers_attention, additive_mask),
    ]
    if visible == TILES:
        impls += sdpa_backends(setting, normed_sdpa, no_mask, ", no mask", ("", "flash", "cudnn"))
    impls += sdpa_backends(setting, normed_sdpa, dense_mask, ", mask", ("cudnn", "efficient"))
    impls += sdpa_backends(
        setting, normed_sdpa, dense_mask_every_head, ", mask, every head", ("cudnn", "efficient")
    )
    small = "its kernel for one row has no block mask" if rows == 1 else None
    impls.append(flex(setting, flex_mask, (rows, TILES * TILE_TOKENS), flex_heads, D, small))
    return impls


def forward(setting: Setting, rows: int, visible: int) -> Case:
    keys = visible * TILE_TOKENS
    return Case(
        op="cross_attention",
        shape={"rows": rows, "keys": TILES * TILE_TOKENS, "visible tiles": visible},
        dtype=setting.dtype,
        make=partial(make, setting, rows, visible),
        truth=truth,
        select=partial(select, rows),
        impls=(Impl(OURS, call_ours), *peers(setting, rows, visible)),
        bytes=(2 * HKV * keys + 2 * HQ * rows) * D * setting.element,
        flops=4 * rows * HQ * keys * D,
        bound="read",
    )


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return reference.cross_attention(q, k, v, mask, q_norm_weight=weight)


def tiled(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """From the gradients by keys and values in one row to those by tiles."""
    q, k, v, weight = grads
    k, v = (t.unflatten(1, (TILES, TILE_TOKENS)) for t in (k, v))
    return q, k, v, weight


def forward_and_backward(setting: Setting, rows: int, visible: int) -> Case:
    """Backward reads q, k, v, the output and its gradient, and writes three gradients and the weight's."""
    case = forward(setting, rows, visible)
    alike = [
        Impl(PLAIN, normed_sdpa, dense_mask),
        *sdpa_backends(setting, normed_sdpa, dense_mask, ", mask", ("cudnn", "efficient")),
    ]
    if visible == TILES:
        alike += sdpa_backends(setting, normed_sdpa, no_mask, ", no mask", ("", "flash", "cudnn"))
    return trained(
        case,
        largest=ATTENTION_LARGEST,
        truth=by_heads(plain),
        impls=(case.impls[0], *(replace(impl, result=tiled) for impl in alike)),
        bytes=3 * case.bytes,
        flops=int(ATTENTION_FLOPS * case.flops),
    )


def cases(setting: Setting) -> Iterator[Case]:
    sizes = setting.sizes(
        [(1, 4), (512, 4), (2048, 4), (2048, 1)],
        [(1, 4), (64, 4), (64, 1)],
        [(1, 4), (64, 4), (2048, 4), (2048, 1)],
    )
    for rows, visible in sizes:
        yield forward(setting, rows, visible)
    for rows, visible in [size for size in sizes if size[0] in (64, 2048)]:
        yield forward_and_backward(setting, rows, visible)
