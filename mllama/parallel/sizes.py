"""Over how many ranks a model can be split."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mllama.parallel.split import CannotSplit, Split

_SIZES = (1, 2, 4, 8)


def possible_sizes(model: nn.Module, units: Mapping[str, int]) -> list[int]:
    """The numbers of ranks; the arguments are those of :class:`mllama.parallel.split.Split`."""
    return [size for size in _SIZES if size == 1 or _can_split(model, size, units)]


def _can_split(model: nn.Module, size: int, units: Mapping[str, int]) -> bool:
    try:
        Split(model, size, units)
    except CannotSplit:
        return False
    return True
