"""Holds results to float64, with the error of plain PyTorch in the same dtype as the measure.

A fixed tolerance is too tight for some sizes and lets almost anything pass at others. Here an error may be
twice that of plain PyTorch, in the largest element and in the 2-norm, or half a unit in the last place::

    from mllama_kernels import reference, rms_norm
    from mllama_kernels.testing import assert_no_worse

    assert_no_worse(rms_norm(x, weight), reference.rms_norm, x, weight)

The function that is the measure has to compute in float64 where its arguments are float64. Compare in float32
as well as in 16 bits, and small shapes too: the rounding of bfloat16 hides one missing element of 4096.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ATTENTION_LARGEST",
    "Errors",
    "Norms",
    "allowed",
    "assert_close_to_exact",
    "assert_no_worse",
    "to_double",
]

# `largest` for attention's gradients: what is subtracted from grad_out V^T is summed apart from it, so
# where one key has all the weight its error does not cancel. Of 1920 draws in float32 eight had a largest
# error above twice plain PyTorch's, up to 2.5 times.
ATTENTION_LARGEST = 4.0
# Before the store, in attention: rotation, score, scaling, exponential, weight, product, sum, quotient.
_FLOAT32_ROUNDINGS = 8
# The quotient of two samples' errors scatters where the samples are small.
_SMALL, _SMALL_TIMES = 4096, 1.5
# So few that their 2-norm is as much a matter of chance as their largest.
_FEW = 64


class Norms(NamedTuple):
    """The largest element and the 2-norm of something, both without its sign."""

    largest: float = 0.0
    root: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Norms:
        """Of a tensor; of one without elements zeros."""
        if not values.numel():
            return cls()
        orders = (math.inf, 2)
        return cls(*(torch.linalg.vector_norm(values, order).item() for order in orders))

    def and_(self, other: Norms) -> Norms:
        """Of two things together."""
        return Norms(max(self.largest, other.largest), math.hypot(self.root, other.root))

    def times(self, factor: float) -> Norms:
        return Norms(self.largest * factor, self.root * factor)


def allowed(plain: Norms, floor: Norms, times: float = 2.0, largest: float | None = None) -> Norms:
    """What an error may be.

    Args:
        plain: the error of plain PyTorch.
        floor: what is allowed however small that is: the rounding of the store at least.
        times: how many times plain PyTorch's the 2-norm of the error may be.
        largest: the same for the largest error; default `times`.
    """
    largest = times if largest is None else largest
    return Norms(max(largest * plain.largest, floor.largest), max(times * plain.root, floor.root))


@dataclass
class Errors:
    """Errors against float64, gathered over any number of results: one of a single row says too little.

    Attributes:
        compared: how many elements, without those left out.
        error, plain: of what is tested, and of plain PyTorch.
        half_ulp: half a unit in the last place of the results' dtypes, for every element; in the largest
            error as often as there are roundings.
        exact: the float64 results.
    """

    compared: int = 0
    error: Norms = field(default_factory=Norms)
    plain: Norms = field(default_factory=Norms)
    half_ulp: Norms = field(default_factory=Norms)
    exact: Norms = field(default_factory=Norms)

    def add(self, actual: Tensor, plain: Tensor, exact: Tensor, roundings: int = 1) -> None:
        """Takes in a result: what is tested, plain PyTorch's, and that of float64, of one shape; and how
        often the op's definition rounds to the dtype, the store included.

        Elements that float64 has but the result's dtype cannot hold are left out; that the others are
        finite is for the caller to see. Where only plain PyTorch overflows its error is no measure.
        """
        values = (actual, plain, exact)
        keep = exact.to(actual.dtype).isfinite()
        if not keep.all():
            values = tuple(t[keep] for t in values)
        a, p, e = (t.double() for t in values)
        self.compared += e.numel()
        size, measured = Norms.of(e), p.isfinite()
        self.error = self.error.and_(Norms.of(a - e))
        self.plain = self.plain.and_(Norms.of((p - e)[measured]))
        ulp = size.times(torch.finfo(actual.dtype).eps / 2)
        self.half_ulp = self.half_ulp.and_(Norms(roundings * ulp.largest, ulp.root))
        self.exact = self.exact.and_(size)

    def floor(self, roundings: int = 1, few: bool = False) -> Norms:
        """What is allowed however good plain PyTorch is, which may be luck: in the largest error eight
        roundings in float32, and then those to the dtype.

        Args:
            roundings: to the dtype: the store, and those that the op's definition has before it.
            few: the results have so few elements that all this goes for the 2-norm too, which is allowed the
                rounding of the store otherwise.
        """
        float32 = _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps / 2
        largest, root = (
            roundings * ulp + float32 * size
            for ulp, size in zip(self.half_ulp, self.exact, strict=True)
        )
        return Norms(largest, root if few else self.half_ulp.root)

    def ratio(self, limit: Norms) -> float:
        """The worse quotient of the two errors and their limits: above 1 is too much, and so is NaN,
        which counts as infinite."""
        tiny = torch.finfo(torch.float64).tiny
        ratios = [e / max(most, tiny) for e, most in zip(self.error, limit, strict=True)]
        return math.inf if any(map(math.isnan, ratios)) else max(ratios)


def to_double(value: Any) -> Any:
    """A floating tensor in float64; anything else as it is."""
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def assert_no_worse(
    actual: Tensor | tuple[Tensor, ...],
    reference: Callable[..., Any],
    *args: Any,
    times: float = 2.0,
    largest: float | None = None,
    roundings: int = 1,
    **kwargs: Any,
) -> None:
    """Asserts that a result is about as near to float64 as plain PyTorch's, as `assert_close_to_exact` says.

    Args:
        actual: one tensor or several.
        reference: plain PyTorch for the same; called with the other arguments as they are, and with their
            floating tensors in float64.
        times, largest, roundings: of `assert_close_to_exact`.
    Raises: AssertionError naming the error and what is allowed.
    """
    exact = reference(*map(to_double, args), **{n: to_double(v) for n, v in kwargs.items()})
    plain = reference(*args, **kwargs)
    if torch.is_tensor(actual):
        actual, exact, plain = (actual,), (exact,), (plain,)
    assert len(actual) == len(exact), f"{len(actual)} results, expected {len(exact)}"
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_close_to_exact(a, e, p, times, largest, roundings)


def assert_close_to_exact(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    times: float = 2.0,
    largest: float | None = None,
    roundings: int = 1,
) -> None:
    """Asserts that one result is about as near to float64 as plain PyTorch's.

    The 2-norm of its error may be `times` that of plain PyTorch, the largest error `largest` times; half as
    much again where there are fewer than 4096 elements. Always allowed is the rounding of the store, and in
    the largest error `roundings` of these and eight in float32 before them; so it is in the 2-norm of fewer
    than 64 elements. In float64 it is only the rounding of the store.

    Args:
        actual: any shape, floating; or whole numbers or truth values, which are to be equal to `exact`.
        exact: the float64 result.
        plain: that of plain PyTorch, in the dtype of `actual`.
        times, largest, roundings: as above; `largest` is `times` by default and not below it.
    Raises: AssertionError naming what differs, or the error and what is allowed.
    """
    assert actual.shape == exact.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    assert actual.dtype == plain.dtype, f"{actual.dtype}, expected {plain.dtype}"
    if not actual.is_floating_point():
        wrong = actual != exact
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements differ"
        return
    ideal = exact.to(actual.dtype)
    same = (actual == ideal) | (actual.isnan() & ideal.isnan())
    wrong = ~same & ~(actual.isfinite() & ideal.isfinite())
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are (not) finite by mistake"
    )
    errors = Errors()
    errors.add(actual, plain, exact)
    if exact.numel() < _SMALL:
        times *= _SMALL_TIMES
    if actual.dtype == torch.float64:
        floor = errors.half_ulp
    else:
        floor = errors.floor(roundings, few=errors.compared < _FEW)
    limit = allowed(errors.plain, floor, times, max(times, largest or times))
    for what, error, most in zip(("largest", "2-norm of the"), errors.error, limit, strict=True):
        assert error <= most, f"the {what} error is {error:.2e}, allowed {most:.2e}"
