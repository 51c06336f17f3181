"""Matrix products with few rows, with the norm, SwiGLU and residual that stand around them in a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled
from benchmarks.shapes import EPS, HKV, HQ, INTERMEDIATE, VOCAB, D, E, sample_rows
from mllama_kernels import reference

CHECKED_COLUMNS = 512


@dataclass(frozen=True)
class Layer:
    """A projection of the decoder.

    Attributes:
        n, k: columns of its output, columns of its input.
        norm, swiglu, residual: what is fused with it.
    """

    name: str
    n: int
    k: int
    norm: bool = False
    swiglu: bool = False
    residual: bool = False

    @property
    def weight_rows(self) -> int:
        return 2 * self.n if self.swiglu else self.n


LAYERS = (
    Layer("qkv", (HQ + 2 * HKV) * D, E, norm=True),
    Layer("o", E, E, residual=True),
    Layer("gate_up", INTERMEDIATE, E, norm=True, swiglu=True),
    Layer("down", E, INTERMEDIATE, residual=True),
    Layer("lm_head", VOCAB, E, norm=True),
)


def make(setting: Setting, layer: Layer, rows: int) -> Arguments:
    """x, weight, and what the layer has of: weight of the norm, residual."""
    args = [
        setting.randn(rows, layer.k),
        setting.randn(layer.weight_rows, layer.k, scale=layer.k**-0.5),
    ]
    if layer.norm:
        args.append(1 + setting.randn(layer.k, scale=0.1))
    if layer.residual:
        args.append(setting.randn(rows, layer.n))
    return tuple(args)


def fused(layer: Layer, x: Tensor, weight: Tensor, extra: Tensor) -> Tensor:
    return ours.skinny_linear(
        x,
        weight,
        norm_weight=extra if layer.norm else None,
        residual=extra if layer.residual else None,
        eps=EPS,
        swiglu=layer.swiglu,
        weight_is_constant=True,
    )


def step_by_step(layer: Layer, x: Tensor, weight: Tensor, extra: Tensor) -> Tensor:
    """F.linear (cuBLAS or oneDNN) and the plain lines around it."""
    y = F.linear(reference.rms_norm(x, extra, EPS) if layer.norm else x, weight)
    y = reference.swiglu(y) if layer.swiglu else y
    return extra + y if layer.residual else y


def truth(layer: Layer, x: Tensor, weight: Tensor, extra: Tensor) -> Tensor:
    """Sampled columns of the output: a float64 copy of the head's weight would be 4 GB."""
    columns = sample_rows(layer.n, CHECKED_COLUMNS).to(x.device)
    if layer.swiglu:
        weight = weight.unflatten(0, (2, layer.n))[:, columns].flatten(0, 1)
    else:
        weight = weight[columns]
    return step_by_step(layer, x, weight, extra[:, columns] if layer.residual else extra)


def select(layer: Layer, output: Tensor) -> tuple[Tensor, ...]:
    return (output[:, sample_rows(layer.n, CHECKED_COLUMNS).to(output.device)],)


def cases(setting: Setting) -> Iterator[Case]:
    for layer in LAYERS:
        for rows in setting.sizes([1, 2, 8, 16], [1, 8], [1, 8] if setting.on_gpu else [1]):
            plain = partial(step_by_step, layer)
            # Inductor's search takes half a minute here.
            searched = [compiled(plain)] if rows == 1 and not setting.quick else []
            values = layer.weight_rows * layer.k + rows * (layer.k + layer.n)
            values += layer.k * layer.norm + rows * layer.n * layer.residual
            yield Case(
                op="skinny_linear",
                shape={"layer": layer.name, "rows": rows, "n": layer.n, "k": layer.k},
                dtype=setting.dtype,
                make=partial(make, setting, layer, rows),
                truth=partial(truth, layer),
                select=partial(select, layer),
                impls=(Impl(OURS, partial(fused, layer)), Impl(PLAIN, plain), *searched),
                bytes=values * setting.element,
                flops=2 * rows * layer.weight_rows * layer.k,
                bound="read",
            )
