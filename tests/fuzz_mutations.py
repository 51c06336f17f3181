"""Arguments no caller should pass: wrong sizes, dtypes, devices and numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from fuzz_calls import Call, Draw
from torch import Tensor

INTEGERS = (-1, 0, 1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 5e-324, 1e-45, 1e39, 1e308, -0.0)
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64),
)
OBJECTS = (None, "x", 1.5, 3, True, [], [1.0], {}, object(), b"\0", float)
# Of a dimension; the largest are sizes of tensors without memory: expanded, or with a zero elsewhere.
_SIZES = (0, 1, 2, 3, 5, 8, 16, 17, 64)
_HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
_MOST_CONVERTED = 2**20  # elements


def mutate(call: Call, draw: Draw) -> Call:
    """The call with one to three of its arguments changed."""
    call = dict(call)
    for _ in range(draw.one_of((1, 1, 1, 2, 3))):
        name = draw.one_of(list(call))
        with contextlib.suppress(Exception):  # a change that torch itself does not make
            call[name] = _changed(call[name], draw)
    return call


def _changed(value: Any, draw: Draw) -> Any:
    if draw.chance(0.04):
        return draw.one_of(OBJECTS)
    if isinstance(value, Tensor):
        return _tensor(value, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.one_of((*INTEGERS, value - 1, value + 1))
    if isinstance(value, float):
        return draw.one_of(FLOATS)
    if isinstance(value, list):
        return value[: draw.random.randint(0, len(value))] * draw.one_of((1, 2))
    sizes = [draw.one_of(_SIZES) for _ in range(draw.random.randint(0, 4))]
    return draw.floats(*sizes) if draw.chance(0.6) else draw.bools(*sizes)


def _tensor(t: Tensor, draw: Draw) -> Tensor:
    if not t.dtype.is_floating_point and t.dtype != torch.bool and draw.chance(0.6):
        return _table(t, draw)
    return draw.one_of((_size, _size, _size, _rank, _dtype, _kind, _huge, _values))(t, draw)


def _table(t: Tensor, draw: Draw) -> Tensor:
    """Hostile numbers in place of some."""
    limits = torch.iinfo(t.dtype)
    known = t.flatten().tolist() or [0]
    t = t.clone()
    flat = t.view(-1) if t.is_contiguous() else t.flatten()
    for _ in range(min(flat.numel(), draw.one_of((1, 1, 2, 5)))):
        near = draw.one_of(known) + draw.one_of((-1, 1, 16))
        number = draw.one_of((*INTEGERS, near, near, draw.one_of(known)))
        flat[draw.random.randrange(flat.numel())] = min(max(number, limits.min), limits.max)
    return flat.view(t.shape)


def _size(t: Tensor, draw: Draw) -> Tensor:
    """One dimension longer or shorter."""
    if t.dim() == 0:
        return t.expand(draw.one_of(_SIZES))
    sizes = list(t.shape)
    dim = draw.random.randrange(t.dim())
    sizes[dim] = max(0, draw.one_of((*_SIZES, sizes[dim] - 1, sizes[dim] + 1, sizes[dim] * 2)))
    return _values_in(t, sizes)


def _values_in(t: Tensor, sizes: list[int]) -> Tensor:
    """The elements of t, again and again, in another shape of a size that fits into memory."""
    while torch.Size(sizes).numel() > 4_000_000:
        sizes[sizes.index(max(sizes))] //= 2
    count = torch.Size(sizes).numel()
    flat = t.flatten()
    if flat.numel() == 0:
        return t.new_ones(sizes)
    return flat[torch.arange(count) % flat.numel()].view(sizes)


def _rank(t: Tensor, draw: Draw) -> Tensor:
    """A dimension more or fewer."""
    if t.dim() == 0 or draw.chance(0.4):
        return t.unsqueeze(draw.random.randint(0, t.dim()))
    if draw.chance(0.3) and t.dim() > 1:
        return t.transpose(*draw.random.sample(range(t.dim()), 2))
    if draw.chance(0.3):
        return t.flatten()
    if t.shape[0] == 0 or draw.chance(0.2):
        return t.new_zeros(())
    return t.select(0, 0)


def _dtype(t: Tensor, draw: Draw) -> Tensor:
    return t.to(draw.one_of(DTYPES))


def _kind(t: Tensor, draw: Draw) -> Tensor:
    """Not an ordinary tensor of the CPU."""
    kind = draw.one_of(("meta", "meta", "sparse", "mkldnn", "csr"))
    if t.numel() > _MOST_CONVERTED:  # of one that is huge already
        return t.to("meta")
    if kind == "sparse":
        return t.to_sparse() if t.dim() else t.to("meta")
    if kind == "csr" and t.dim() == 2 and t.dtype in (torch.float32, torch.float64):
        return t.to_sparse_csr()
    if kind == "mkldnn" and t.dtype == torch.float32 and t.numel() and t.dim():
        return t.contiguous().to_mkldnn()
    return t.to("meta")


def _huge(t: Tensor, draw: Draw) -> Tensor:
    """Sizes near the largest integers, of elements that share one place or are not there."""
    size = draw.one_of(_HUGE)
    if t.dim() == 0:
        t = t.unsqueeze(0)
    sizes, dim = list(t.shape), draw.random.randrange(t.dim())
    if draw.chance(0.5) and t.dim() > 1:
        other = draw.one_of([i for i in range(t.dim()) if i != dim])
        sizes = [1] * t.dim()
        sizes[dim], sizes[other] = size, 0
        return t.new_empty(0).as_strided(sizes, [0] * t.dim())
    if t.shape[dim] == 0:
        return t
    rest = max(1, t.numel() // t.shape[dim])
    sizes[dim] = min(size, (2**63 - 1) // rest)
    return t.narrow(dim, 0, 1).expand(sizes)


def _values(t: Tensor, draw: Draw) -> Tensor:
    """Numbers that are none."""
    t = t.clone()
    flat = t.view(-1) if t.is_contiguous() else t.flatten()
    numbers = FLOATS if t.dtype.is_floating_point else (0, 1)
    for _ in range(min(flat.numel(), draw.one_of((1, 3, 20)))):
        number = draw.one_of(numbers)
        flat[draw.random.randrange(flat.numel())] = torch.tensor(number, dtype=torch.float64).to(
            t.dtype
        )
    return flat.view(t.shape)
