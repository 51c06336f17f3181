"""What `transformers` and `torch` put around the forward of a class, put around another function.

Decorators record hidden states and attention weights, checkpoint a layer, fill in defaults of the
configuration, rename arguments, turn outputs into tuples; FSDP2 gives a module a subclass of its own.
A `forward` set on an instance hides all of them, so they are built again, around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class a module was made of; `nn.Module` for the wrappers of torch.distributed."""
    return next(
        cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed.")
    )


def inside(module: nn.Module) -> nn.Module:
    """The module within wrappers of torch.distributed (FSDP1, checkpointing), which pass on all that
    they are called with."""
    while class_of(module) is nn.Module and type(module) is not nn.Module:
        module = next(module.children())
    return module


def modules_of(tower: nn.Module, *classes: type[nn.Module]) -> list[nn.Module]:
    """The modules of exactly these classes: a subclass may compute something else."""
    return [module for module in tower.modules() if class_of(module) in classes]


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether a class has the forward written in it, under decorators that :func:`redecorated` knows."""
    function = inspect.unwrap(cls.forward)
    defined = (function.__module__, function.__qualname__)
    written = [(c.__module__, f"{c.__qualname__}.forward") for c in cls.__mro__]
    return defined in written and redecorated(cls.forward, function) is not None


def redecorated(
    method: Callable[..., Any], function: Callable[..., Any]
) -> Callable[..., Any] | None:
    """A copy of a decorated method, with `function` in the place of the function at the bottom.

    Each decorator's wrapper is a function that names the next one as `__wrapped__` and holds it in its
    closure; the copy holds the next copy there. None where one of them is built otherwise, or has the next
    one in something else, too.
    """
    inner = getattr(method, "__wrapped__", None)
    if inner is None:
        return function
    around = redecorated(inner, function)
    if around is None or not isinstance(method, FunctionType):
        return None
    cells = [_contents(cell) for cell in method.__closure__ or ()]
    if not any(content is inner for content in cells):
        return None
    others = [content for content in cells if content is not inner]
    others += [method.__defaults__, method.__kwdefaults__]
    if any(_reaches(other, inner, [method]) for other in others):
        return None
    copy = FunctionType(
        method.__code__,
        method.__globals__,
        method.__name__,
        method.__defaults__,
        tuple(
            CellType(around) if content is inner else cell
            for content, cell in zip(cells, method.__closure__ or ())
        ),
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, method)
    copy.__wrapped__ = around
    return copy


def _reaches(value: Any, function: Callable[..., Any], seen: list[Any]) -> bool:
    """Whether a value is a function, or has it in the closures and containers that it is made of."""
    if value is function:
        return True
    if any(value is other for other in seen):
        return False
    seen.append(value)
    if isinstance(value, FunctionType):
        parts = [*map(_contents, value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    elif isinstance(value, MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        return False
    return any(_reaches(part, function, seen) for part in parts)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable not assigned yet
        return None
