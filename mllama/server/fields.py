"""Kinds of values in a request, and what is wrong with one in a person's words.

A field's description is the end of "expected ..."; the JSON schema of `/openapi.json` shows the same words.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mllama.server.errors import RequestError, json_shown, path_shown

TAG = "#"  # begins the names of a union's alternatives, which are no part of a parameter's name


class Body(BaseModel):
    """An object of a request: what it does not know is left out, what it knows is not converted."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Body)


def _integral(value: Any) -> Any:
    """Some clients write 16 as 16.0; true is no number."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _number(value: Any) -> Any:
    """An integer beyond what a float holds would be an error of Python's."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return math.inf if value > 0 else -math.inf
    return value


Integer = Annotated[int, BeforeValidator(_integral, json_schema_input_type=int)]
Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float)]


def optional(expected: str, **bounds: Any) -> Any:
    """A field that may be left out or null."""
    return Field(default=None, description=expected, **bounds)


def required(expected: str, **bounds: Any) -> Any:
    """A field that has to be there."""
    return Field(description=expected, **bounds)


class Wrong(ValueError):
    """Values that do not fit together, told by a validator.

    Args:
        param: the one to name, below the object that is validated.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def read(model: type[Model], value: Mapping[str, Any]) -> Model:
    """The model of an object. Raises: RequestError naming the first parameter that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(model, error.errors(include_url=False)[0]) from None


def _refusal(model: type[Body], error: Mapping[str, Any]) -> RequestError:
    loc = tuple(part for part in error["loc"] if not str(part).startswith(TAG))
    if error["type"] == "value_error":  # of a validator here, whose words are meant to be shown
        reason = error["ctx"]["error"]
        where = path_shown(loc) or None
        if isinstance(reason, Wrong):
            return RequestError(400, _after(where, reason), param=path_shown((*loc, reason.param)))
        return RequestError(400, _after(where, reason), param=where)
    where = path_shown(loc) or "the body"
    expected, depth = _expected(model, loc)
    if error["type"] == "missing":
        message = f"{where} is missing; expected {expected}"
    elif depth == len(loc):
        message = f"{where} must be {expected}, got {json_shown(error['input'])}"
    else:
        whole = path_shown(loc[:depth]) or "the body"
        message = f"{where} is {json_shown(error['input'])}; expected {whole} to be {expected}"
    return RequestError(400, message, param=path_shown(loc) or None)


def _after(where: str | None, reason: ValueError) -> str:
    return f"{where}: {reason}" if where else str(reason)


def _expected(model: type[Body], loc: tuple[str | int, ...]) -> tuple[str, int]:
    """The description of the innermost field on the way that has one, and how deep that is."""
    words, depth, models = "an object", 0, [model]
    for i, part in enumerate(loc):
        if isinstance(part, int):
            continue
        found = [
            f for m in models for name, f in m.model_fields.items() if part == (f.alias or name)
        ]
        if not found:
            break
        if found[0].description:
            words, depth = found[0].description, i + 1
        models = [m for field in found for m in _models(field.annotation)]
    return words, depth


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated, list, dict, tuple):
        for argument in get_args(annotation):
            yield from _models(argument)
