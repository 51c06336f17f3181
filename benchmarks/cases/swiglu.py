"""SwiGLU on the fused gate and up projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled, from_package
from benchmarks.shapes import INTERMEDIATE
from benchmarks.training import trained
from mllama_kernels import reference


def make(setting: Setting, rows: int) -> Arguments:
    return (setting.randn(rows, 2 * INTERMEDIATE),)


def halves(gate_up: Tensor) -> Arguments:
    """Liger's layout: gate and up apart."""
    return tuple(t.contiguous() for t in gate_up.chunk(2, -1))


def joined(grads: Any) -> Any:
    """From the gradients of the halves to that of the whole; the forward's result as it is."""
    return (torch.cat(grads, -1),) if isinstance(grads, tuple) else grads


def liger(module: Any) -> Any:
    return module.LigerSiLUMulFunction.apply


def forward(setting: Setting, rows: int) -> tuple[Case, tuple[Impl, ...]]:
    """The forward, and the implementations that have a backward."""
    package = from_package(setting, "liger-kernel", "liger_kernel.ops.swiglu", liger, halves)
    impls = (
        Impl(OURS, ours.swiglu),
        Impl(PLAIN, reference.swiglu),
        compiled(reference.swiglu),
        replace(package, result=joined),
    )
    flashinfer = from_package(setting, "flashinfer", "flashinfer", lambda m: m.silu_and_mul)
    case = Case(
        op="swiglu",
        shape={"rows": rows, "dim": INTERMEDIATE},
        dtype=setting.dtype,
        make=partial(make, setting, rows),
        truth=reference.swiglu,
        impls=(*impls, flashinfer),
        bytes=3 * rows * INTERMEDIATE * setting.element,
    )
    return case, impls


def cases(setting: Setting) -> Iterator[Case]:
    sizes = setting.sizes([1, 512, 4096], [1, 512], [4096, 512])
    for rows in sizes:
        yield forward(setting, rows)[0]
    for rows in sizes[-1:]:  # backward: grad_out and gate_up read, grad_gate_up written
        case, impls = forward(setting, rows)
        backward = 5 * rows * INTERMEDIATE * setting.element
        yield trained(case, impls=impls, bytes=case.bytes + backward)
