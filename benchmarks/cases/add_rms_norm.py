"""RMSNorm after the residual add."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.cases.rms_norm import fused, make, sizes
from benchmarks.peers import compiled, from_package
from benchmarks.shapes import EPS, E
from benchmarks.training import trained
from mllama_kernels import reference


def add_then_fused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return fused(total, weight), total


def liger(module: Any) -> Any:
    """Liger's fused add and RMSNorm with the roundings of Llama, not in place."""
    return lambda x, residual, w: module.LigerFusedAddRMSNormFunction.apply(
        x, residual, w, EPS, 0.0, "llama", False
    )


def flashinfer(module: Any) -> Any:
    """flashinfer's fused op, which writes over both of its arguments."""

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        module.fused_add_rmsnorm(x, residual, weight, EPS)
        return x, residual

    return call


def cloned(*args: Tensor) -> Arguments:
    return tuple(t.clone() for t in args)


def add_rms_norm(setting: Setting, rows: int) -> tuple[Case, tuple[Impl, ...]]:
    """The forward, and the implementations that have a backward."""
    impls = (
        Impl(OURS, ours.add_rms_norm),
        Impl(PLAIN, reference.add_rms_norm),
        Impl("add, F.rms_norm", add_then_fused),
        compiled(reference.add_rms_norm),
        from_package(setting, "liger-kernel", "liger_kernel.ops.fused_add_rms_norm", liger),
    )
    in_place = from_package(setting, "flashinfer", "flashinfer", flashinfer, cloned)
    case = Case(
        op="add_rms_norm",
        shape={"rows": rows, "dim": E},
        dtype=setting.dtype,
        make=partial(make, setting, rows, 2),
        truth=reference.add_rms_norm,
        impls=(*impls, in_place),
        bytes=(4 * rows + 1) * E * setting.element,
    )
    return case, impls


def cases(setting: Setting) -> Iterator[Case]:
    forward, backward = sizes(setting)
    for rows in forward:
        yield add_rms_norm(setting, rows)[0]
    for rows in backward:  # the sum and both gradients read, theirs written
        case, impls = add_rms_norm(setting, rows)
        row_bytes = E * setting.element
        yield trained(case, impls=impls, outputs=2, bytes=case.bytes + (4 * rows + 2) * row_bytes)
