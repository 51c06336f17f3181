"""Tensors where no kernel expects them: at the edges of their memory, strided, expanded, misaligned.

Every tensor is alone in its storage, which ends with its last element: what reads beyond it leaves the
allocation, and a sanitizer sees that. Gaps between elements hold NaN, or what is no index.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz_calls import Call, Draw
from torch import Tensor

# Tensors whose elements belong together, or that are written: one element for each place.
_EXACT = {"cu_seqlens", "cache_lens", "page_table", "k_cache", "v_cache", "bias_tokens"}
_STRIDES = (0, 1, 2, 7, 64, 2**20, 2**40, 2**62)


def is_plain(value: Any) -> bool:
    """Whether a tensor lies in memory of the host that can be copied whole."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() < 10_000_000
    )


def place(t: Tensor, strides: list[int], offset: int) -> Tensor:
    """The values of t with these strides. Where elements share a place, one value stands for all."""
    reach = 0
    if t.numel():
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides) if n > 1)
    gap: Any = float("nan")
    if not (t.is_floating_point() or t.is_complex()):
        gap = t.dtype == torch.bool or torch.iinfo(t.dtype).max
    memory = torch.full((offset + reach,), gap, dtype=t.dtype)
    if t.numel():
        index = torch.zeros(t.shape, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(t.shape, strides)):
            if size > 1:
                place_of = torch.arange(size) * stride
                index += place_of.view(-1, *[1] * (t.dim() - dim - 1))
        memory[offset:][index.flatten()] = t.flatten()
    return memory.as_strided(t.shape, strides, offset)


def hostile(name: str, t: Tensor, draw: Draw) -> Tensor:
    """A view with the values of t (but for what expanding makes equal) in a layout drawn at random."""
    exact = name in _EXACT
    order = list(range(t.dim()))[::-1]  # innermost first
    kind = draw.random.random()
    if kind < 0.15:
        draw.random.shuffle(order)
    elif kind < 0.3 and t.dim() > 2:  # a transposition of the leading ones
        i = draw.random.randrange(1, t.dim() - 1)
        order[i], order[i + 1] = order[i + 1], order[i]
    gaps = draw.chance(0.4)
    strides, following = [0] * t.dim(), draw.one_of((1, 1, 1, 1, 1, 1, 2, 3))
    for dim in order:
        size = t.shape[dim]
        strides[dim] = following
        if size <= 1 and draw.chance(0.7):
            strides[dim] = draw.one_of(_STRIDES)
            continue
        if not exact and draw.chance(0.08):
            strides[dim] = 0
        elif not exact and draw.chance(0.04):  # elements overlap
            following = min(max(1, following * size // 2), _STRIDES[-1])
        else:
            following = min(following * size, _STRIDES[-1])
        if gaps and draw.chance(0.5):
            following += draw.one_of((1, 2, 3, 4, 8, 16))
    offset = draw.one_of((0, 0, 0, 0, 1, 2, 3, 4, 7, 8, 16))
    if t.is_floating_point() and not exact and draw.chance(0.03):
        return torch._neg_view(place(-t, strides, offset))
    return place(t, strides, offset)


def scatter(call: Call, draw: Draw) -> Call:
    """The call with every tensor in a layout of its own; many stay as they are."""
    share = draw.one_of((0.15, 0.5, 1.0))
    return {
        name: hostile(name, value, draw) if is_plain(value) and draw.chance(share) else value
        for name, value in call.items()
    }


def compact(value: Any) -> Any:
    """A contiguous copy of a tensor."""
    if not isinstance(value, Tensor):
        return value
    if (
        math.prod(max(size, 1) for size in value.shape) >= 2**63
    ):  # empty, and no strides hold its sizes
        return value.detach()
    return value.detach().clone(memory_format=torch.contiguous_format)


def describe(value: Any) -> str:
    """A value as one line of Python, tensors by size, strides and place."""
    if not isinstance(value, Tensor):
        return repr(value)
    kind = f"{tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if value.layout != torch.strided:
        return f"<{kind}, {value.layout}>"
    if value.device.type != "cpu":
        return f"<{kind}, {value.device}>"
    kind += f", strides {value.stride()}, offset {value.storage_offset()}"
    kind += ", negated" if value.is_neg() else ""
    if not value.dtype.is_floating_point and 0 < value.numel() <= 24:
        kind += f", {value.tolist()}"
    return f"<{kind}>"
