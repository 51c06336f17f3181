"""Quantised weights of random codes: made faster than a quantiser could, and of every encoding, also of those
that are only read."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mllama_kernels import QuantizedTensor
from mllama_kernels.encodings import ENCODINGS, GGML

GROUP = 128  # columns that share a scale of int4
# Where the float16 scales of a block lie, and by how much each is larger than the first.
_HALVES = {"q8_0": {0: 1}, "q6_k": {208: 1}, "q4_k": {0: 1, 2: 8}, "q4_0": {0: 1}}
# The 16 values of bitsandbytes' encodings, by their codes.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": _NF4, "fp4": _FP4}


def weight_of(encoding: str, n: int, k: int, device: torch.device) -> QuantizedTensor:
    """A weight (n, k) as the kernels read it, of about the size that leaves activations theirs."""
    scale = 2.0 ** round(math.log2(k**-0.5 / _deviation(encoding)))
    return QuantizedTensor.from_parts(encoding, parts_of(encoding, n, k, device, scale))


def parts_of(
    encoding: str, n: int, k: int, device: torch.device, scale: float = 1.0
) -> dict[str, Tensor]:
    """The parts of a weight (n, k), none of whose values is NaN.

    Its scales, ``scale`` to nearly twice that, have three significant bits: who stores them in bfloat16, or
    their products with zero points, has the very same weight.
    """
    found = ENCODINGS[encoding]
    data = _bytes(n, k // found.block * found.bytes_per_block, device)
    if encoding in GGML:
        blocks = data.view(n, -1, found.bytes_per_block)
        for offset, times in _HALVES[encoding].items():
            halves = _scales(n, blocks.shape[1], device, times * scale).half()
            blocks[..., offset : offset + 2] = halves.unsqueeze(-1).view(torch.uint8)
        return {"blocks": data}
    if encoding == "int8":
        return {"data": data.view(torch.int8), "scale": _scales(n, 1, device, scale).view(n)}
    if encoding == "fp8":
        data[data & 0x7F == 0x7F] = 0  # NaN
        values = data.view(torch.float8_e4m3fn)
        return {"data": values, "scale": _scales(n, 1, device, scale).view(n)}
    if encoding == "int4":
        zero = _bytes(n, k // GROUP, device) & 15
        return {
            "data": data,
            "scale": _scales(n, k // GROUP, device, scale).bfloat16(),
            "zero": zero,
        }
    table = torch.tensor(TABLES[encoding], device=device)
    return {"data": data, "absmax": _scales(n, k // 64, device, scale), "table": table}


@functools.cache
def _deviation(encoding: str) -> float:
    """The standard deviation of weights with scales of one to two."""
    with torch.random.fork_rng(devices=[]):
        parts = parts_of(encoding, 64, 1024, torch.device("cpu"))
        return QuantizedTensor.from_parts(encoding, parts).dequantize().std().item()


def nbytes(encoding: str, n: int, k: int) -> int:
    """Of the parts of a weight."""
    if encoding == "int4":
        return n * k // 2 + 3 * n * k // GROUP
    if encoding in TABLES:
        return n * k // 2 + 4 * n * k // 64 + 64
    return ENCODINGS[encoding].nbytes(n, k)


def _bytes(n: int, width: int, device: torch.device) -> Tensor:
    """uint8 (n, width): eight of one number, as many as there are."""
    words = -(-n * width // 8)
    numbers = torch.randint(-(2**63), 2**63 - 1, (words,), device=device)
    return numbers.view(torch.uint8)[: n * width].view(n, width)


def _scales(n: int, count: int, device: torch.device, smallest: float) -> Tensor:
    """float32 (n, count): one to seven quarters of the smallest."""
    return torch.randint(4, 8, (n, count), device=device) * (smallest / 4)
