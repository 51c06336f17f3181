"""Matrix products with weights of 8, 6 and 4 bits, at the sizes of the decoder's layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from benchmarks import quantized_peers, random_codes
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.shapes import HKV, HQ, INTERMEDIATE, VOCAB, D, E, sample_rows
from mllama_kernels import QuantizedTensor
from mllama_kernels.encodings import ENCODINGS

CHECKED_COLUMNS = 512
UNQUANTISED = "mllama_kernels.linear, not quantised"
QUICK = ("q8_0", "q6_k", "q4_k", "int8", "int4")


@dataclass(frozen=True)
class Layer:
    """A weight of the decoder: n rows of k; ``on_cpu``: whether a CPU has the time for it."""

    model: str
    name: str
    n: int
    k: int
    on_cpu: bool = False


LAYERS = (
    Layer("11B", "gate_up", 2 * INTERMEDIATE, E, on_cpu=True),
    Layer("11B", "down", E, INTERMEDIATE, on_cpu=True),
    Layer("11B", "qkv", (HQ + 2 * HKV) * D, E),
    Layer("11B", "o", E, E),
    Layer("11B", "lm_head", VOCAB, E),
    Layer("90B", "gate_up", 57344, 8192),
    Layer("90B", "down", 8192, 28672, on_cpu=True),
)


def make(setting: Setting, encoding: str, layer: Layer, rows: int) -> Arguments:
    """x, the quantised weight, and the same weight decoded to the setting's dtype."""
    weight = random_codes.weight_of(encoding, layer.n, layer.k, setting.device)
    return setting.randn(rows, layer.k), weight, weight.dequantize(setting.dtype)


def product(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Tensor:
    return ours.quantized_linear(x, weight, weight_is_constant=True)


def plain(x: Tensor, _: QuantizedTensor, decoded: Tensor) -> Tensor:
    """F.linear (cuBLAS or oneDNN) of the weight in 16 or 32 bits."""
    return F.linear(x, decoded)


def unquantised(x: Tensor, _: QuantizedTensor, decoded: Tensor) -> Tensor:
    return ours.linear(x, decoded, weight_is_constant=True)


def truth(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Tensor:
    """Sampled columns of the product with the decoded weight."""
    columns = sample_rows(weight.shape[0], CHECKED_COLUMNS).to(x.device)
    return F.linear(x, weight.dequantize()[columns].to(x.dtype))


def select(output: Tensor) -> tuple[Tensor, ...]:
    columns = sample_rows(output.shape[1], CHECKED_COLUMNS).to(output.device)
    return (output[:, columns],)


def layers(setting: Setting) -> list[Layer]:
    """Those of the device: with --quick one, and of the 90B, which nobody has in float32, in 16 bits only."""
    if setting.quick:
        return [LAYERS[0]] if setting.on_gpu else [LAYERS[1]]
    found = [layer for layer in LAYERS if setting.on_gpu or layer.on_cpu]
    return [layer for layer in found if layer.model == "11B" or setting.dtype != torch.float32]


def cases(setting: Setting) -> Iterator[Case]:
    for layer in layers(setting):
        for encoding in QUICK if setting.quick else ENCODINGS:
            for rows in setting.sizes([1, 8, 16, 128, 512], [1, 8, 128], [1]):
                yield Case(
                    op="quantized_linear",
                    shape={
                        "model": layer.model,
                        "layer": layer.name,
                        "encoding": encoding,
                        "rows": rows,
                        "n": layer.n,
                        "k": layer.k,
                    },
                    dtype=setting.dtype,
                    make=partial(make, setting, encoding, layer, rows),
                    truth=truth,
                    select=select,
                    impls=(
                        Impl(OURS, product),
                        Impl(PLAIN, plain),
                        Impl(UNQUANTISED, unquantised),
                        *quantized_peers.of(setting, encoding),
                    ),
                    bytes=random_codes.nbytes(encoding, layer.n, layer.k)
                    + rows * (layer.n + layer.k) * setting.element,
                    flops=2 * rows * layer.n * layer.k,
                    bound="read",
                )
