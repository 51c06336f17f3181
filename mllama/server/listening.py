"""The listener: limits of connections, and an end that lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mllama.server.errors import RequestError
from mllama.server.protocol import Engine
from mllama.server.settings import Settings

_BACKLOG = 2048  # connections that wait to be taken
_LOOK = 0.5  # seconds between two looks at the engine
_LONGEST_HEAD = 65536  # bytes
_OTHER_FILES = 512  # beside the connections: weights, libraries, pipes, pictures from a network
_FULL = RequestError(
    503,
    "the server has too many connections; try again in a second",
    headers={"Retry-After": "1"},
)
_UNREADABLE = RequestError(
    400, f"the request is no HTTP, or its head has more than {_LONGEST_HEAD} bytes"
)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of a host, under one port.

    Raises: OSError naming an address that cannot be listened on.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4][:2]) for entry in found):
            at = sockets[0].getsockname()[1] if sockets else port
            with contextlib.suppress(_NotHere):
                sockets.append(_listener(family, address[0], at))
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror}") from None
    if not sockets:
        raise OSError(f"{host}:{port} cannot be listened on: it is no address of this machine")
    return sockets


class _NotHere(Exception):
    """An address of a name that this machine has not, as ::1 where there is no IPv6."""


def _listener(family: int, host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NotHere from None
        raise


def serve(
    app: FastAPI,
    engine: Engine,
    settings: Settings,
    sockets: list[socket.socket],
    listens: Callable[[str], None],
) -> int:
    """Answer until a signal comes or the engine is dead.

    Args:
        sockets: see :func:`bind`.
        listens: called with the address as soon as there is one that is listened on.
    Returns: the exit code of the process.
    """
    _allow_files(settings.max_connections + _OTHER_FILES)
    server = _Server(configuration(app, settings), engine, settings, listens)
    asyncio.run(server.serve(sockets))
    return 1 if server.failed else 0


def _allow_files(count: int) -> None:
    """Let the process open as many: the usual 1024 are fewer than a full server's connections, and one that
    cannot be accepted would wait without an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def configuration(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Of a listener that is in no hurry to trust anybody."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="asyncio",
        http=_limited_protocol(settings),
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        timeout_graceful_shutdown=2,
    )


class _Server(uvicorn.Server):
    """Handles signals itself: uvicorn raises them again, which would be the process's exit code."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        settings: Settings,
        listens: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._listens = listens
        self.failed = False
        self._engine = engine
        self._settings = settings
        self._gate = config.app.state.gate
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._listens(f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        look = loop.create_task(self._until_dead())
        try:
            yield
        finally:
            look.cancel()
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is not None:
            os._exit(1)  # the second signal: at once, whatever hangs
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self._gate.drain(self._settings.drain_seconds)
        self.should_exit = True

    async def _until_dead(self) -> None:
        while self._engine.health() != "dead":
            await asyncio.sleep(_LOOK)
        self.failed = True
        await self._drain()


def _as_bytes(error: RequestError) -> bytes:
    """The response on a connection that is closed behind it."""
    response = error.response()
    response.headers["Connection"] = "close"
    reason = http.HTTPStatus(error.status).phrase
    lines = [f"HTTP/1.1 {error.status} {reason}".encode("ascii")]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def _limited_protocol(settings: Settings) -> type[asyncio.Protocol]:
    full, unreadable = _as_bytes(_FULL), _as_bytes(_UNREADABLE)

    class Limited(H11Protocol):
        """Closes a connection that is one too many, on which no request begins in time, or whose client takes
        nothing of what it is sent."""

        _head_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(full)
                transport.close()
            self._wait_for_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._head_timer, self._reader_timer):
                if timer is not None:
                    timer.cancel()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader_timer = self.loop.call_later(settings.reader_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader_timer is not None:
                self._reader_timer.cancel()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(unreadable)
            self.transport.close()

        def _wait_for_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
            self._head_timer = self.loop.call_later(settings.head_seconds, self._look_for_head)

        def _look_for_head(self) -> None:
            if self.transport.is_closing():  # and its client does not take the rest
                self.transport.abort()
            elif self.cycle is None or self.cycle.response_complete:
                self.transport.close()
                self._wait_for_head()

    return Limited
