"""The rule for what may be bypassed: a module is called unless it is exactly the plain thing.

An op that fuses several modules reads their parameters and calls none of them. That is right only where
calling a module would have done nothing else, which :func:`is_plain` answers, for every module and every
call; where it says no, the module is called and the fusion around it is given up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

# The forward of each class that was found to be the one written in it.
_WRITTEN: dict[type[nn.Module], Callable[..., Any]] = {}
_CALL = nn.Module._call_impl


class StandIn:
    """What this package itself sets as `forward` of a module: it computes what the class's would."""


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling ``module`` is the forward of one of ``classes`` on plain parameters, and nothing else.

    Not so, and the module has to be called:

    - another class, a subclass too: adapters, quantised and sharded layers, parametrizations;
    - hooks, of the module or of all modules: forward and backward, before and after;
    - a `forward` set on the instance, as offloading and other patches do, or on its class; another
      `__call__`; a module compiled by itself;
    - parameters that are more than a tensor: subclasses of it dispatch as they like.

    What a module inside it is, is a question of its own.
    """
    cls = type(module)
    if cls not in classes or not is_bare(module):
        return False
    if _WRITTEN.get(cls) is not cls.forward and not _has_written_forward(cls):
        return False
    for parameter in vars(module)["_parameters"].values():
        if type(parameter) is not nn.Parameter and parameter is not None:
            if type(parameter) is not Tensor:
                return False
    return True


def is_bare(module: nn.Module) -> bool:
    """Whether a call gets straight to the forward of the module's class, or to a stand-in of ours."""
    state, cls = vars(module), type(module)
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _has_any_global_hook()
        or ("forward" in state and not _is_own(state["forward"], module))
        or cls.__call__ is not nn.Module._wrapped_call_impl
        or cls._call_impl is not _CALL
        or state.get("_compiled_call_impl") is not None
        or "_call_impl" in state
    )


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether a `forward` set on an instance is a stand-in of ours or the method of its class, which
    whoever takes a patch out may leave there."""
    if isinstance(forward, StandIn):
        return True
    method = type(module).forward
    return (
        getattr(forward, "__func__", None) is method
        and getattr(forward, "__self__", None) is module
    )


def _has_written_forward(cls: type[nn.Module]) -> bool:
    """Whether a class has the forward that was written in it or in a base, and no decorator around it."""
    forward = cls.forward
    written = [(base.__module__, f"{base.__qualname__}.forward") for base in cls.__mro__]
    name = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    if name not in written or hasattr(forward, "__wrapped__"):
        return False
    _WRITTEN[cls] = forward
    return True
