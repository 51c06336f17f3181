"""A request's body: counted while it is read, within a time, and JSON of bounded depth and size."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from mllama.engine.interface import Overloaded
from mllama.limits import MIB
from mllama.server.errors import RequestError, json_shown
from mllama.strict_json import parse_json

T = TypeVar("T")

_AT_ONCE = 65536  # bytes that are parsed on the event loop
_JSON = re.compile(r"application/([a-z0-9.+-]+\+)?json", re.IGNORECASE)
_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))


@dataclass(frozen=True)
class BodyBounds:
    """What a body may be.

    Attributes:
        max_keys: entries of all its objects together.
        max_values: commas and brackets outside strings, of which every value but the first needs one.
    """

    max_bytes: int = 32 * MIB
    max_seconds: float = 30.0
    max_depth: int = 64
    max_keys: int = 20_000
    max_values: int = 300_000


class BodyBudget:
    """Bytes of all bodies together: each may be large, and there are many connections."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A request's part: a function that takes bytes, which the end of the context gives back.

        It raises Overloaded where there are no more.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self._held + count > self._max_bytes:
                raise Overloaded(
                    f"the requests that are being answered have {self._held} bytes together; at most "
                    f"{self._max_bytes} are taken"
                )
            taken += count
            self._held += count

        try:
            yield take
        finally:
            self._held -= taken


async def read_body(
    request: Request,
    bounds: BodyBounds,
    take: Callable[[int], None],
    parse: Callable[[dict[str, Any]], T],
) -> T:
    """What `parse` makes of the JSON object that a body is, off the event loop where that takes time.

    Args:
        take: called with the number of bytes of each piece, see `BodyBudget.share`.
    Raises: what `parse` does; otherwise: RequestError; Overloaded; ClientDisconnect where the client is gone.
    """
    _check_head(request, bounds)
    try:
        data = await asyncio.wait_for(_read(request, bounds.max_bytes, take), bounds.max_seconds)
    except asyncio.TimeoutError:
        raise RequestError(
            400,
            f"the body took more than {bounds.max_seconds:g} s to arrive",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None

    def parsed() -> T:
        value = parse_bounded(data, bounds)
        if not isinstance(value, dict):
            raise RequestError(400, f"the body must be a JSON object, got {json_shown(value)}")
        return parse(value)

    if len(data) <= _AT_ONCE:
        return parsed()
    return await asyncio.get_running_loop().run_in_executor(None, parsed)


def parse_bounded(data: bytes, bounds: BodyBounds) -> Any:
    """The value of a JSON text, of which depth and number of values are looked at first.

    Raises: RequestError that says where it is no JSON, or which bound it goes beyond.
    """
    _check_shape(data, bounds)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_json(f"it is not UTF-8 at byte {error.start}") from None
    try:
        return parse_json(text)
    except ValueError as error:
        raise _no_json(str(error)) from None


def _check_head(request: Request, bounds: BodyBounds) -> None:
    # Also where none is given: that is how a page of another origin would ask without being let.
    kind = request.headers.get("content-type")
    if kind is None or not _JSON.fullmatch(kind.split(";")[0].strip()):
        given = "none" if kind is None else json_shown(kind)
        raise RequestError(400, f"the Content-Type must be application/json, got {given}")
    _check_framing(request)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(400, "the body is compressed; expected it without Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > bounds.max_bytes):
        raise _too_large(bounds.max_bytes)


def _check_framing(request: Request) -> None:
    """Raises: RequestError where a proxy in front may have seen another end of the body than is seen here."""
    if "transfer-encoding" not in request.headers:
        return
    if "content-length" in request.headers:
        words = "the request has a Content-Length and a Transfer-Encoding; expected one of them"
    elif request.scope["http_version"] == "1.0":
        words = "a request of HTTP/1.0 has a Transfer-Encoding; expected a Content-Length"
    else:
        return
    raise RequestError(400, words, headers={"Connection": "close"})


async def _read(request: Request, most: int, take: Callable[[int], None]) -> bytes:
    pieces, count = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        count += len(piece)
        if count > most:
            raise _too_large(most)
        take(len(piece))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _check_shape(data: bytes, bounds: BodyBounds) -> None:
    """In steps that each run over all bytes at once: a loop over hostile ones would take seconds."""
    outside = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if outside.count(b'"') > 4 * bounds.max_values:
        raise _beyond("values", bounds.max_values)
    outside = b"".join(outside.split(b'"')[::2])
    if outside.count(b":") > bounds.max_keys:
        raise _beyond("keys", bounds.max_keys)
    brackets = outside.translate(None, _OTHERS)
    if outside.count(b",") + len(brackets) > bounds.max_values:
        raise _beyond("values", bounds.max_values)
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > bounds.max_depth:
            raise _beyond("levels", bounds.max_depth)


def _beyond(what: str, most: int) -> RequestError:
    return RequestError(400, f"the body has too many {what}; at most {most} are taken")


def _too_large(most: int) -> RequestError:
    # The connection stays open: a client that sends all before it reads would not see the answer otherwise.
    return RequestError(
        413, f"the body has more than {most} bytes, which is the most that is taken"
    )


def _no_json(reason: str) -> RequestError:
    return RequestError(400, f"the body is no JSON: {reason}", code="invalid_json")
