"""`quantize` in plain PyTorch, for devices without the kernel: what csrc/quantize_math.h does, operation by
operation, so that a CPU gives the same bits. There a lane is a sub-block; here it is a column of
(size, lanes)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllama_kernels.encodings import ENCODINGS, joined

_LARGEST = {"q8_0": 127 * 65504.0, "q4_0": 8 * 65504.0, "q4_k": 2.0**21, "q6_k": 2.0**27}
_CHUNK = 1 << 22  # weights that are worked on at once
_COSTLY = 2.0**127


def parts(weight: Tensor, encoding: str, importance: Tensor | None) -> list[Tensor]:
    """The parts (`mllama_kernels.encodings.Encoding`) of a weight (N, K), whose rows are whole blocks.

    Raises: RuntimeError for a weight that is NaN, infinite or too large, with row and column.
    """
    rows, columns = weight.shape
    per_chunk = max(1, _CHUNK // max(1, columns))
    chunks = []
    for begin in range(0, max(rows, 1), per_chunk):
        x = weight[begin : begin + per_chunk].float()
        _check(x, begin, encoding)
        if encoding in ("int8", "fp8"):
            chunks.append(_scaled_rows(x, encoding))
        else:
            chunks.append([_blocks(x, encoding, importance)])
    return [joined(part) for part in zip(*chunks, strict=True)]


def _check(x: Tensor, first_row: int, encoding: str) -> None:
    largest = _LARGEST.get(encoding, torch.finfo(torch.float32).max)
    refused = ~(x.abs() <= largest)
    if not bool(refused.any()):
        return
    row, column = (int(i) for i in refused.nonzero()[0])
    raise RuntimeError(
        f"mllama_kernels.quantize: the weight in row {first_row + row}, column {column} is "
        f"{float(x[row, column]):g}; {encoding} holds finite magnitudes up to {largest:g}"
    )


def _divided(x: Tensor, by: float) -> Tensor:
    """x / by; torch multiplies by the inverse of a single number."""
    return x / torch.full_like(x, by)


def _scaled_rows(x: Tensor, encoding: str) -> list[Tensor]:
    bound = 127.0 if encoding == "int8" else 448.0
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = _divided(largest, bound)
    codes = torch.where(scale[:, None] == 0, 0.0, x / scale[:, None]).clamp(-bound, bound)
    if encoding == "int8":
        return [codes.round().to(torch.int8), scale]
    return [codes.to(torch.float8_e4m3fn), scale]


def _blocks(x: Tensor, encoding: str, importance: Tensor | None) -> Tensor:
    """(rows, bytes per row) uint8 of x (rows, K)."""
    chosen = ENCODINGS[encoding]
    rows, columns = x.shape
    width = columns // chosen.block * chosen.bytes_per_block
    if x.numel() == 0:
        return x.new_empty(rows, width, dtype=torch.uint8)
    blocks = x.reshape(-1, chosen.block)
    weights = None if importance is None else importance.expand(rows, -1).reshape(blocks.shape)
    if encoding == "q8_0":
        encoded = _q8_0(blocks)
    elif encoding == "q4_0":
        encoded = _q4_0(blocks, weights)
    else:
        encoded = (_q4_k if encoding == "q4_k" else _q6_k)(blocks, weights)
    return encoded.reshape(rows, width)


# ---- blocks of 32, as the gguf package makes them


def _inverse(d: Tensor) -> Tensor:
    inverse = 1 / d
    return torch.where((d != 0) & inverse.isfinite(), inverse, 0.0)


def _half_bytes(d: Tensor) -> Tensor:
    """(..., 2) uint8 of the values rounded to float16."""
    return d.half().unsqueeze(-1).view(torch.uint8)


def _q8_0(blocks: Tensor) -> Tensor:
    d = _divided(blocks.abs().amax(1, keepdim=True), 127.0)
    scaled = blocks * _inverse(d)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    whole = whole + (2 * (magnitude - whole)).floor()  # halves go away from zero
    codes = torch.where(scaled < 0, -whole, whole).to(torch.int8)
    return torch.cat([_half_bytes(d[:, 0]), codes.view(torch.uint8)], 1)


def _q4_0(blocks: Tensor, importance: Tensor | None) -> Tensor:
    if importance is not None:
        sub_blocks = _SubBlocks.of(blocks, importance, 32)
        d = _search_q4_0(sub_blocks)
        codes = (_codes(sub_blocks.x, _inverse_or_zero(d), -8, 7) + 8).T.to(torch.uint8)
    else:
        magnitude = blocks.abs()
        # The first of the largest magnitude: argmax promises no particular one.
        place = (
            (magnitude == magnitude.amax(1, keepdim=True)).to(torch.uint8).cumsum(1).eq(0).sum(1)
        )
        d = blocks.gather(1, place.unsqueeze(1))[:, 0] / -8
        codes = (blocks * _inverse(d).unsqueeze(1) + 8.5).trunc().clamp(max=15).to(torch.uint8)
    return torch.cat([_half_bytes(d), codes[:, :16] | codes[:, 16:] << 4], 1)


# ---- searches


def _inverse_or_zero(x: Tensor) -> Tensor:
    return torch.where(x != 0, 1 / x, 0.0)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _in_order(terms: Tensor) -> Tensor:
    """The sum over the first dimension, one after another."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _of_groups(lanes: Tensor, size: int) -> Tensor:
    """Each lane gets the sum over its group of `size` neighbours, added in order."""
    groups = lanes.view(-1, size)
    total = groups[:, 0]
    for i in range(1, size):
        total = total + groups[:, i]
    return total.repeat_interleave(size)


def _largest_of_groups(lanes: Tensor, size: int) -> Tensor:
    return lanes.view(-1, size).amax(1).repeat_interleave(size)


def _codes(scaled_from: Tensor, inverse: Tensor, low: int, high: int) -> Tensor:
    return (scaled_from * inverse).clamp(low, high).round()


@dataclass(frozen=True)
class _SubBlocks:
    """x and importance (size, lanes)."""

    x: Tensor
    importance: Tensor | None

    @classmethod
    def of(cls, blocks: Tensor, importance: Tensor | None, size: int) -> _SubBlocks:
        def lanes(values: Tensor) -> Tensor:
            return values.reshape(-1, size).T.contiguous()

        return cls(lanes(blocks), None if importance is None else lanes(importance))

    def weigh(self, values: Tensor) -> Tensor:
        return values if self.importance is None else self.importance * values

    def moments(self) -> tuple[Tensor, Tensor]:
        """The sums of 1 and x."""
        if self.importance is None:
            one = torch.full_like(self.x[0], float(len(self.x)))
        else:
            one = _in_order(self.importance)
        return one, _in_order(self.weigh(self.x))

    def sums(
        self, inverse: Tensor, offset: Tensor | None, low: int, high: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q, q^2 and x q over the codes round((x - offset) * inverse)."""
        q = _codes(self.x if offset is None else self.x - offset, inverse, low, high)
        weighted = self.weigh(q)
        return _in_order(weighted), _in_order(weighted * q), _in_order(weighted * self.x)

    def largest(self) -> Tensor:
        """Of each sub-block the weight of the largest magnitude, with its sign."""
        low, high = self.x.amin(0), self.x.amax(0)
        return torch.where(-low > high, low, high)


def _keep(better: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(better, n, o) for n, o in zip(new, old, strict=True))


def _fitted_line(
    one: Tensor, sum_x: Tensor, q: Tensor, qq: Tensor, xq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and cost of the line through given codes that costs least."""
    determinant = one * qq - q * q
    scale = (one * xq - sum_x * q) / determinant
    offset = (sum_x - scale * q) / one
    is_line = (determinant > 0) & (offset <= 0)
    scale = torch.where(is_line, scale, xq * _inverse_or_zero(qq))
    offset = torch.where(is_line, offset, 0.0)
    return scale, offset, 0 - (scale * xq + offset * sum_x)


def _free_line(b: _SubBlocks, one: Tensor, sum_x: Tensor) -> tuple[Tensor, Tensor]:
    lowest = b.x.amin(0).clamp(max=0)
    per_range = _inverse_or_zero(b.x.amax(0) - lowest)
    level = (sum_x / one).clamp(max=0)
    best: tuple[Tensor, ...] = (torch.zeros_like(one), level, 0 - level * sum_x)
    for trial in range(13 + 2):
        if trial < 13:
            inverse, offset = per_range * (13.0 + 0.25 * trial), lowest
        else:
            inverse, offset = _inverse_or_zero(best[0]), best[1]
        line = _fitted_line(one, sum_x, *b.sums(inverse, offset, 0, 15))
        best = _keep((line[2] < best[2]) & (line[0] >= 0), line, best)
    return best[0], best[1]


def _nearest_multiples(
    b: _SubBlocks, one: Tensor, sum_x: Tensor, d: Tensor, e: Tensor, line: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """c, m, cost, and the sums of the codes."""
    first_c = _codes(line[0], _inverse_or_zero(d), 0, 63)
    per_e = _inverse_or_zero(e)
    first_m = _codes(0 - line[1], per_e, 0, 63)
    per_one = per_e / one
    zero = torch.zeros_like(one)
    best: tuple[Tensor, ...] = (zero, zero, zero + _COSTLY, zero, zero, zero)
    for step in range(-2, 3):
        c = (first_c + step).clamp(0, 63)
        scale, m = d * c, first_m
        inverse = _inverse_or_zero(scale)
        for _ in range(2):
            q, qq, xq = b.sums(inverse, 0 - e * m, 0, 15)
            m = _codes(scale * q - sum_x, per_one, 0, 63)
            minimum = e * m
            cost = scale * (scale * qq - 2 * xq)
            cost = cost + minimum * (minimum * one + 2 * (sum_x - scale * q))
            best = _keep(cost < best[2], (c, m, cost, q, qq, xq), best)
    return best


def _search_q4_k(b: _SubBlocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d, e, c and m of each lane."""
    one, sum_x = b.moments()
    free = _free_line(b, one, sum_x)
    largest_scale, largest_minimum = (_largest_of_groups(v, 8) for v in (free[0], 0 - free[1]))
    zero = torch.zeros_like(one)
    best: tuple[Tensor, ...] = (zero, zero, zero, zero, zero + _COSTLY)
    for most in (63.0, 60.5):
        d, e, line = _divided(largest_scale, most), _divided(largest_minimum, most), free
        for _ in range(2):
            d, e = _half(d), _half(e)
            c, m, cost, q, qq, xq = _nearest_multiples(b, one, sum_x, d, e, line)
            cost = _of_groups(cost, 8)
            best = _keep(cost < best[4], (d, e, c, m, cost), best)
            line = (d * c, 0 - e * m)
            d, e = _refitted(d, e, c, m, (q, qq, xq), one, sum_x)
    return best[0], best[1], best[2], best[3]


def _refitted(
    d: Tensor,
    e: Tensor,
    c: Tensor,
    m: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    one: Tensor,
    sum_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """The d and e that suit codes and multiples best."""
    q, qq, xq = sums
    cc, cm, mm = _of_groups(c * c * qq, 8), _of_groups(c * m * q, 8), _of_groups(m * m * one, 8)
    cx, mx = _of_groups(c * xq, 8), _of_groups(m * sum_x, 8)
    determinant = cc * mm - cm * cm
    new_d = (cx * mm - mx * cm) / determinant
    new_e = (cx * cm - mx * cc) / determinant
    usable = (determinant > 0) & (new_d > 0) & (new_e >= 0)
    has_minimum = mm > 0
    only_d = cx * _inverse_or_zero(cc)
    return (
        torch.where(usable, new_d, torch.where(has_minimum, d, only_d)),
        torch.where(usable, new_e, torch.where(has_minimum, e, 0.0)),
    )


def _search_q6_k(b: _SubBlocks) -> tuple[Tensor, Tensor]:
    """d and c of each lane."""
    start = b.largest() / -32
    d = _divided(_largest_of_groups(start.abs(), 16), 122.0)
    zero = torch.zeros_like(d)
    best: tuple[Tensor, ...] = (zero, zero, zero + _COSTLY)
    for turn in range(3):
        d = _half(d)
        at = start * _inverse_or_zero(d)
        found: tuple[Tensor, ...] = (zero, zero, zero, zero)
        around = [at, at * (-32 / 31)] if turn == 0 else [at]
        reach = 10 if turn == 0 else 2
        for middle in around:
            for step in range(-reach, reach + 1):
                c = (middle + step).clamp(-128, 127).round()
                scale = d * c
                _, qq, xq = b.sums(_inverse_or_zero(scale), None, -32, 31)
                cost = scale * (scale * qq - 2 * xq)
                found = _keep(cost < found[1], (c, cost, qq, xq), found)
        c, cost, qq, xq = found
        cost = _of_groups(cost, 16)
        best = _keep(cost < best[2], (d, c, cost), best)
        if turn == 0:
            start = d * c
            d = _of_groups(c * xq, 16) * _inverse_or_zero(_of_groups(c * c * qq, 16))
        else:
            start = xq * _inverse_or_zero(qq)
            largest, smallest = _largest_of_groups(start, 16), _largest_of_groups(0 - start, 16)
            d = torch.where(largest > smallest, 0 - largest, smallest) / 128
    return best[0], best[1]


def _search_q4_0(b: _SubBlocks) -> Tensor:
    per_largest = _inverse_or_zero(b.largest())
    zero = torch.zeros_like(per_largest)
    best: tuple[Tensor, ...] = (zero, zero)
    for sign in (-1, 1):
        for trial in range(33):
            inverse = per_largest * (sign * (6.0 + 0.125 * trial))
            _, qq, xq = b.sums(inverse, None, -8, 7)
            d = _half(xq * _inverse_or_zero(qq))
            _, qq, xq = b.sums(_inverse_or_zero(d), None, -8, 7)
            cost = d * (d * qq - 2 * xq)
            best = _keep(cost < best[1], (d, cost), best)
    return best[0]


def _q4_k(blocks: Tensor, importance: Tensor | None) -> Tensor:
    b = _SubBlocks.of(blocks, importance, 32)
    d, e, c, m = _search_q4_k(b)
    codes = _codes(b.x + e * m, _inverse_or_zero(d * c), 0, 15).T.to(torch.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    c, m = (v.to(torch.uint8).view(-1, 8) for v in (c, m))
    scales = [
        c[:, :4] | c[:, 4:] >> 4 << 6,
        m[:, :4] | m[:, 4:] >> 4 << 6,
        c[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
    ]
    halves = [_half_bytes(d[::8]), _half_bytes(e[::8])]
    return torch.cat([*halves, *scales, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)


def _q6_k(blocks: Tensor, importance: Tensor | None) -> Tensor:
    b = _SubBlocks.of(blocks, importance, 16)
    d, c = _search_q6_k(b)
    codes = (_codes(b.x, _inverse_or_zero(d * c), -32, 31) + 32).T.to(torch.uint8)
    q = codes.reshape(-1, 2, 4, 32)  # block, half, group, element
    low = torch.stack([q[:, :, g] & 15 | (q[:, :, g + 2] & 15) << 4 for g in (0, 1)], 2)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    scales = c.to(torch.int8).view(torch.uint8).view(-1, 16)
    return torch.cat([low.flatten(1), high.flatten(1), scales, _half_bytes(d[::16])], 1)
