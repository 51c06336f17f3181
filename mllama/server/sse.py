"""Server-sent events: data as it comes, a comment where there is none for long, and an end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mllama.server.errors import as_request_error
from mllama.server.watching import Watch, ended

SILENCE = 15.0  # seconds after which a comment says that the connection is alive
_MOST_AHEAD = 64  # events that wait for the client
_DONE = b"data: [DONE]\n\n"
_COMMENT = b": still at it\n\n"


class EventStream(Response):
    """A response whose events are JSON, and [DONE] after the last.

    An error after the first byte is an event {"error": ...}, and the end without [DONE].

    Args:
        events: closed in every case, which has to end the work behind them.
        watch: of the request.
        stack: what is to be left when the stream has ended, the watch's context among it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[Mapping[str, Any]], watch: Watch, stack: AsyncExitStack
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers)
        del self.headers["content-length"]
        self._events = events
        self._watch = watch
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = _Reader(self._events)
        async with self._stack:
            try:
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                async with aclosing(reader.pieces(self._watch)) as pieces:
                    async for data in pieces:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except ClientDisconnect:
                pass  # it is gone, or takes nothing
            finally:
                await reader.close()


class _Reader:
    """Takes events from their source in a task of its own, some ahead, so that a wait costs none for each."""

    def __init__(self, events: AsyncIterator[Mapping[str, Any]]) -> None:
        self._events = events
        self._ready: list[bytes] = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._task = asyncio.ensure_future(self._read())

    async def pieces(self, watch: Watch) -> AsyncGenerator[bytes, None]:
        """What there is to send, as often as there is something. Raises: ClientDisconnect."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        watch.wake(self._news)
        timer = loop.call_later(SILENCE, self._news.set)
        try:
            while True:
                error, is_over = watch.error(), self._task.done()
                if error and not is_over:
                    await ended(self._task)
                    yield b"".join(self._ready) + _last(error)
                    return
                if self._ready:
                    data = b"".join(self._ready)
                    self._ready.clear()
                    self._room.set()
                    yield data
                    last = loop.time()
                    continue
                if is_over:
                    return
                if loop.time() >= last + SILENCE:
                    yield _COMMENT
                    last = loop.time()
                if timer.when() <= loop.time():
                    timer = loop.call_at(last + SILENCE, self._news.set)
                await self._news.wait()
                self._news.clear()
        finally:
            timer.cancel()

    async def close(self) -> None:
        """End the task and what the events come from."""
        await ended(self._task)
        await self._events.aclose()  # type: ignore[attr-defined]

    async def _read(self) -> None:
        try:
            async for event in self._events:
                self._ready.append(event_bytes(event))
                self._news.set()
                if len(self._ready) >= _MOST_AHEAD:
                    self._room.clear()
                    await self._room.wait()
            self._ready.append(_DONE)
        except Exception as error:
            self._ready.append(_last(error))
        finally:
            # Once more when the task is done, which it is not yet.
            asyncio.get_running_loop().call_soon(self._news.set)


def event_bytes(event: Mapping[str, Any]) -> bytes:
    """An event's line; JSON in ASCII has no line end in it."""
    return b"data: " + json.dumps(event, separators=(",", ":")).encode("ascii") + b"\n\n"


def _last(error: Exception) -> bytes:
    return event_bytes(as_request_error(error).body())
