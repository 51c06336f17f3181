"""What a case of the static table is, and what its cases are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

E, INTERMEDIATE, HQ, HKV, D = 4096, 14336, 32, 8, 128
VISION_WIDTH, VISION_HEADS, VISION_DIM, PATCH, TILE = 1280, 16, 80, 14, 560
TILES, TILE_TOKENS = 4, 1601
VOCABULARY = 128256
BF16 = torch.bfloat16
# Choices that only a GPU can decide, by the variable that asks for what is not the default: their
# cases run in a process that has it (cases.py: VARIANT_SOURCES).
NEXT_KERNEL_AT_START = "MLLAMA_KERNELS_NEXT_KERNEL=start"
VARIANTS = (NEXT_KERNEL_AT_START,)


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


def rand(*shape: int) -> Tensor:
    """From -2 to 2, in steps of 1/64: the same numbers on every machine, for how often a softmax's
    maximum moves depends on them."""
    return (torch.randint(-128, 129, shape) / 64).to(BF16)


def angles(length: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length).unsqueeze(-1) * 500000.0 ** (-torch.arange(0, D, 2) / D)
    return angle.cos().to(BF16), angle.sin().to(BF16)
