"""Work that ends when nobody waits for it: with the client's connection, or with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from mllama.engine.interface import Unavailable

T = TypeVar("T")


class Gate:
    """Whether requests are taken, and how many are being answered."""

    def __init__(self) -> None:
        self.draining = False
        self.running = 0
        self._shut = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> Gate:
        """Raises: Unavailable."""
        if self.draining:
            raise Unavailable("the server is ending and takes no more requests")
        self.running += 1
        self._idle.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take nothing more, and wait for what runs. Returns: whether all of it ended in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            self._shut.set()  # those who wait for the rest get an error
            return False
        return True

    async def shut(self) -> None:
        """Comes back when what runs has to end."""
        await self._shut.wait()


class Watch:
    """Waits for work as long as the client does; a context, which ends what it has begun.

    Args:
        receive: of the request, whose body has been read.
    """

    def __init__(self, receive: Receive, gate: Gate) -> None:
        self._receive = receive
        self._gate = gate

    async def __aenter__(self) -> Watch:
        self._gone = asyncio.ensure_future(self._until_gone())
        self._shut = asyncio.ensure_future(self._gate.shut())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._gone.cancel()
        self._shut.cancel()
        await asyncio.gather(self._gone, self._shut, return_exceptions=True)

    async def until(self, work: Coroutine[Any, Any, T]) -> T:
        """What it gives. Raises: ClientDisconnect or Unavailable, with the work cancelled."""
        task = asyncio.ensure_future(work)
        try:
            waiting = {task, self._gone, self._shut}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if (error := self.error()) and not task.done():
                raise error
            return task.result()
        finally:
            await ended(task)

    def wake(self, event: asyncio.Event) -> None:
        """Set it when there is an error."""
        for task in (self._gone, self._shut):
            task.add_done_callback(lambda _: event.set())

    def error(self) -> Exception | None:
        """Why there is nothing more to wait for. Raises: ClientDisconnect."""
        if self._gone.done():
            raise ClientDisconnect
        if self._shut.done():
            return Unavailable("the server ended before the answer did")
        return None

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def ended(task: asyncio.Future[Any]) -> None:
    """Cancelled, if it still runs, and over."""
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    elif not task.cancelled():
        task.exception()  # somebody has looked at it
