"""A model without weights yet, turned into the share of one rank; which part of each parameter that is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mllama.linear import Projection, projections_of
from mllama.parallel.ranks import Ranks
from mllama.parallel.rules import ColumnParallel, Cut, RowParallel, spans


class CannotSplit(ValueError):
    """A model that so many ranks cannot share."""


class Split:
    """How a model is split.

    Args:
        model: without weights: its parameters on the meta device, with their whole shapes.
        size: how many ranks.
        units: by state-dict name, of the weights that will be quantised, the columns that are stored
            together.
    Raises: CannotSplit naming what does not divide, with the numbers.

    Attributes:
        cuts: by state-dict name, the part of each rank; a parameter that is not named is whole on all.
        size: how many ranks.
    """

    def __init__(self, model: nn.Module, size: int, units: Mapping[str, int]) -> None:
        self.cuts: dict[str, tuple[Cut, ...]] = {}
        self.size = size
        for path, block in model.named_modules():
            own = {name: p for p in projections_of(block) for name in p.names if p.rule is not None}
            features = _features_together(path, own, units)
            for name, projection in own.items():
                parameters = dict(getattr(block, name).named_parameters())
                place = _within(path, name)
                rule = projection.rule
                if isinstance(rule, ColumnParallel):
                    cuts = self._column_cuts(place, name, rule, parameters["weight"], features)
                    self.cuts |= {_within(place, of): cuts for of in parameters}
                elif isinstance(rule, RowParallel):
                    cuts = self._row_cuts(place, rule, parameters["weight"], features, units)
                    self.cuts[_within(place, "weight")] = cuts
                    if "bias" in parameters:
                        rows = parameters["bias"].shape[0]
                        self.cuts[_within(place, "bias")] = tuple(
                            Cut(0, 0, rows, is_zero=rank > 0) for rank in range(size)
                        )

    def part_shape(self, name: str, whole: Sequence[int], rank: int) -> tuple[int, ...]:
        """Of a parameter on a rank."""
        sizes = list(whole)
        if name in self.cuts:
            cut = self.cuts[name][rank]
            sizes[cut.dim] = cut.end - cut.begin
        return tuple(sizes)

    def _column_cuts(
        self, place: str, name: str, rule: ColumnParallel, weight: Any, unit: int
    ) -> tuple[Cut, ...]:
        rows = weight.shape[0]
        repeats = name in rule.may_repeat
        units = rule.units.get(name, rows // unit)
        if name in rule.units and units % self.size and not (repeats and self.size % units == 0):
            raise CannotSplit(self._refusal(units, rule.what, place))
        found = spans(units, self.size, repeats)
        if found is None:
            raise CannotSplit(self._refusal(units, _in_parts(units, unit, rule.what), place))
        each = rows // units
        return tuple(Cut(0, begin * each, end * each) for begin, end in found)

    def _row_cuts(
        self, place: str, rule: RowParallel, weight: Any, unit: int, stored: Mapping[str, int]
    ) -> tuple[Cut, ...]:
        columns = weight.shape[1]
        units = columns // unit if rule.units is None else rule.units
        if rule.units is not None and units % self.size:
            raise CannotSplit(self._refusal(units, rule.what, place))
        found = spans(units, self.size)
        if found is None:
            raise CannotSplit(self._refusal(units, _in_parts(units, unit, rule.what), place))
        each = columns // units
        block = stored.get(_within(place, "weight"), 1)
        for _, end in found:
            if end * each % block:
                raise CannotSplit(
                    f"{self.size} ranks would divide the {columns} columns of {place}.weight at "
                    f"{end * each}, within one of the blocks of {block} that it is quantised in: take fewer "
                    "ranks, or another encoding for it"
                )
        return tuple(Cut(1, begin * each, end * each) for begin, end in found)

    def _refusal(self, units: int, what: str, place: str) -> str:
        return f"{self.size} ranks cannot share the {units} {what} of {place}"


class Share:
    """The share of one rank in a split model.

    Args:
        ranks: that share the model.
        split: how.

    Attributes:
        ranks, split: the same.
        cuts: by state-dict name, this rank's part of what is not whole here.
        head_rows: of the whole head; None of a model without one.
    """

    def __init__(self, ranks: Ranks, split: Split) -> None:
        self.ranks, self.split = ranks, split
        self.cuts = {name: cuts[ranks.rank] for name, cuts in split.cuts.items()}
        self.head_rows: int | None = None

    def whole_shape(self, name: str, own: Sequence[int]) -> tuple[int, ...]:
        """Of a parameter on all ranks together, by what it is here."""
        sizes = list(own)
        if (cuts := self.split.cuts.get(name)) is not None:
            sizes[cuts[0].dim] = cuts[-1].end
        return tuple(sizes)

    def take(self, model: nn.Module) -> None:
        """Give the model, which has no weights yet, the sizes of this rank, and its exchange with others."""
        for path, block in model.named_modules():
            for projection in projections_of(block):
                if projection.rule is not None:
                    self._take_part(path, block, projection)
        for module in model.modules():
            if hasattr(module, "share"):
                module.share = self
                if hasattr(config := module.config.get_text_config(), "tensor_parallel_size"):
                    config.tensor_parallel_size = self.ranks.size

    def _take_part(self, path: str, block: nn.Module, projection: Projection) -> None:
        for name in projection.names:
            whole = getattr(block, name)
            cut = self.cuts[_within(path, f"{name}.weight")]
            sizes = list(whole.weight.shape)
            sizes[cut.dim] = cut.end - cut.begin
            has_bias = whole.bias is not None
            part = nn.Linear(sizes[1], sizes[0], bias=has_bias, device="meta")
            block.register_module(name, part.train(whole.training))
        projection.is_split = True
        projection.sizes = tuple(linear.weight.shape[0] for linear in projection.linears)
        rule = projection.rule
        if isinstance(rule, RowParallel):
            projection.collective = self.ranks.summed
        elif isinstance(rule, ColumnParallel) and rule.is_gathered:
            cuts = self.split.cuts[_within(path, f"{projection.names[0]}.weight")]
            sizes = [cut.end - cut.begin for cut in cuts]
            projection.collective = functools.partial(self.ranks.side_by_side, sizes=sizes)
            self.head_rows = sum(sizes)


def require_whole(model: Any, what: str) -> None:
    """Raises: TypeError for a model that is split, of which ``what`` would change the part of one rank."""
    if model.share is not None:
        raise TypeError(
            f"{what} needs the whole model, and this one is split over ranks (tensor_parallel): load it "
            "without tensor_parallel"
        )


def _features_together(path: str, own: Mapping[str, Projection], stored: Mapping[str, int]) -> int:
    """In parts of how many features a block without heads is split: its row parallel weight's blocks."""
    for name, projection in own.items():
        if isinstance(projection.rule, RowParallel) and projection.rule.units is None:
            return stored.get(_within(path, f"{name}.weight"), 1)
    return 1


def _in_parts(count: int, unit: int, what: str) -> str:
    return what if unit == 1 else f"block{'s' if count > 1 else ''} of {unit} {what}"


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
