"""An engine that is made while the server listens already, and answers that it is loading."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable

from mllama.engine.interface import Piece, State, Stats, Unavailable
from mllama.server.protocol import Engine, Work


class Deferred:
    """Stands for an engine that a thread makes.

    Args:
        make: what makes it. Where that fails the engine is dead, and `error` says why.
        ready: called when it is made.
    """

    def __init__(self, make: Callable[[], Engine], ready: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._engine: Engine | None = None
        self._make, self._ready = make, ready
        threading.Thread(target=self._run, name="mllama-loading", daemon=True).start()

    def _run(self) -> None:
        try:
            self._engine = self._make()
        except BaseException as error:
            self.error = error
        else:
            self._ready()

    async def submit(self, work: Work) -> AsyncIterator[Piece]:
        """See `protocol.Engine`."""
        if self._engine is None:
            raise Unavailable("the model is being loaded")
        return await self._engine.submit(work)

    def cancel(self, key: str) -> None:
        """See `protocol.Engine`."""
        if self._engine is not None:
            self._engine.cancel(key)

    def health(self) -> State:
        """See `protocol.Engine`."""
        if self.error is not None:
            return "dead"
        return "loading" if self._engine is None else self._engine.health()

    def stats(self) -> Stats:
        """See `protocol.Engine`."""
        return Stats() if self._engine is None else self._engine.stats()
