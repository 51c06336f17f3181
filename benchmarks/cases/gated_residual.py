"""The residual add through a tanh gate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled
from benchmarks.shapes import E
from benchmarks.training import trained
from mllama_kernels import reference


def make(setting: Setting, rows: int) -> Arguments:
    return setting.randn(rows, E), setting.randn(rows, E), setting.randn(1)


def forward(setting: Setting, rows: int) -> Case:
    return Case(
        op="gated_residual",
        shape={"rows": rows, "dim": E},
        dtype=setting.dtype,
        make=partial(make, setting, rows),
        truth=reference.gated_residual,
        impls=(
            Impl(OURS, ours.gated_residual),
            Impl(PLAIN, reference.gated_residual),
            compiled(reference.gated_residual),
        ),
        bytes=3 * rows * E * setting.element,
    )


def cases(setting: Setting) -> Iterator[Case]:
    sizes = setting.sizes([1, 512, 4096], [2048], [4096, 2048])
    for rows in sizes:
        yield forward(setting, rows)
    for rows in sizes[-1:]:  # backward: grad_out and x read, grad_x written
        case = forward(setting, rows)
        yield trained(case, bytes=2 * case.bytes)
