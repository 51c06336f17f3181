"""Blocks of ggml types that have no kernel here, decoded to float32.

Every function takes (n, bytes of a block) uint8 and gives (n, elements of a block) float32, with the products
and roundings of ggml's own decoders: the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The sixteen values of the non-linear 4-bit types.
_NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def q4_1(blocks: Tensor) -> Tensor:
    """d, m: float16; 16 bytes of nibbles. w = d q + m."""
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return d * _nibbles(blocks[:, 4:]) + m


def q5_0(blocks: Tensor) -> Tensor:
    """d: float16; 32 high bits; 16 bytes of nibbles. w = d (q - 16)."""
    return _float16(blocks, 0) * (_fives(blocks[:, 2:]) - 16)


def q5_1(blocks: Tensor) -> Tensor:
    """d, m: float16; 32 high bits; 16 bytes of nibbles. w = d q + m."""
    d, m = _float16(blocks, 0), _float16(blocks, 2)
    return d * _fives(blocks[:, 4:]) + m


def q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of nibble pairs (scale, minimum) per 16; 64 bytes of two bits; d, dmin: float16."""
    scales, d, dmin = blocks[:, :16], _float16(blocks, 80), _float16(blocks, 82)
    scale, minimum = d * (scales & 15).float(), dmin * (scales >> 4).float()
    q = _shifted(blocks[:, 16:80], 32, (0, 2, 4, 6)) & 3
    return (scale[..., None] * q.reshape(-1, 16, 16).float() - minimum[..., None]).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of high bits; 64 of two bits; 12 of 6-bit scales per 16; d: float16. No high bit: 4 less."""
    packed, d = blocks[:, 96:108], _float16(blocks, 108)
    low = _shifted(packed[:, :8], 8, (0, 4)).flatten(1) & 15
    high = _shifted(packed[:, 8:], 4, (0, 2, 4, 6)).flatten(1) & 3
    scale = d * ((low | high << 4).float() - 32)
    low = _shifted(blocks[:, 32:96], 32, (0, 2, 4, 6)).flatten(1) & 3
    high = _shifted(blocks[:, :32], 32, tuple(range(8))).flatten(1) & 1
    q = low.float() - 4 * (1 - high.float())
    return (scale[..., None] * q.reshape(-1, 16, 16)).flatten(1)


def q5_k(blocks: Tensor) -> Tensor:
    """d, dmin: float16; 12 bytes of 6-bit scales and minima per 32; 32 of high bits; 128 of nibbles."""
    d, dmin, packed = _float16(blocks, 0), _float16(blocks, 2), blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    low = _shifted(blocks[:, 48:], 32, (0, 4)).flatten(1) & 15
    high = _shifted(blocks[:, 16:48], 32, tuple(range(8))).flatten(1) & 1
    q = (low | high << 4).float().reshape(-1, 8, 32)
    return ((d * scale.float())[..., None] * q - (dmin * minimum.float())[..., None]).flatten(1)


def iq4_nl(blocks: Tensor) -> Tensor:
    """d: float16; 16 bytes of nibbles, each an index of the non-linear values."""
    return _float16(blocks, 0) * _non_linear(_nibbles(blocks[:, 2:]))


def iq4_xs(blocks: Tensor) -> Tensor:
    """d: float16; 16 bits and 4 bytes of 6-bit scales per 32; 128 bytes of nibbles, non-linear."""
    d = _float16(blocks, 0)
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    high = _shifted(blocks[:, 2:4], 1, (0, 2, 4, 6)).flatten(1) & 3
    scale = d * ((low | high << 4).float() - 32)
    q = _shifted(blocks[:, 8:], 16, (0, 4)).flatten(1) & 15
    return (scale[..., None] * _non_linear(q).reshape(-1, 8, 32)).flatten(1)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """(n, 1) float32 of the float16 that begins at a byte."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(data: Tensor, run: int, shifts: tuple[int, ...]) -> Tensor:
    """(n, m) bytes to (n, m / run, len(shifts), run): every run of bytes once for each shift."""
    steps = torch.tensor(shifts, dtype=torch.uint8)[:, None]
    return data.reshape(len(data), -1, 1, run) >> steps


def _nibbles(data: Tensor) -> Tensor:
    """(n, 16) bytes to (n, 32) float32: the low nibbles, then the high ones."""
    return (_shifted(data, 16, (0, 4)).flatten(1) & 15).float()


def _fives(data: Tensor) -> Tensor:
    """(n, 4 + 16) bytes to (n, 32) float32: a fifth bit for each element, then nibbles."""
    bits = _shifted(data[:, :4], 1, tuple(range(8))).flatten(1) & 1
    return _nibbles(data[:, 4:]) + 16 * bits.float()


def _non_linear(q: Tensor) -> Tensor:
    return torch.tensor(_NON_LINEAR, dtype=torch.float32)[q.long()]
