"""What a captured decode step has baked in, to tell whether it may be replayed."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from mllama.stores import KeyValueStore

# Compared as they are, and kept alive by the fingerprint: the identity of a number or function that
# has gone may come back with another one.
_HELD = frozenset(
    (bool, int, float, str, type(None))
    + (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
)


def fingerprint(model: Any, store: KeyValueStore) -> list[Any]:
    """Equal, for one model and the store of a captured step, as long as its replay does what it would.

    A graph repeats the launches of one step: the same kernels with the same scalars at the same
    addresses. So this covers

    - the tensors of ``store``, and all parameters and buffers of the model: address, shape, strides and
      type, so what is moved or replaced counts, and new values in place do not;
    - every module a step may run, by its class, its identity and each of its attributes: hooks, a
      forward of its own, train or eval, adapters and their settings, epsilons. Numbers, strings and
      functions count by value, also in lists and dicts; other objects by identity, whatever happens
      inside them;
    - the ops and what is global: hooks on all modules, autocast, the precision of matrix products.

    A hook or another piece of Python runs when a step is captured, not when it is replayed.

    Takes a few milliseconds for the 11B model: one pass over the modules without the vision tower,
    which no step runs.
    """
    marks: list[Any] = [addresses(store)]
    marks += vars(model.ops).values()
    marks += _global_settings(store.page_values.device.type)
    modules = [model]
    while modules:
        module = modules.pop()
        marks += (type(module), id(module))
        for value in vars(module).values():
            if not isinstance(value, dict):
                marks.append(_mark(value))
            elif value:  # parameters, children, hooks, most of them empty
                marks += value
                marks += map(_mark, value.values())
        modules += (child for name, child in module.named_children() if name != "vision_model")
    return marks


def addresses(store: KeyValueStore) -> Any:
    """Where the tensors of a store are."""
    return _mark(store.page_values), _mark(store.tile_values)


def _mark(value: Any) -> Any:
    if type(value) in _HELD:
        return value
    if type(value) in (Tensor, torch.nn.Parameter):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, Tensor):
        return object()  # where the values of another kind of tensor lie is not known: never equal
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    return id(value)


def _global_settings(device_type: str) -> tuple[Any, ...]:
    return (
        *torch_module._global_forward_pre_hooks,
        *torch_module._global_forward_hooks,
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )
