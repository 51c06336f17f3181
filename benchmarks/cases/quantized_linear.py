"""Matrix products with weights of 8, 6 and 4 bits, at the sizes of the decoder's layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.shapes import INTERMEDIATE, E, sample_rows
from mllama_kernels import QuantizedTensor
from mllama_kernels.encodings import ENCODINGS

CHECKED_COLUMNS = 512
MADE = ("int8", "fp8", "q8_0", "q6_k", "q4_k", "q4_0")
LAYERS = {"gate_up": (2 * INTERMEDIATE, E), "down": (E, INTERMEDIATE)}


def make(setting: Setting, encoding: str, n: int, k: int, rows: int) -> Arguments:
    """x, the quantised weight, and the weight in the setting's dtype."""
    weight = setting.randn(n, k, scale=k**-0.5)
    return setting.randn(rows, k), ours.quantize(weight, encoding), weight


def product(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Tensor:
    return ours.quantized_linear(x, weight, weight_is_constant=True)


def plain(x: Tensor, _: QuantizedTensor, decoded: Tensor) -> Tensor:
    """F.linear (cuBLAS or oneDNN) of the weight in 16 or 32 bits."""
    return F.linear(x, decoded)


def unquantised(x: Tensor, _: QuantizedTensor, decoded: Tensor) -> Tensor:
    return ours.linear(x, decoded)


def truth(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Tensor:
    """Sampled columns of the product with the decoded weight."""
    columns = sample_rows(weight.shape[0], CHECKED_COLUMNS).to(x.device)
    return F.linear(x, weight.dequantize()[columns].to(x.dtype))


def select(output: Tensor) -> tuple[Tensor, ...]:
    columns = sample_rows(output.shape[1], CHECKED_COLUMNS).to(output.device)
    return (output[:, columns],)


def cases(setting: Setting) -> Iterator[Case]:
    for name, (n, k) in LAYERS.items():
        for encoding in MADE:
            for rows in setting.sizes([1, 8, 16], [1, 8, 128], [1]):
                yield Case(
                    op="quantized_linear",
                    shape={"layer": name, "encoding": encoding, "rows": rows, "n": n, "k": k},
                    dtype=setting.dtype,
                    make=partial(make, setting, encoding, n, k, rows),
                    truth=truth,
                    select=select,
                    impls=(
                        Impl(OURS, product),
                        Impl(PLAIN, plain),
                        Impl("mllama_kernels.linear, not quantised", unquantised),
                    ),
                    bytes=ENCODINGS[encoding].nbytes(n, k) + rows * (n + k) * setting.element,
                    flops=2 * rows * n * k,
                    bound="read",
                )
