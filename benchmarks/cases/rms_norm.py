"""RMSNorm, alone and behind the residual add."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled, from_package
from benchmarks.shapes import EPS, E
from benchmarks.training import trained
from mllama_kernels import reference


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def add_then_fused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return fused(total, weight), total


def liger(module: Any) -> Any:
    """Liger's RMSNorm with the roundings of Llama, not in place."""
    return lambda x, w: module.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def liger_add(module: Any) -> Any:
    """Liger's fused add and RMSNorm, likewise."""
    return lambda x, residual, w: module.LigerFusedAddRMSNormFunction.apply(
        x, residual, w, EPS, 0.0, "llama", False
    )


def flashinfer_add(module: Any) -> Any:
    """flashinfer's fused op, which writes over both of its arguments."""

    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        module.fused_add_rmsnorm(x, residual, weight, EPS)
        return x, residual

    return call


def of_its_own(*args: Tensor) -> Arguments:
    return tuple(t.clone() for t in args)


def make(setting: Setting, rows: int, tensors: int) -> Arguments:
    inputs = (setting.randn(rows, E) for _ in range(tensors))
    return *inputs, 1 + setting.randn(E, scale=0.1)


def rms_norm(setting: Setting, rows: int) -> tuple[Case, tuple[Impl, ...]]:
    """The forward, and the implementations that have a backward."""
    impls = (
        Impl(OURS, ours.rms_norm),
        Impl(PLAIN, reference.rms_norm),
        Impl("F.rms_norm", fused),
        compiled(reference.rms_norm),
        from_package(setting, "liger-kernel", "liger_kernel.ops.rms_norm", liger),
    )
    flashinfer = from_package(
        setting, "flashinfer", "flashinfer", lambda m: partial(m.rmsnorm, eps=EPS)
    )
    case = Case(
        op="rms_norm",
        shape={"rows": rows, "dim": E},
        dtype=setting.dtype,
        make=partial(make, setting, rows, 1),
        truth=reference.rms_norm,
        impls=(*impls, flashinfer),
        bytes=(2 * rows + 1) * E * setting.element,
    )
    return case, impls


def add_rms_norm(setting: Setting, rows: int) -> tuple[Case, tuple[Impl, ...]]:
    """The forward, and the implementations that have a backward."""
    impls = (
        Impl(OURS, ours.add_rms_norm),
        Impl(PLAIN, reference.add_rms_norm),
        Impl("add, F.rms_norm", add_then_fused),
        compiled(reference.add_rms_norm),
        from_package(setting, "liger-kernel", "liger_kernel.ops.fused_add_rms_norm", liger_add),
    )
    flashinfer = from_package(setting, "flashinfer", "flashinfer", flashinfer_add, of_its_own)
    case = Case(
        op="add_rms_norm",
        shape={"rows": rows, "dim": E},
        dtype=setting.dtype,
        make=partial(make, setting, rows, 2),
        truth=reference.add_rms_norm,
        impls=(*impls, flashinfer),
        bytes=(4 * rows + 1) * E * setting.element,
    )
    return case, impls


def cases(setting: Setting) -> Iterator[Case]:
    sizes = setting.sizes([1, 512, 4096, 16384], [1, 2048], [1, 2048, 4096])
    trained_sizes = [rows for rows in sizes if rows >= 2048]
    for rows in sizes:
        yield rms_norm(setting, rows)[0]
    for rows in trained_sizes:  # backward: x and grad_y read, grad_x written; both weights
        case, impls = rms_norm(setting, rows)
        row_bytes = E * setting.element
        yield trained(case, impls=impls, bytes=case.bytes + (3 * rows + 2) * row_bytes)
    for rows in sizes:
        yield add_rms_norm(setting, rows)[0]
    for rows in trained_sizes:  # backward: the sum and both gradients read, theirs written
        case, impls = add_rms_norm(setting, rows)
        row_bytes = E * setting.element
        yield trained(case, impls=impls, outputs=2, bytes=case.bytes + (4 * rows + 2) * row_bytes)
