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
from torch import Tensor

from mllama_kernels import _arguments, _library, reference

Function = TypeVar("Function", bound=Callable[..., Any])

BACKEND = os.environ.get("MLLAMA_KERNELS_BACKEND") or "auto"
DISABLED = frozenset(os.environ.get("MLLAMA_KERNELS_DISABLE", "").replace(",", " ").split())
if BACKEND not in ("auto", "kernels", "reference"):
    raise ValueError(f"MLLAMA_KERNELS_BACKEND={BACKEND!r}; expected auto, kernels or reference")

_LIBRARY = torch.library.Library("mllama_kernels", "FRAGMENT")


def check_disabled() -> None:
    """Raises: ValueError for a name in MLLAMA_KERNELS_DISABLE that no op has; called when all are known."""
    if unknown := DISABLED - set(_library.OPS):
        names, ops = ", ".join(sorted(unknown)), ", ".join(_library.OPS)
        raise ValueError(f"MLLAMA_KERNELS_DISABLE names {names}; the ops are {ops}")


def switched_off(op: str) -> str | None:
    """The setting of the environment that asks for plain PyTorch in place of an op."""
    if BACKEND == "reference":
        return "MLLAMA_KERNELS_BACKEND=reference asks for plain PyTorch"
    if op in DISABLED:
        return f"MLLAMA_KERNELS_DISABLE={','.join(sorted(DISABLED))} asks for plain PyTorch"
    return None


def why_not(op: str, device: torch.device | str) -> str | None:
    """Why an op does not run as a kernel on a device, or None where it does.

    The one answer that dispatch, models, the self-check and everything that reports go by. On the meta
    device an op with a kernel has its shapes from the kernel's fake.
    """
    kind = device if isinstance(device, str) else device.type
    if BACKEND == "reference" or op in DISABLED:
        return switched_off(op)
    return _library.missing if kind == "meta" else _library.unavailable(kind)


def plain_ops(device: torch.device | str) -> dict[str, str]:
    """The ops that do not run as kernels on a device, each with the reason."""
    reasons = {op: why_not(op, device) for op in _library.OPS}
    return {op: reason for op, reason in reasons.items() if reason is not None}


def has_ops(device: torch.device) -> bool:
    """Whether code of others should call ops on a device: there are kernels, or plain PyTorch was asked
    for in their place. Where neither is so, that code itself is the better choice."""
    return BACKEND == "reference" or _library.unavailable(device.type) is None


def public(kernel: Function, check: Callable[..., None] | None = None) -> Function:
    """The public function of an op: the kernel, or the reference of the same name.

    Args:
        check: given such arguments, raises for what the kernel refuses and the reference would take, so that
            switching does not change it.
    """
    name = kernel.__name__
    if name not in _library.OPS:
        _library.OPS.append(name)
    plain = getattr(reference, name)
    arguments = _arguments.Arguments(kernel)
    lead_name = arguments.lead

    @functools.wraps(kernel)
    def op(*args: Any, **kwargs: Any) -> Any:
        lead: Any = args[0] if args else kwargs.get(lead_name)
        try:
            reason = why_not(name, "cpu" if lead.is_cpu else lead.device.type)
            if reason is None:
                return kernel(*args, **kwargs)
        except (
            Exception
        ):  # what is no tensor always ends here; looking before would cost every call
            arguments.explain(args, kwargs)
            raise
        if BACKEND == "kernels" and switched_off(name) is None:
            raise RuntimeError(f"mllama_kernels.{name} cannot run: {reason}")
        if check is not None:
            arguments.explain(args, kwargs)
            check(*args, **kwargs)
        return plain(*args, **kwargs)

    return op  # type: ignore[return-value]


def kernel_of(op: Function) -> Function:
    """The kernel that a public function chooses where :func:`why_not` has nothing against it."""
    return getattr(op, "__wrapped__", op)


def register(
    name: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable: bool = True,
    lowers: bool = True,
    kept: tuple[int, ...] = (),
) -> None:
    """Gives a compiled op its fake and its place in autograd and autocast.

    Args:
        name: of the op.
        fake: shapes and dtypes of the results.
        setup_context, backward: as torch.library.register_autograd takes them. Without them asking
            for a gradient raises an error that says what to do instead.
        differentiable: False for an op that writes to its arguments and takes no formula.
        lowers: in an autocast region run in its dtype, as torch.matmul does; False: in the widest
            dtype among the arguments, as a sum does.
        kept: the places of tensors that autocast leaves as they are.
    """
    if _library.missing is not None:
        return
    qualified = f"mllama_kernels::{name}"
    torch.library.register_fake(qualified)(_checked_fake(name, fake))
    if differentiable:
        backward = backward or functools.partial(no_backward, name)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(
            name,
            functools.partial(_autocast, name, device, lowers, kept),
            f"Autocast{device.upper()}",
        )


def _checked_fake(name: str, fake: Function) -> Function:
    """The fake, which one meta tensor among others calls as well: results of all would be memory as it lay.
    torch lets None pass for a tensor."""
    arguments = _arguments.Arguments(fake, name)

    @functools.wraps(fake)
    def shapes(*args: Any, **kwargs: Any) -> Any:
        kinds = {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
        if "meta" in kinds and len(kinds) > 1:
            raise RuntimeError(
                f"mllama_kernels.{name}: all tensors must be on one device, got {', '.join(sorted(kinds))}"
            )
        arguments.check(args, kwargs)
        return fake(*args, **kwargs)

    return shapes  # type: ignore[return-value]


def _autocast(name: str, device: str, lowers: bool, kept: tuple[int, ...], *args: Any) -> Any:
    """The op on arguments of one floating dtype; like torch's own, it leaves float64 as it is."""
    may_be_cast = [a for place, a in enumerate(args) if place not in kept]
    floating = [a for a in may_be_cast if isinstance(a, Tensor) and a.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, (a.dtype for a in floating), torch.bool)
    if lowers and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    is_cast = {id(a) for a in floating}
    with torch.autocast(device, enabled=False):
        op = getattr(torch.ops.mllama_kernels, name)
        return op(*(a.to(dtype) if id(a) in is_cast else a for a in args))


def register_backward(name: str, fake: Callable[..., Any]) -> None:
    """Gives the backward kernel of op `name` its fake; it has no gradient of its own."""
    if _library.missing is not None:
        return
    qualified = f"mllama_kernels::{name}_backward"
    torch.library.register_fake(qualified)(_checked_fake(f"{name}_backward", fake))
    torch.library.register_autograd(qualified, functools.partial(no_double_backward, name))


def no_backward(name: str, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"mllama_kernels.{name} has no backward kernel; train with mllama_kernels.reference.{name}, "
        'a model loaded with backend="reference", or MLLAMA_KERNELS_BACKEND=reference'
    )


def no_double_backward(name: str, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"mllama_kernels.{name} has no second derivative; mllama_kernels.reference.{name} has"
    )
