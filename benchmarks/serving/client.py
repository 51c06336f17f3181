"""A small client of chat completions that notes when each piece of an answer arrives.

It reads plain HTTP/1.1 itself and looks into the events only after the end, so that of the time between
two pieces little is its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 600.0


class RequestFailed(RuntimeError):
    """A request that was not answered; the message has the status and what the server said."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        text: all of it.
        tokens: how many the server counted.
        begin, end: seconds of the clock before the request was sent, and when its end was read.
        arrivals: seconds of the clock for each piece of text.
        finish_reason: of the last event that has one.
    """

    text: str
    tokens: int
    begin: float
    end: float
    arrivals: tuple[float, ...]
    finish_reason: str

    @property
    def first_token(self) -> float:
        """Seconds from the request to the first piece of text."""
        return self.arrivals[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces that follow one another."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:])]


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """Stream one chat completion from a server on this machine.

    Raises: RequestFailed; TimeoutError after ANSWER_SECONDS.
    """
    data = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return await asyncio.wait_for(_ask(port, head.encode() + data), ANSWER_SECONDS)


async def together(port: int, bodies: Sequence[dict[str, Any]], streams: int) -> list[Answer]:
    """Answers to all, with so many requests open at a time; the next is sent when one has ended."""
    waiting, answers = iter(list(enumerate(bodies))), dict[int, Answer]()

    async def stream() -> None:
        for number, body in waiting:
            answers[number] = await ask(port, body)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return [answers[number] for number in range(len(bodies))]


async def _ask(port: int, request: bytes) -> Answer:
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        status, is_chunked = await _read_head(reader)
        if status != 200 or not is_chunked:
            said = (await reader.read())[:500].decode(errors="replace")
            raise RequestFailed(f"status {status}: {said}")
        events = await _read_events(reader)
    finally:
        writer.close()
    return _answer(begin, time.perf_counter(), events)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return int(head.split(b" ", 2)[1]), b"transfer-encoding: chunked" in head


async def _read_events(reader: asyncio.StreamReader) -> list[tuple[float, bytes]]:
    """The data of each event with the time at which its end was read."""
    events, rest = [], b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        now = time.perf_counter()
        *whole, rest = rest.split(b"\n\n")
        events += [(now, event.removeprefix(b"data: ")) for event in whole]
    return events


def _answer(begin: float, end: float, events: Sequence[tuple[float, bytes]]) -> Answer:
    """Raises: RequestFailed for a stream that does not end as it should."""
    text, arrivals, tokens, reason = "", [], None, None
    for moment, event in events:
        if event == b"[DONE]" or event.startswith(b":"):
            continue
        found = json.loads(event)
        if "error" in found:
            raise RequestFailed(f"the stream ended with {found['error']}")
        tokens = (found.get("usage") or {}).get("completion_tokens", tokens)
        for choice in found.get("choices", ()):
            if piece := choice["delta"].get("content"):
                text += piece
                arrivals.append(moment)
            reason = choice.get("finish_reason") or reason
    if tokens is None or reason is None or not arrivals:
        raise RequestFailed(f"an answer without usage, reason or text: {events[-2:]}")
    return Answer(text, tokens, begin, end, tuple(arrivals), reason)
