"""The error rule: what it allows, and that it finds what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import FLOATS
from torch import Tensor

from mllama_kernels import testing
from mllama_kernels.testing import Errors, Norms, allowed, assert_close_to_exact, assert_no_worse


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 0.3, x.sum(-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_the_exact_result_rounded_once_passes(dtype, rows):
    x = torch.randn(rows, 129).to(dtype)
    assert_no_worse(mean_square(x.double()).to(dtype), mean_square, x)
    assert_no_worse(tuple(t.to(dtype) for t in halves(x.double())), halves, x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wrong_divisor_is_found(dtype):
    x = torch.randn(600, 33).to(dtype)
    wrong = (x.double().square().sum(-1) / 32).to(dtype)
    with pytest.raises(AssertionError, match=r"error is .*, allowed"):
        assert_no_worse(wrong, mean_square, x)


def test_one_wrong_element_of_many_is_found():
    x = torch.randn(5000, 8)
    wrong = mean_square(x.double()).float()
    wrong[4321] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="the largest error"):
        assert_no_worse(wrong, mean_square, x)
    assert_no_worse(wrong, mean_square, x, times=1e5)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.ones(4), r"shape \(4,\), expected \(3,\)"),
        (torch.ones(3, dtype=torch.float16), "torch.float16, expected torch.float32"),
        (torch.tensor([1.0, math.nan, 1.0]), r"2 of 3 elements are \(not\) finite by mistake"),
        (torch.tensor([math.inf, math.inf, 1.0]), r"1 of 3 elements are \(not\) finite by mistake"),
        (torch.tensor([-math.inf, 1.0, 1.0]), r"1 of 3 elements are \(not\) finite by mistake"),
    ],
)
def test_what_cannot_be_compared_is_named(actual, message):
    plain = torch.tensor([math.inf, 1.0, 1.0])
    with pytest.raises(AssertionError, match=message):
        assert_close_to_exact(actual, plain.double(), plain)


def test_results_are_counted_and_whole_numbers_are_equal():
    x = torch.randn(4, 4)
    with pytest.raises(AssertionError, match="1 results, expected 2"):
        assert_no_worse((x * 0.3,), halves, x)
    best = x.argmax(-1)
    assert_no_worse(best, lambda x: x.argmax(-1), x)
    with pytest.raises(AssertionError, match="4 of 4 elements differ"):
        assert_no_worse(best + 1, lambda x: x.argmax(-1), x)


def test_infinity_where_float64_has_it_too_is_no_error():
    x = torch.tensor([300.0, 10.0, -7.0], dtype=torch.float16)
    assert_no_worse(x * x, torch.square, x)


def test_where_plain_pytorch_alone_overflows_its_error_is_no_measure():
    def overflows(x: Tensor) -> Tensor:
        return x * 1000 / 1000

    x = torch.full((5000,), 100.0, dtype=torch.float16)
    x[1:] = 1
    assert overflows(x)[0].isinf()
    assert_no_worse(x, overflows, x)
    with pytest.raises(AssertionError):
        assert_no_worse(x * (1 + 2**-9), overflows, x)


def test_float64_has_the_rounding_of_its_store_only():
    x = torch.rand(5000, dtype=torch.float64)
    assert_close_to_exact(x, x, x)
    with pytest.raises(AssertionError, match="the largest error"):
        assert_close_to_exact(x * (1 + 1e-12), x, x)


def test_the_largest_error_has_a_limit_of_its_own():
    exact = torch.ones(5000, dtype=torch.float64)
    plain = exact.float() + 1e-3
    actual = exact.float() + 1e-3
    actual[0] += 3e-3
    with pytest.raises(AssertionError, match=r"the largest error is 4\.00e-03, allowed 2\.00e-03"):
        assert_close_to_exact(actual, exact, plain)
    assert_close_to_exact(actual, exact, plain, largest=testing.ATTENTION_LARGEST + 1e-3)


def test_what_is_always_allowed():
    """By hand: a largest element of 3, half an ulp of bfloat16 being 2^-8 of it."""
    errors, ulp = Errors(), 2.0**-8
    for value in (2.0, -3.0):
        one = torch.tensor([value], dtype=torch.bfloat16)
        errors.add(one, one, one.double())
    size = Norms(3.0, math.sqrt(13))
    float32 = 8 * 2.0**-24
    assert errors.compared == 2 and errors.error == errors.plain == Norms()
    assert errors.floor() == pytest.approx((3 * (ulp + float32), size.root * ulp))
    assert errors.floor(roundings=2).largest == pytest.approx(3 * (2 * ulp + float32))
    assert errors.floor(few=True) == pytest.approx(
        (3 * (ulp + float32), size.root * (ulp + float32))
    )


def test_an_error_counts_by_the_worse_of_its_norms():
    errors = Errors(error=Norms(4.0, 1.0))
    assert errors.ratio(Norms(2.0, 4.0)) == 2 and errors.ratio(Norms(8.0, 0.25)) == 4
    assert (
        Errors().ratio(Norms()) == 0
        and Errors(error=Norms(0.0, math.nan)).ratio(Norms(1.0, 1.0)) == math.inf
    )
    assert allowed(Norms(1, 1), Norms(3, 1), 2) == (3, 2)
    assert allowed(Norms(1, 1), Norms(0, 0), 2, largest=5) == (5, 2)
