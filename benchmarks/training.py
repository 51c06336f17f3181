"""Forward and backward of an op as one case: what is checked and timed are the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.case import Arguments, Case, Impl, whole
from mllama_kernels import _library

PASS = {"pass": "forward + backward"}
# Products of attention: two forward, and five backward, where the scores are computed again.
ATTENTION_FLOPS = 3.5


def trained_ops() -> list[str]:
    """The ops that have a backward kernel."""
    return [op for op in _library.OPS if hasattr(torch.ops.mllama_kernels, f"{op}_backward")]


def by_heads(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention on q (..., Hq, D), k, v (..., Hkv, D), of whose scores one key head's exist at a time."""

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        groups = zip(*(t.chunk(k.shape[-2], -2) for t in (q, k, v)))
        parts = [checkpoint(attention, *group, *rest, use_reentrant=False) for group in groups]
        return torch.cat(parts, -2)

    return call


def _is_leaf(value: Any) -> bool:
    return torch.is_tensor(value) and value.requires_grad


def _as_leaves(args: Arguments, leaves: slice) -> Arguments:
    """The arguments; those of the floating tensors among them that ``leaves`` takes ask for a gradient."""
    floating = [i for i, a in enumerate(args) if torch.is_tensor(a) and a.is_floating_point()]
    wanted = floating[leaves]
    return tuple(a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args))


def _gradients(call: Callable[..., Any], outputs: int, *arguments: Any) -> tuple[Tensor, ...]:
    """Of the results' products with the last ``outputs`` arguments, for every leaf among the others."""
    args, grads = arguments[:-outputs], arguments[-outputs:]
    return torch.autograd.grad(whole(call(*args)), [a for a in args if _is_leaf(a)], grads)


def _compared(grads: Any) -> tuple[Tensor, ...]:
    """Without those of gates: a single sum cancels, and what is left of it errs by chance.

    The tests compare them over many draws.
    """
    grads = whole(grads)
    return tuple(g for g in grads if g.numel() > 1) or grads


def trained(
    case: Case,
    *,
    bytes: int,
    flops: int = 0,
    leaves: slice = slice(None),
    largest: float | None = None,
    outputs: int = 1,
    truth: Callable[..., Any] | None = None,
    impls: tuple[Impl, ...] | None = None,
) -> Case:
    """From the case of an op that of its forward and backward.

    The arguments are those of ``case`` and a random gradient for each of its results.

    Args:
        case: of the forward.
        bytes, flops: of forward and backward together.
        leaves: which of the floating arguments take a gradient. It holds for every implementation, of
            which one whose ``prepare`` splits an argument has more gradients: its ``result`` joins them.
        largest: ``Case.largest``; None: that of ``case``.
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
        return _compared(_gradients(plain, outputs, *args, *arguments[-outputs:]))

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
        select=_compared,
        largest=largest or case.largest,
        backward=True,
    )
