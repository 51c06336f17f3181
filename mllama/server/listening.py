"""The listener: limits of connections, and an end that lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mllama.server.errors import RequestError
from mllama.server.protocol import Engine
from mllama.server.settings import Settings

_LOOK = 0.5  # seconds between two looks at the engine
_FULL = RequestError(503, "the server has too many connections; try again in a second")


def serve(app: FastAPI, engine: Engine, settings: Settings, listens: Callable[[str], None]) -> int:
    """Answer until a signal comes or the engine is dead.

    Args:
        listens: called with the address as soon as there is one that is listened on.
    Returns: the exit code of the process.
    """
    server = _Server(configuration(app, settings), engine, settings, listens)
    asyncio.run(server.serve())
    return 1 if server.failed else 0


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
        h11_max_incomplete_event_size=65536,
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


def _limited_protocol(settings: Settings) -> type[asyncio.Protocol]:
    body = _FULL.response().body
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    full = head.encode("ascii") + body

    class Limited(H11Protocol):
        """Closes a connection that is one too many, or on which no request begins in time."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(full)
                transport.close()
            else:
                self._wait_for_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._timer is not None:
                self._timer.cancel()

        def _wait_for_head(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(settings.head_seconds, self._look_for_head)

        def _look_for_head(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Limited
