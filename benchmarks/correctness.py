"""The gate before the clock: an implementation that is wrong is not timed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Arguments, Case, Impl, whole
from mllama_kernels.testing import Norms, allowed, to_double

# A peer may round where it likes, in the probabilities and between its steps. Ours is held to less than the
# tests allow: its largest error to the case's ``largest``, the 2-norm to this.
OURS_AT_MOST, PEER_AT_MOST = 2.0, 8.0
# What the largest error and the 2-norm are called in a result file.
MEASURES = ("max_abs", "relative")


def to_json(error: Norms) -> dict[str, float]:
    """A distance as it stands in a result file."""
    return dict(zip(MEASURES, error, strict=True))


def distance(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Norms:
    """The worst over the outputs, the 2-norm relative to the exact one. NaN, infinity or another shape is
    infinitely far."""
    worst = Norms()
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape or not a.isfinite().all():
            return Norms(math.inf, math.inf)
        error, size = Norms.of(a.double() - e.double()), Norms.of(e.double())
        relative = error.root / size.root if size.root else math.inf if error.root else 0.0
        worst = Norms(max(worst.largest, error.largest), max(worst.root, relative))
    return worst


class Gate:
    """The exact result of one set of arguments, and how far plain PyTorch is from it."""

    def __init__(self, case: Case, args: Arguments) -> None:
        self.case = case
        plain = whole(case.truth(*args))
        self.exact = plain if case.exact_match else whole(case.truth(*map(to_double, args)))
        self.plain = distance(plain, self.exact)
        # The rounding of the store, of the largest value.
        ulp = 0.0 if case.exact_match else torch.finfo(case.dtype).eps / 2
        self.rounding = Norms(ulp * max(Norms.of(e.double()).largest for e in self.exact), ulp)

    def check(self, impl: Impl, output: Any, ours: bool) -> tuple[Norms, str | None]:
        """The error, and why the implementation is refused, if it is."""
        error = distance(self.case.select(impl.result(output)), self.exact)
        if ours:
            limit = allowed(self.plain, self.rounding, OURS_AT_MOST, self.case.largest)
        else:
            limit = allowed(self.plain, self.rounding.times(PEER_AT_MOST), PEER_AT_MOST)
        for name, value, most in zip(MEASURES, error, limit, strict=True):
            if not value <= most:
                return error, f"{name} error {value:.2e}, allowed {most:.2e}"
        return error, None
