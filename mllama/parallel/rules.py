"""How the linears of a block may be split over ranks: what a block says of itself, and the parts that follow.

Column and row parallel are the terms of Shoeybi et al., "Megatron-LM" (2019), arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from mllama_kernels.quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class ColumnParallel:
    """Each rank computes some of the outputs of each linear, from the whole input.

    Attributes:
        units: by the names of linears, what their outputs are made of in equal parts, as heads; any
            number of features where a linear is not named.
        what: the units, in the words of a refusal.
        may_repeat: linears of which several ranks may have the same unit, where there are fewer units than
            ranks.
        is_gathered: whether all ranks need all outputs.
    """

    units: Mapping[str, int] = field(default_factory=dict)
    what: str = "features"
    may_repeat: frozenset[str] = frozenset()
    is_gathered: bool = False


@dataclass(frozen=True)
class RowParallel:
    """Each rank multiplies its part of the input, that of a column parallel product; the output is the sum.

    Attributes:
        units: what the input is made of in equal parts; None: any number of features.
        what: the units, in the words of a refusal.
    """

    units: int | None = None
    what: str = "features"


Rule = ColumnParallel | RowParallel


@dataclass(frozen=True)
class Cut:
    """The part of a parameter that a rank has.

    Attributes:
        dim: which dimension is cut.
        begin, end: of it.
        is_zero: of a bias, which the first rank adds; the others have zeros.
    """

    dim: int
    begin: int
    end: int
    is_zero: bool = False

    @overload
    def __call__(self, whole: Tensor) -> Tensor: ...
    @overload
    def __call__(self, whole: QuantizedTensor) -> QuantizedTensor: ...
    def __call__(self, whole: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        """The part: of a tensor a view, but for zeros; of a quantised weight as it gives rows and columns."""
        if isinstance(whole, QuantizedTensor):
            part_of = whole.columns if self.dim else whole.rows
            return part_of(self.begin, self.end)
        part = whole.narrow(self.dim, self.begin, self.end - self.begin)
        return torch.zeros_like(part) if self.is_zero else part


def spans(units: int, size: int, repeats: bool = False) -> list[tuple[int, int]] | None:
    """From where to where each of ``size`` ranks has some of ``units``, as evenly as can be.

    Args:
        repeats: ranks beyond the units share them: with 2 units and 4 ranks the first two have unit 0.
    Returns: None where a rank would have none, or fewer units do not divide the ranks.
    """
    if repeats and units < size:
        if size % units:
            return None
        return [(rank * units // size, rank * units // size + 1) for rank in range(size)]
    if units < size:
        return None
    return [(rank * units // size, (rank + 1) * units // size) for rank in range(size)]
