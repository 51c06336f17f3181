"""Names the argument that should have been a tensor, where an op or torch would trip over it in words of
their own."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mllama_kernels.encodings import INTEGERS

Function = TypeVar("Function", bound=Callable[..., Any])

# What kernels compute in; on a CPU those of plain weights, and plain PyTorch anywhere, in float64 as well.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
# Defaults of arguments that models go by too.
IGNORED = -100  # a label that is no target, as it is to torch
PAD_TO = 8  # the tokens of an image tile are padded with zeros to a multiple of this; they are attended to


class QuantizedWeight:
    """What stands for a weight and is no tensor: `mllama_kernels.quantized_tensor` has the one kind."""


def peft_asks() -> tuple[str, str]:
    """The module and function of PEFT that reads or copies what the caller of this belongs to, or empty
    names.

    PEFT knows no weight that cannot be changed and none whose `data` are codes, and looks at none before it
    begins.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "copy":
        frame = frame.f_back
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    return (module, frame.f_code.co_name) if module.startswith("peft.") else ("", "")


_KINDS = {
    "Tensor": (Tensor,),
    "Tensor | None": (Tensor, type(None)),
    "QuantizedTensor": (QuantizedWeight,),
    "Tensor | QuantizedTensor": (Tensor, QuantizedWeight),
}
_WORDS = {
    "Tensor": "a tensor",
    "Tensor | None": "a tensor or None",
    "QuantizedTensor": "a QuantizedTensor",
    "Tensor | QuantizedTensor": "a tensor or a QuantizedTensor",
}


class Arguments:
    """What an op takes, by the signature of a function; `op` is its name if that is not the function's."""

    def __init__(self, function: Callable[..., Any], op: str | None = None) -> None:
        self._op = op or function.__name__
        self._signature = inspect.signature(function)
        # Place, name, and what may stand there.
        self._tensors = tuple(
            (place, parameter.name, parameter.annotation)
            for place, parameter in enumerate(self._signature.parameters.values())
            if parameter.annotation in _KINDS
        )
        self.lead = self._tensors[0][1]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises: TypeError for what is no tensor and should be one."""
        for place, name, kind in self._tensors:
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            if not isinstance(value, _KINDS[kind]):
                given = "None" if value is None else f"a {type(value).__name__}"
                raise TypeError(
                    f"mllama_kernels.{self._op}: {name} must be {_WORDS[kind]}, got {given}"
                )

    def explain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a failed call. Raises: TypeError if its arguments are the fault: some missing, one too many,
        or no tensor."""
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"mllama_kernels.{self._op}: {error}") from None
        self.check(args, kwargs)


def checked(function: Function) -> Function:
    """The function, looking at its arguments first."""
    arguments = Arguments(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments.check(args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def wrong_dtype(what: str, dtype: Any, taken: tuple[torch.dtype, ...]) -> str | None:
    """What is wrong with a dtype, where it is none of those `taken`."""
    if dtype in taken:
        return None
    *others, last = map(dtype_name, taken)
    return f"{what} must be {', '.join(others)} or {last}, got {dtype_name(dtype)}"


def check_dtype(op: str, what: str, dtype: Any, taken: tuple[torch.dtype, ...]) -> None:
    """Raises: RuntimeError for a dtype that is none of those `taken`."""
    if problem := wrong_dtype(what, dtype, taken):
        raise RuntimeError(f"mllama_kernels.{op}: {problem}")


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def check_activations(
    activations: str | None, encoding: str, wanted: dict[str, Tensor | None]
) -> None:
    """Raises: ValueError for what a projection cannot round x to; RuntimeError for a weight whose codes are
    no integers, and where one of those ``wanted`` wants a gradient, which rounding does not have."""
    if activations is None:
        return
    if activations != "int8":
        raise ValueError(
            'mllama_kernels.quantized_linear: activations must be None or "int8", got '
            f"{activations!r:.60}"
        )
    if encoding not in INTEGERS:
        raise RuntimeError(
            f'mllama_kernels.quantized_linear: activations="int8" has no kernel for {encoding}'
        )
    for name, tensor in wanted.items():
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                'mllama_kernels.quantized_linear: activations="int8" has no gradient, which '
                f"{name} wants"
            )
