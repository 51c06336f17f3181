"""RMSNorm."""

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


def liger(module: Any) -> Any:
    """Liger's RMSNorm with the roundings of Llama, not in place."""
    return lambda x, w: module.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


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


def sizes(setting: Setting) -> tuple[list[int], list[int]]:
    """Rows of the forward, and those of them that are trained."""
    rows = setting.sizes([1, 512, 4096, 16384], [1, 2048], [1, 2048, 4096])
    return rows, [n for n in rows if n >= 2048]


def cases(setting: Setting) -> Iterator[Case]:
    forward, backward = sizes(setting)
    for rows in forward:
        yield rms_norm(setting, rows)[0]
    for rows in backward:  # x and grad_y read, grad_x written; both weights
        case, impls = rms_norm(setting, rows)
        row_bytes = E * setting.element
        yield trained(case, impls=impls, bytes=case.bytes + (3 * rows + 2) * row_bytes)
