"""SwiGLU on the fused gate and up projections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled, from_package
from benchmarks.shapes import INTERMEDIATE
from mllama_kernels import reference


def make(setting: Setting, rows: int) -> Arguments:
    return (setting.randn(rows, 2 * INTERMEDIATE),)


def halves(gate_up: Tensor) -> Arguments:
    """Liger's layout: gate and up apart."""
    return tuple(t.contiguous() for t in gate_up.chunk(2, -1))


def liger(module: Any) -> Any:
    return module.LigerSiLUMulFunction.apply


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.sizes([1, 512, 4096], [1, 512], [4096, 512]):
        yield Case(
            op="swiglu",
            shape={"rows": rows, "dim": INTERMEDIATE},
            dtype=setting.dtype,
            make=partial(make, setting, rows),
            truth=reference.swiglu,
            impls=(
                Impl(OURS, ours.swiglu),
                Impl(PLAIN, reference.swiglu),
                compiled(reference.swiglu),
                from_package(setting, "liger-kernel", "liger_kernel.ops.swiglu", liger, halves),
                from_package(setting, "flashinfer", "flashinfer", lambda m: m.silu_and_mul),
            ),
            bytes=3 * rows * INTERMEDIATE * setting.element,
        )
