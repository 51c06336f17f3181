"""The cases of quantised weights in the static table (cases.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.static.case import Case, rand, size
from benchmarks.static.compiler import MULTIPROCESSORS
from mllama_kernels import QuantizedTensor
from mllama_kernels.encodings import ENCODINGS, GGML

N, K = 2112, 1024
PRODUCTS = ("int8", "fp8", "q8_0", "q6_k", "q4_k", "nf4")  # one per kernel


def parts(encoding: str, n: int, k: int) -> dict[str, Tensor]:
    """Of random codes; what a kernel executes does not depend on them."""
    found = ENCODINGS[encoding]
    width = k // found.block * found.bytes_per_block
    data = torch.randint(0, 256, (n, width), dtype=torch.uint8)
    if encoding in GGML:
        return {"blocks": data}
    if encoding in ("int8", "fp8"):
        dtype = torch.int8 if encoding == "int8" else torch.float8_e4m3fn
        return {"data": (data & 63).view(dtype), "scale": torch.ones(n)}
    return {"data": data, "absmax": torch.ones(n, k // 64), "table": torch.linspace(-1, 1, 16)}


def weight_of(encoding: str, n: int, k: int) -> QuantizedTensor:
    return QuantizedTensor.from_parts(encoding, parts(encoding, n, k))


def products(arch: int) -> Iterator[Case]:
    blocks = MULTIPROCESSORS[arch].count
    norm_weight = rand(K)
    for encoding in PRODUCTS:
        weight = weight_of(encoding, N, K)
        for rows in (1, 16):
            x = rand(rows, K)
            yield Case(
                "quantized_linear",
                f"{encoding}, o*, {rows} x {K}",
                lambda x=x, weight=weight: ours.quantized_linear(x, weight),
                floor=weight.nbytes + size(x) + rows * N * 2,
                again={"x by every block, from L2": (blocks - 1) * size(x)},
                flops=2 * rows * N * K,
            )
    weight, x = weight_of("q4_k", N, K), rand(1, K)
    yield Case(
        "quantized_linear",
        f"q4_k, norm, gate and up*, SwiGLU, 1 x {K}",
        lambda: ours.quantized_linear(x, weight, norm_weight=norm_weight, swiglu=True),
        floor=weight.nbytes + size(x, norm_weight) + N // 2 * 2,
        again={
            "x twice and the norm's weight by every block, from L2": blocks
            * size(x, x, norm_weight)
            - size(x, norm_weight)
        },
        flops=2 * N * K,
    )


SOURCES = (products,)
