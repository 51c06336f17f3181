"""What is measured: one op at one shape, and the implementations that do the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "mllama_kernels"
PLAIN = "pytorch"
ACCELERATED = "transformers accelerated"  # it runs our kernels too

Arguments = tuple[Any, ...]


def unchanged(*args: Any) -> Arguments:
    return args


def as_it_is(output: Any) -> Any:
    return output


def whole(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


@dataclass(frozen=True)
class Impl:
    """One implementation.

    Attributes:
        name: as it stands in the tables; ours is OURS, the plain line of PyTorch is PLAIN.
        call: takes what ``prepare`` returns.
        prepare: from the case's arguments to this implementation's own layout (a dense mask, a contiguous
            cache). It is not timed, so it can only favour the peer.
        result: from what ``call`` returns to the layout of the case's outputs. Not timed either.
        unavailable: why it cannot run here; then ``call`` is never called.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[..., Arguments] = unchanged
    result: Callable[[Any], Any] = as_it_is
    unavailable: str | None = None


def absent(name: str, reason: str) -> Impl:
    """An implementation that this machine lacks, so that the results say so."""
    return Impl(name, lambda *_: None, unavailable=reason)


@dataclass(frozen=True)
class Case:
    """One row of a result file.

    Attributes:
        op: name in mllama_kernels.
        shape: sizes by name; identifies the row together with op and dtype.
        make: fresh random arguments on the device; called once per rotating copy.
        truth: the outputs (or the part of them that ``select`` takes) in plain PyTorch, in the dtype of
            its arguments: called with float64 it is exact, called as it is it is the yardstick.
        impls: ours first.
        bytes, flops: what the op cannot do without: tensors read and written once, useful products.
        bound: which ceiling the bytes are held against: "copy" where as much is written as read,
            "read" where reading dominates.
        select: the part of an output that ``truth`` gives.
        largest: how many times plain PyTorch's our largest error may be.
        exact_match: outputs are integers and must be those of ``truth`` in the same dtype.
        backward: autograd runs, so that the tensors cannot be those of inference mode.
    """

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype
    make: Callable[[], Arguments]
    truth: Callable[..., Any]
    impls: tuple[Impl, ...]
    bytes: int
    flops: int = 0
    bound: Literal["copy", "read"] = "copy"
    select: Callable[[Any], tuple[Tensor, ...]] = whole
    largest: float = 2.0
    exact_match: bool = False
    backward: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.shape.items())
        return f"{self.op} [{sizes}] {self.dtype_name}"


@dataclass(frozen=True)
class Setting:
    """Where and how much: what the case files need to know to make their cases."""

    device: torch.device
    dtype: torch.dtype
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def element(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device) * scale

    def sizes(self, gpu: list[Any], cpu: list[Any], quick: list[Any] | None = None) -> list[Any]:
        """The sizes for this device; with --quick those of them that are in ``quick``."""
        chosen = gpu if self.on_gpu else cpu
        return [s for s in chosen if s in quick] if self.quick and quick is not None else chosen
