"""To whom arguments can be handed that `transformers` does not know: masks in a form of ours.

They travel by keyword from the module that knows what a call is about to the layers that use it, through
forwards of `transformers` that pass them on. Code of others must not come upon them: a hook that is given
keyword arguments, a `forward` or a class of its own. Where there is any on their way, they stay at home, and
everyone gets what `transformers` gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks_with_kwargs, _has_any_global_hook

from mllama_kernels.transformers.patch import patch_of, replaced_by_others
from mllama_kernels.transformers.wrappers import class_of


def is_watched(module: nn.Module) -> bool:
    """Whether code of others is given the keyword arguments of the module's calls, or may change them."""
    state = vars(module)
    if (
        state["_forward_hooks_with_kwargs"]
        or state["_forward_pre_hooks_with_kwargs"]
        or "_hf_hook" in state
    ):
        return _is_watched_by_others(module)
    return bool(_global_forward_hooks_with_kwargs)


def _is_watched_by_others(module: nn.Module) -> bool:
    """FSDP2 and device maps pass on what they are given, on the right device and in the right dtype."""
    hooks = [module._forward_hooks[n] for n in module._forward_hooks_with_kwargs]
    hooks += [module._forward_pre_hooks[n] for n in module._forward_pre_hooks_with_kwargs]
    if not all(_is_of(hook, "torch.distributed.") for hook in hooks):
        return True
    mover = vars(module).get("_hf_hook")
    movers = [] if mover is None else getattr(mover, "hooks", [mover])
    return not all(_is_of(type(mover), "accelerate.") for mover in movers)


def _is_of(thing: Any, package: str) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(package)


def is_only_moved(module: nn.Module) -> bool:
    """Whether a device map, and nothing else, has come between the module's call and its own forward."""
    state = vars(module)
    return "_hf_hook" in state and not (
        is_watched(module)
        or replaced_by_others(module)
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or _has_any_global_hook()
    )


def passes_on(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether a module of these classes, in its own forward or in ours, is all that is given the keyword
    arguments of its call. Wrappers of torch.distributed are looked through."""
    while not is_watched(module):
        cls = class_of(module)
        if cls in classes:
            return not replaced_by_others(module)
        if cls is not nn.Module or type(module) is nn.Module:
            return False
        module = next(module.children())
    return False


def gets_to(module: nn.Module, function: Callable[..., Any] | None = None) -> bool:
    """Whether a function of ours, any or this one, is all that is given the keyword arguments of the
    module's call."""
    while not is_watched(module):
        patch = patch_of(module)
        if patch is not None:
            return patch.serves() and function in (None, patch.function)
        if class_of(module) is not nn.Module or type(module) is nn.Module:
            return False
        module = next(module.children())
    return False
