"""Errors in the form that clients of OpenAI read, whatever raised them.

A message says what was given and what is expected, in words of JSON; it holds no path, no traceback and
nothing that Python prints of an object.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mllama.engine.interface import Overloaded, Refused, Unavailable, WorkFailed
from mllama.wording import shown

_LOG = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "server_overloaded",
    500: "internal_error",
    503: "server_unavailable",
}
_INTERNAL = "the server failed at this request; its log says how"
_LONGEST = 80  # characters of a value that a message shows


class RequestError(Exception):
    """A refusal with its status.

    Args:
        param: the parameter at fault, as "messages[0].content".
        code: a word for programs; None: the status' own.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status, "invalid_request")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        if self.status > 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def as_request_error(error: BaseException) -> RequestError:
    """The refusal that an exception stands for; what none was meant for is logged and told as a 500."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, Refused):
        return RequestError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, Overloaded):
        seconds = str(max(1, math.ceil(error.retry_seconds)))
        return RequestError(429, str(error), headers={"Retry-After": seconds})
    if isinstance(error, Unavailable):
        return RequestError(503, str(error), headers={"Retry-After": "1"})
    if isinstance(error, WorkFailed):
        return RequestError(500, str(error), code="generation_failed")
    _LOG.error("a request failed", exc_info=error)
    return RequestError(500, _INTERNAL)


def json_shown(value: Any) -> str:
    """A value in the words of JSON: itself, its beginning and length, or what kind of value it is."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    if isinstance(value, (list, tuple)):
        return f"an array of {len(value)} {'value' if len(value) == 1 else 'values'}"
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{json.dumps(shown(value[:_LONGEST]))}... ({len(value)} characters)"
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 77 digits"
    if value is None or isinstance(value, (str, int, float)):
        return json.dumps(value, ensure_ascii=False)
    return "a value that is none of JSON"


def path_shown(parts: tuple[str | int, ...]) -> str:
    """("messages", 0, "content") as "messages[0].content"."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + shown(part[:_LONGEST])
    return text


def install(app: FastAPI) -> None:
    """Give every error of the application, its framework's own too, the one form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_request_error(error).response()

    async def from_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _of_framework(request, error).response()

    async def from_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        where = path_shown(tuple(found[0]["loc"][1:])) if found else ""
        given = f", got {json_shown(found[0].get('input'))}" if found else ""
        message = f"{where or 'the request'} is not what this route takes{given}"
        return RequestError(400, message, param=where or None).response()

    for kind in (RequestError, Refused, Overloaded, Unavailable, WorkFailed, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, from_framework)
    app.add_exception_handler(RequestValidationError, from_validation)


def _of_framework(request: Request, error: HTTPException) -> RequestError:
    path, method = shown(request.url.path), shown(request.method)
    if error.status_code == 404:
        message = f"there is no {path} here; /openapi.json lists the routes"
        return RequestError(404, message)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path} does not take {method}; it takes {allowed or 'other methods'}"
        return RequestError(405, message, headers=error.headers)
    status = error.status_code if error.status_code in _CODES else 400
    return RequestError(status, "the request cannot be read", headers=error.headers)
