"""Names the argument that should have been a tensor, where an op or torch would trip over it in words of
their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# Defaults of arguments that models go by too.
IGNORED = -100  # a label that is no target, as it is to torch
PAD_TO = 8  # the tokens of an image tile are padded with zeros to a multiple of this; they are attended to


class Arguments:
    """What an op takes, by the signature of a function; `op` is its name if that is not the function's."""

    def __init__(self, function: Callable[..., Any], op: str | None = None) -> None:
        self._op = op or function.__name__
        self._signature = inspect.signature(function)
        # Place, name, and whether None may stand there.
        self._tensors = tuple(
            (place, parameter.name, parameter.annotation == "Tensor | None")
            for place, parameter in enumerate(self._signature.parameters.values())
            if parameter.annotation in ("Tensor", "Tensor | None")
        )
        self.lead = self._tensors[0][1]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises: TypeError for what is no tensor and should be one."""
        for place, name, may_be_none in self._tensors:
            if place < len(args):
                value = args[place]
            elif name in kwargs:
                value = kwargs[name]
            else:
                continue
            if not (isinstance(value, Tensor) or (value is None and may_be_none)):
                expected = "a tensor or None" if may_be_none else "a tensor"
                given = "None" if value is None else f"a {type(value).__name__}"
                raise TypeError(
                    f"mllama_kernels.{self._op}: {name} must be {expected}, got {given}"
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
