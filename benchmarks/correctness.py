"""The gate before the clock: an implementation that is wrong is not timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Arguments, Case, Impl, whole

# A peer may round where it likes, in the probabilities and between its steps. Ours is held to what the
# tests allow (tests/numerics.py): its largest error to the case's ``largest``, the Euclidean one to this.
OURS_AT_MOST, PEER_AT_MOST = 2.0, 8.0


@dataclass(frozen=True)
class Error:
    """Distance from the float64 result: the largest, and the Euclidean one relative to the result."""

    max_abs: float
    relative: float

    def to_json(self) -> dict[str, float]:
        return {"max_abs": self.max_abs, "relative": self.relative}


def to_double(value: Any) -> Any:
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def distance(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Error:
    """The worst over the outputs. NaN, infinity or another shape is infinitely far."""
    largest = relative = 0.0
    for a, e in zip(actual, exact, strict=True):
        if a.shape != e.shape or not a.isfinite().all():
            return Error(float("inf"), float("inf"))
        difference = a.double() - e.double()
        norm = torch.linalg.vector_norm(e.double()).item()
        largest = max(largest, difference.abs().max().item())
        error = torch.linalg.vector_norm(difference).item()
        relative = max(relative, error / norm if norm else float(error > 0) * float("inf"))
    return Error(largest, relative)


class Gate:
    """The exact result of one set of arguments, and how far plain PyTorch is from it."""

    def __init__(self, case: Case, args: Arguments) -> None:
        self.case = case
        plain = whole(case.truth(*args))
        self.exact = plain if case.exact_match else whole(case.truth(*map(to_double, args)))
        self.plain = distance(plain, self.exact)
        largest = max((e.abs().max().item() for e in self.exact), default=0.0)
        if case.exact_match:
            self.rounding = Error(0.0, 0.0)
        else:  # half an ulp of the largest value: the rounding of the store
            ulp = torch.finfo(case.dtype).eps / 2
            self.rounding = Error(ulp * float(largest), ulp)

    def check(self, impl: Impl, output: Any, ours: bool) -> tuple[Error, str | None]:
        """The error, and why the implementation is refused, if it is."""
        error = distance(self.case.select(impl.result(output)), self.exact)
        factors = (self.case.largest, OURS_AT_MOST) if ours else (PEER_AT_MOST, PEER_AT_MOST)
        for name, factor in zip(("max_abs", "relative"), factors):
            allowed = max(factor * getattr(self.plain, name), getattr(self.rounding, name))
            if not ours:
                allowed = max(allowed, factor * getattr(self.rounding, name))
            if not getattr(error, name) <= allowed:
                return error, f"{name} error {getattr(error, name):.2e}, allowed {allowed:.2e}"
        return error, None
