"""Replacing the forward of one module instance, and putting it back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from mllama_kernels.plain import StandIn
from mllama_kernels.transformers.wrappers import has_own_forward, redecorated

_BOUND = ("_method", "_undecorated", "_decorated")


class Patch(StandIn):
    """What a module has as `forward` in place of the method of its class.

    It is called like the method, inside the decorators of the method, survives `copy.deepcopy` and
    `pickle` together with its module, and gives the replacement the method it stands for, undecorated,
    for the calls that only that can serve.

    Args:
        module: the instance; its class is not touched.
        function: module-level function, called as ``function(patch, *args, **kwargs)``.
        ops: the switches of :func:`accelerate` that asked for it.
        options: what else the function wants to know.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], *ops: str, **options: Any):
        self.module, self.function, self.ops, self.options = module, function, ops, options
        # Their names, in order, and defaults: found here, since a compiler does not trace `inspect`.
        parameters = dict(list(inspect.signature(type(module).forward).parameters.items())[1:])
        self.parameters = tuple(parameters)
        self.defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not parameter.empty
        }
        self.stands_for = _written(type(module).forward)
        self.active = True
        self._bind()

    def _bind(self) -> None:
        """Find the method, and put its decorators around the replacement."""
        self._method = type(self.module).forward
        self._undecorated = inspect.unwrap(self._method)

        @functools.wraps(self._undecorated)  # decorators look at names and parameters
        def replacement(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.function(self, *args, **kwargs)

        # Where that cannot be done, which `PatchPlan` looks at beforehand, or where the class is another
        # by now, with a forward of its own, the method is the safe choice.
        self._decorated = self._method
        if has_own_forward(type(self.module)) and _written(self._method) == self.stands_for:
            self._decorated = redecorated(self._method, replacement) or self._method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return type(self.module).forward(self.module, *args, **kwargs)
        # FSDP2 changes the class of a module, and others may change the method of a class.
        if type(self.module).forward is not self._method:
            self._bind()
        return self._decorated(self.module, *args, **kwargs)

    def serves(self) -> bool:
        """Whether calls get to the function; not so where the class got another method since, or a
        decorator that cannot be built again."""
        if type(self.module).forward is not self._method:
            self._bind()
        return self.active and self._decorated is not self._method

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the method computes; its decorators are at work already."""
        return self._undecorated(self.module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was bound, which is of this module and no copy of it."""
        return {name: value for name, value in vars(self).items() if name not in _BOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bind()

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method: generation and trainers look at it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def install(self) -> None:
        setattr(self.module, _slot(self.module), self)

    def remove(self) -> None:
        """Take the patch out; where something else has wrapped it since, let it do nothing."""
        self.active = False
        for slot in ("forward", "_old_forward"):
            if vars(self.module).get(slot) is self:
                if slot == "forward":
                    del self.module.forward
                else:
                    setattr(self.module, slot, type(self.module).forward.__get__(self.module))


def _written(method: Callable[..., Any]) -> tuple[str, str]:
    """Where the function under a method's decorators was written."""
    function = inspect.unwrap(method)
    return function.__module__, function.__qualname__


def _slot(module: nn.Module) -> str:
    """Where `forward` really is: a hook of `accelerate` (device_map) keeps it under another name."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


def _present(module: nn.Module) -> Any:
    """What is set as `forward`; within what release 4 of `transformers` sets around it while it records."""
    state = vars(module)
    present = state.get("forward") if "_hf_hook" not in state else state.get(_slot(module))
    while isinstance(present, FunctionType) and hasattr(present, "__wrapped__"):
        if not present.__globals__["__name__"].startswith("transformers."):
            break
        present = present.__wrapped__
    return present


def patch_of(module: nn.Module) -> Patch | None:
    """The patch that a call of the module gets to, unless others have replaced its forward since."""
    present = _present(module)
    return present if isinstance(present, Patch) else None


def replaced_by_others(module: nn.Module) -> bool:
    """Whether the module runs something else than the forward of its class, or ours."""
    present = _present(module)
    if present is None or isinstance(present, Patch):
        return False
    return getattr(present, "__func__", None) is not type(module).forward


def installed(module: nn.Module) -> Iterator[Patch]:
    """The patches of a module and all modules inside it."""
    for child in module.modules():
        for slot in ("forward", "_old_forward"):
            patch = vars(child).get(slot)
            if isinstance(patch, Patch):
                yield patch


def by_name(patch: Patch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call as keywords."""
    return {**dict(zip(patch.parameters, args)), **kwargs}
