"""The cases of the static table: shapes of the 11B checkpoint, each with what it must move.

A case names the bytes that have to cross the memory bus (`floor`: every input once, every output
once) and the bytes its design moves again, served by L1 or L2 (`again`: reason and bytes). What the
simulator counts beyond 1.1 times their sum fails. Likewise every conflict of shared memory needs a
reason. Shapes marked * are cut down, for the simulator's sake; the kernels and their tiles are
those of the full shape.

To add a case, yield it from one of the functions below, or from a new one listed in SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mllama_kernels as ours

E, INTERMEDIATE, HQ, HKV, D = 4096, 14336, 32, 8, 128
VISION_WIDTH, VISION_HEADS, VISION_DIM, PATCH, TILE = 1280, 16, 80, 14, 560
TILES, TILE_TOKENS = 4, 1601
BF16 = torch.bfloat16


@dataclass
class Case:
    op: str
    shape: str
    run: Callable[[], object]
    floor: int  # bytes
    again: dict[str, int] = field(default_factory=dict)  # reason to bytes
    # Why shared accesses take more wavefronts than they must, and how many more, as a share of all.
    conflicts: tuple[str, float] = ("", 0.0)
    flops: int = 0  # useful ones, where products bound the kernel
    architectures: tuple[int, ...] = (80, 90)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def elementwise(arch: int) -> Iterator[Case]:
    weight, gate = randn(E), randn(1)
    rows = 4096
    x, residual = randn(rows, E), randn(rows, E)
    per_row = {"weight, per row, from L1": (rows - 1) * size(weight)}
    shape = f"{rows} x {E}"
    yield Case(
        "rms_norm",
        shape,
        lambda: ours.rms_norm(x, weight),
        floor=2 * size(x) + size(weight),
        again=per_row,
    )
    yield Case(
        "add_rms_norm",
        shape,
        lambda: ours.add_rms_norm(x, residual, weight),
        floor=4 * size(x) + size(weight),
        again=per_row,
    )
    yield Case(
        "gated_residual",
        shape,
        lambda: ours.gated_residual(x, residual, gate),
        floor=3 * size(x) + size(gate),
    )
    heads, head_weight = randn(2048, HQ, D), randn(D)
    yield Case(
        "rms_norm",
        f"2048 x {HQ} x {D}",
        lambda: ours.rms_norm(heads, head_weight),
        floor=2 * size(heads) + size(head_weight),
        again={"weight, per row, from L1": (2048 * HQ - 1) * size(head_weight)},
    )
    gate_up = randn(1024, 2 * INTERMEDIATE)
    yield Case(
        "swiglu",
        f"1024 x {INTERMEDIATE}",
        lambda: ours.swiglu(gate_up),
        floor=size(gate_up) * 3 // 2,
    )


SOURCES = (elementwise,)


def cases(arch: int) -> Iterator[Case]:
    for source in SOURCES:
        for case in source(arch):
            if arch in case.architectures:
                yield case
