"""Forward and backward of an op as one case: what is checked and timed are the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Arguments, Case, Impl, whole

PASS = {"pass": "forward + backward"}


def _is_leaf(value: Any) -> bool:
    return torch.is_tensor(value) and value.requires_grad


def _as_leaves(args: Arguments, count: int | None) -> Arguments:
    """The arguments, of which the first ``count`` floating tensors (None: all) ask for a gradient."""
    found: list[Any] = []
    left = len(args) if count is None else count
    for value in args:
        wanted = left > 0 and torch.is_tensor(value) and value.is_floating_point()
        left -= wanted
        found.append(value.detach().requires_grad_() if wanted else value)
    return tuple(found)


def _gradients(call: Callable[..., Any], outputs: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Of the results' products with the last ``outputs`` arguments, for every leaf among the others."""
    args, grads = arguments[:-outputs], arguments[-outputs:]
    return torch.autograd.grad(whole(call(*args)), [a for a in args if _is_leaf(a)], grads)


def trained(
    case: Case,
    *,
    bytes: int,
    flops: int = 0,
    leaves: int | None = None,
    outputs: int = 1,
    truth: Callable[..., Any] | None = None,
    impls: tuple[Impl, ...] | None = None,
) -> Case:
    """From the case of an op that of its forward and backward.

    The arguments are those of ``case`` and a random gradient for each of its results.

    Args:
        case: of the forward.
        bytes, flops: of forward and backward together.
        leaves: how many floating arguments take a gradient, the first ones; None: all. It holds for
            every implementation, of which one whose ``prepare`` splits an argument has more gradients:
            its ``result`` joins them.
        outputs: results of the op.
        truth: the whole results in plain PyTorch; None: ``case.truth``.
        impls: the implementations that have a backward; None: all of ``case``.
    """
    plain = truth or case.truth

    def make() -> Arguments:
        args = case.make()
        with torch.no_grad():
            results = whole(case.impls[0].call(*args))
        assert len(results) == outputs
        return *args, *(torch.randn_like(result) for result in results)

    def exact(*arguments: Any) -> tuple[Tensor, ...]:
        args = _as_leaves(arguments[:-outputs], leaves)
        return _gradients(plain, outputs, *args, *arguments[-outputs:])

    def with_backward(impl: Impl) -> Impl:
        def prepare(*arguments: Any) -> Arguments:
            args = impl.prepare(*arguments[:-outputs])
            return *_as_leaves(args, leaves), *arguments[-outputs:]

        return replace(impl, call=partial(_gradients, impl.call, outputs), prepare=prepare)

    return replace(
        case,
        shape=case.shape | PASS,
        make=make,
        truth=exact,
        impls=tuple(map(with_backward, impls or case.impls)),
        bytes=bytes,
        flops=flops,
        select=whole,
        backward=True,
    )
