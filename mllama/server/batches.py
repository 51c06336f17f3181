"""Files of requests in OpenAI's batch format, answered by the application itself, without a network.

A line asks, {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}, and a line answers, as
soon as there is all of it: {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}.
What the server would refuse has its status and body there. A line that is no request has no response but an
error with the line's number.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from fastapi import FastAPI

from mllama.files import FileRefused, open_regular
from mllama.json_lines import lines_of, read_lines
from mllama.server.errors import json_shown
from mllama.strict_json import parse_json
from mllama.wording import shown

URLS = ("/v1/chat/completions", "/v1/completions")
# Of a line beside the body: names and numbers.
_ENVELOPE = 2**16
_LONGEST_ID = 512  # characters


@dataclass(frozen=True)
class Ask:
    """A line that is a request."""

    line: int
    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Wrong:
    """A line that is none, and why."""

    line: int
    custom_id: str | None
    reason: str


def read_batch(path: Path, max_body: int) -> Iterator[Ask | Wrong]:
    """What each line of a file is, blank ones left out.

    Args:
        max_body: bytes of a request.
    Raises: ValueError naming a file that cannot be read.
    """
    try:
        with open_regular(path) as file:
            yield from asked_in(file, max_body)
    except (FileRefused, OSError) as error:
        raise ValueError(f"{shown(str(path))} cannot be read: {error}") from None


def asked_in(file: BinaryIO, max_body: int) -> Iterator[Ask | Wrong]:
    """As :func:`read_batch`, of a file that is open at its beginning."""
    known: dict[str, int] = {}
    for number, line in enumerate(lines_of(file, max_body + _ENVELOPE), start=1):
        if line is not None and not line.strip():
            continue
        custom_id = None
        try:
            entry = _entry(line, max_body)
            custom_id = _custom_id(entry)
            if (before := known.setdefault(custom_id, number)) != number:
                raise ValueError(f"custom_id {json_shown(custom_id)} is that of line {before}, too")
            yield Ask(number, custom_id, *_request(entry))
        except ValueError as error:
            yield Wrong(number, custom_id, f"line {number}: {error}")


def answered(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an earlier output whose requests were answered, by their custom_id; what was cut off by a
    kill is none of them.

    Raises: ValueError naming a file that cannot be read, or is no such output.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        for number, line in enumerate(read_lines(path, 2**62), start=1):
            if line is None or not line.endswith(b"\n"):
                continue
            try:
                entry = parse_json(line.decode("utf-8"))
                if is_answered(entry):
                    found[entry["custom_id"]] = entry
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f"line {number} is not one of an output") from None
    except (FileRefused, ValueError) as error:
        raise ValueError(f"{shown(str(path))} cannot be gone on with: {error}") from None
    return found


def is_answered(entry: Mapping[str, Any]) -> bool:
    """Whether a line of an output has what its request asked for."""
    return (entry["response"] or {}).get("status_code") == 200


async def answer_batch(
    app: FastAPI,
    lines: Iterable[Ask | Wrong],
    write: Callable[[dict[str, Any]], None],
    at_once: int,
) -> None:
    """Answer lines, and write the lines that answer them, each as soon as there is all of it.

    Args:
        app: of `app.create_app`, without keys.
        at_once: requests that are open.
    Raises: RuntimeError where the engine has failed.
    """
    transport, waiting = httpx2.ASGITransport(app, raise_app_exceptions=False), iter(lines)
    client = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None)

    async def work() -> None:
        for line in waiting:
            write(_not_asked(line) if isinstance(line, Wrong) else await _answer(client, line))
            await asyncio.sleep(0)

    async with client:
        tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(client: httpx2.AsyncClient, ask: Ask) -> dict[str, Any]:
    content, headers = json.dumps(ask.body).encode(), {"Content-Type": "application/json"}
    while True:
        got = await client.post(ask.url, content=content, headers=headers)
        if got.status_code != 429:
            break
        # Others that are open take what there is for all: they end.
        await asyncio.sleep(float(got.headers.get("Retry-After", 1)))
    if got.status_code == 503:
        raise RuntimeError(got.json()["error"]["message"])
    response = {
        "status_code": got.status_code,
        "request_id": f"req_{uuid.uuid4().hex}",
        "body": got.json(),
    }
    return _line(ask.custom_id, response, None)


def _not_asked(wrong: Wrong) -> dict[str, Any]:
    error = {"code": "invalid_line", "message": wrong.reason, "param": None, "line": wrong.line}
    return _line(wrong.custom_id, None, error)


def _line(custom_id: str | None, response: Any, error: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }


def _entry(line: bytes | None, max_body: int) -> Mapping[str, Any]:
    if line is None:
        raise ValueError(f"it has more than the {max_body} bytes that a request may have")
    try:
        entry = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {json_shown(entry)}")
    return entry


def _custom_id(entry: Mapping[str, Any]) -> str:
    if "custom_id" not in entry:
        raise ValueError("custom_id is missing; expected a string that no other line has")
    value = entry["custom_id"]
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID:
        raise ValueError(
            f"custom_id must be a string of 1 to {_LONGEST_ID} characters, got {json_shown(value)}"
        )
    return value


def _request(entry: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The url and the body."""
    for name, values in (("method", ("POST",)), ("url", URLS)):
        if (value := entry.get(name)) not in values:
            raise ValueError(f"{name} must be {' or '.join(values)}, got {json_shown(value)}")
    body = entry.get("body")
    if not isinstance(body, dict):
        raise ValueError(f"body must be an object, got {json_shown(body)}")
    if body.get("stream"):
        raise ValueError("body.stream asks for a stream; expected none, an answer is a line")
    return entry["url"], body
