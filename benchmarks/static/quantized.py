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
from mllama_kernels.quantized_linear import MAX_ROWS

N, K = 2112, 1024
# Bytes that a gathered row of K columns reads beyond its own: of sectors with the scales of eight
# rows, with q6_k's high bits of two, and of those with the ids.
BESIDE_A_ROW = {"int8": 116, "fp8": 116, "q8_0": 504, "q6_k": 1136, "q4_k": 504, "nf4": 520}
PRODUCTS = ("int8", "fp8", "q8_0", "q6_k", "q4_k", "nf4")  # one per kernel
INTEGERS = ("int8", "q8_0", "q6_k", "q4_k")  # those with one for x in 8 bits


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
    for encoding, activations in [*((e, None) for e in PRODUCTS), *((e, "int8") for e in INTEGERS)]:
        weight = weight_of(encoding, N, K)
        for rows in (1, 16):
            x = rand(rows, K)
            yield Case(
                "quantized_linear",
                f"{encoding}, o*, {rows} x {K}" + (", x in 8 bits" if activations else ""),
                lambda x=x, weight=weight, activations=activations: ours.quantized_linear(
                    x, weight, activations=activations
                ),
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


def rounded(arch: int) -> Iterator[Case]:
    """x for the library's product, which is not counted, and a slab of the weight."""
    n, rows = 64, MAX_ROWS + 1
    weight, x = weight_of("q8_0", n, K), rand(rows, K)
    yield Case(
        "quantized_linear",
        f"q8_0, {n} x {K}, {rows} x {K}, x in 8 bits",
        lambda: ours.quantized_linear(x, weight, activations="int8"),
        floor=weight.nbytes + 2 * size(x) + n * K * 2,
    )


def rows_of(arch: int) -> Iterator[Case]:
    """Of a weight: those of an embedding, and a slab for the library's product."""
    n, k, count = 512, K, 64
    ids = torch.arange(count) * 8 % n + torch.arange(count) % 8
    for encoding in PRODUCTS:
        weight = weight_of(encoding, n, k)
        table = 64 if encoding == "nf4" else 0
        row_bytes = (weight.nbytes - table) // n
        yield Case(
            "quantized_rows",
            f"{encoding}, {count} of {n} x {k}",
            lambda weight=weight: ours.quantized_rows(ids, weight, torch.bfloat16),
            floor=count * (row_bytes + 2 * k) + size(ids) + table,
            again={"sectors that rows share, from L2": count * BESIDE_A_ROW[encoding]},
        )
        yield Case(
            "quantized_dequantize",
            f"{encoding}, {n} x {k}",
            lambda weight=weight: weight.dequantize(torch.bfloat16),
            floor=weight.nbytes + 2 * n * k,
        )


def quantizing(arch: int) -> Iterator[Case]:
    rows, k = 32, K
    weight, importance = rand(rows, k), torch.rand(k) + 0.5
    per_row = {"importance, per row, from L2": (rows - 1) * size(importance)}
    blocks = rows * k // 32
    for encoding, given, again in (
        ("q4_k", None, {}),
        ("q6_k", importance, per_row | {"sectors of two stores, in L2": blocks * 14}),
        ("q4_0", importance, per_row),
        ("q8_0", None, {"sectors of two stores, in L2": blocks * 62}),
        ("int8", None, {"the weight once more, from L2": size(weight)}),
    ):
        made = torch.ops.mllama_kernels.quantize_blocks(weight, encoding, given)
        yield Case(
            "quantize",
            f"{encoding}{', importance' if given is not None else ''}, {rows} x {k}",
            lambda encoding=encoding, given=given: torch.ops.mllama_kernels.quantize_blocks(
                weight, encoding, given
            ),
            floor=size(weight, *made) + (0 if given is None else size(given)),
            again=again,
        )


SOURCES = (products, rounded, rows_of, quantizing)
