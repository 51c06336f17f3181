"""Which modules are exactly the plain thing, asked once as long as nothing about them changes, and the call
of those that are not."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mllama.varlen import VarlenBatch
from mllama_kernels.plain import is_bare, is_plain


class Kinds(Protocol):
    """The class of each module where calling it would be that class's forward and nothing else.

    What reads a module's parameters in place of calling it asks for the very class it knows:
    ``kinds.get(norm) is RMSNorm``.
    """

    def get(self, module: nn.Module, /) -> type[nn.Module] | None:
        """The class of a plain module, None for any other: it has to be called."""


class Asked:
    """The kinds that are looked at whenever somebody asks; no instance, which a graph could not take in."""

    @staticmethod
    def get(module: nn.Module, /) -> type[nn.Module] | None:
        if torch.compiler.is_exporting():
            return _kind_in_export(module)
        return type(module) if is_plain(module, type(module)) else None


def _kind_in_export(module: nn.Module) -> type[nn.Module] | None:
    """The tracer of an exported program puts a proxy in the place of each module, and its own call in that
    of all. Linears are called: the program knows their weights by that."""
    base = module.get_base() if hasattr(module, "get_base") else module
    is_called = isinstance(base, nn.Linear) or "forward" in vars(base) or _is_hooked(base)
    return None if is_called else type(base)


class KnownKinds:
    """The kinds of all modules within a tower, found in one forward and kept for the next.

    A forward compares what decides about them (classes, hooks, forwards of instances, children, kinds of
    parameters) with what it was, in one pass of a microsecond per module, and finds them anew where any of
    it differs. Within the forward no module is asked again.

    Where code of others runs within the forward, which may change what comes after it, they are looked at
    whenever somebody asks. It keeps no module alive that has been replaced. Copying or pickling gives an
    empty one.
    """

    def __init__(self) -> None:
        # Of one another, also where several threads run the model: assigned together.
        self._known: tuple[list[Any], Kinds] = ([], Asked)

    def __reduce__(self) -> tuple[type[KnownKinds], tuple[()]]:
        return KnownKinds, ()

    def of(self, tower: nn.Module) -> Kinds:
        """Those of now. Not in a graph that is being traced: its guards are about single modules."""
        if torch.compiler.is_compiling():
            return Asked
        state, modules = _state(tower)
        known, kinds = self._known
        if state != known:
            found = {module: Asked.get(module) for module in modules}
            is_known = all(_is_known(kind) or _is_list(m) for m, kind in found.items())
            kinds = WeakKeyDictionary(found) if is_known else Asked
            self._known = (state, kinds)
        return kinds


# What these do in their forwards changes no other module.
_KNOWN = ("torch", "transformers", "peft", "mllama", "mllama_kernels")


def _is_known(kind: type[nn.Module] | None) -> bool:
    return kind is not None and kind.__module__.partition(".")[0] in _KNOWN


def _is_list(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward  # which nobody calls


def _state(tower: nn.Module) -> tuple[list[Any], list[nn.Module]]:
    """What :func:`is_plain` looks at in every module within a tower, and the modules.

    A module that has taken another's place and its identity is found out by the rest, or is as plain as that.
    """
    state: list[Any] = [_has_any_global_hook()]
    modules, seen = [tower], {tower}
    for module in modules:  # which grows meanwhile
        cls, own = type(module), vars(module)
        state += (
            id(module),
            cls,
            cls.forward,
            cls.__call__,
            cls._call_impl,
            not (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ),
            own.get("forward"),
            own.get("_call_impl"),
            own.get("_compiled_call_impl"),
        )
        state += map(type, own["_parameters"].values())
        for child in own["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return state, modules


def call_on_rows(module: nn.Module, x: Tensor, varlen: VarlenBatch | None) -> Tensor:
    """``module(x)`` of packed rows x (N, E), for a module in the place of a linear or a norm.

    It gets and gives the (B, L, E) that it would in `transformers`, with zeros for padding, since it may
    mix tokens; but for what is known to compute each row by itself, of which padding is none.
    """
    if varlen is None:
        return module(x)
    if torch.compiler.is_exporting() or (varlen.rows is not None and _is_row_wise(module)):
        if not any(map(_is_hooked, module.modules())):
            return module(x)
    return varlen.unpad(module(varlen.pad(x)))


def _is_row_wise(module: nn.Module) -> bool:
    """Whether it is a linear, a norm of ours or PEFT's LoRA around a linear, in none of its variants."""
    cls = type(module)
    if "forward" in vars(module):
        return False
    if issubclass(cls, nn.Linear):
        return cls.forward is nn.Linear.forward or _is_quantized(cls)
    return _is_lora(module)


def is_bare_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA around a linear, in none of its variants, and nothing about it is hooked:
    then the parts of weights and adapters give parts of what the wholes would."""
    if not _is_lora(module):
        return False
    called = (part for part in module.modules() if not isinstance(part, nn.ParameterDict))
    return all(map(is_bare, called))


def _is_lora(module: nn.Module) -> bool:
    cls = type(module)
    if (cls.__module__, cls.__qualname__) != ("peft.tuners.lora.layer", "Linear"):
        return False
    base = type(module.get_base_layer())
    return not getattr(module, "lora_variant", None) and (base is nn.Linear or _is_quantized(base))


def _is_quantized(cls: type[nn.Module]) -> bool:
    """Whether it is our quantised linear, whose module is one that asks here for kinds."""
    return (cls.__module__, cls.__qualname__) == ("mllama.quantized_modules", "QuantizedLinear")


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
