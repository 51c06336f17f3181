"""Chooses between kernel and reference, and gives each op its place in autograd.

MLLAMA_KERNELS_BACKEND=auto|kernels|reference: `auto` (the default) runs the kernel where one is available
and plain PyTorch elsewhere, `kernels` raises instead of falling back, `reference` never runs a kernel.
MLLAMA_KERNELS_DISABLE=op,op: these ops run as plain PyTorch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from mllama_kernels import _library, reference

Function = TypeVar("Function", bound=Callable[..., Any])

BACKEND = os.environ.get("MLLAMA_KERNELS_BACKEND", "auto")
DISABLED = frozenset(filter(None, os.environ.get("MLLAMA_KERNELS_DISABLE", "").split(",")))
if BACKEND not in ("auto", "kernels", "reference"):
    raise ValueError(f"MLLAMA_KERNELS_BACKEND={BACKEND!r}; expected auto, kernels or reference")
if not DISABLED <= set(_library.OPS):
    unknown = ", ".join(sorted(DISABLED - set(_library.OPS)))
    raise ValueError(
        f"MLLAMA_KERNELS_DISABLE names {unknown}; the ops are {', '.join(_library.OPS)}"
    )


def public(kernel: Function) -> Function:
    """The public function of an op: the kernel, or the reference of the same name."""
    name = kernel.__name__
    plain = getattr(reference, name)
    compiled = _library.missing is None

    @functools.wraps(kernel)
    def always_plain(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    @functools.wraps(kernel)
    def by_device(lead: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if compiled and lead.is_cpu:  # the shortest way, for the smallest ops
            return kernel(lead, *args, **kwargs)
        reason = _library.unavailable(lead.device.type) if lead.device.type != "meta" else None
        if reason is None:
            return kernel(lead, *args, **kwargs)
        if BACKEND == "kernels":
            raise RuntimeError(f"mllama_kernels.{name} cannot run: {reason}")
        return plain(lead, *args, **kwargs)

    if BACKEND == "reference" or name in DISABLED:
        return always_plain  # type: ignore[return-value]
    if _library.missing is None and _library.has_cuda and not _library.simulated:
        return kernel  # nothing to fall back from: the op itself has the clear errors
    return by_device  # type: ignore[return-value]


def register(name: str, fake: Callable[..., Any], *, differentiable: bool = True) -> None:
    """Gives a compiled op its fake and, until it has a backward kernel, a backward that says so.

    An op that writes to its arguments takes no autograd formula (`differentiable=False`).
    """
    if _library.missing is not None:
        return
    qualified = f"mllama_kernels::{name}"
    torch.library.register_fake(qualified)(fake)
    if differentiable:
        torch.library.register_autograd(qualified, functools.partial(no_backward, name))


def no_backward(name: str, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"mllama_kernels.{name} has no backward kernel; train with mllama_kernels.reference.{name}, "
        'a model loaded with backend="reference", or MLLAMA_KERNELS_BACKEND=reference'
    )
