"""How long a run may take, what it is doing now, and whether it was asked to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

QUICK_SECONDS = 300.0


class Budget:
    """The seconds that a run, and within it a part, may still take.

    Args:
        seconds: of the run; infinite: as long as it takes.
    Attributes:
        interrupted: it was asked to stop: what runs is finished, and nothing begins any more.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        self.interrupted = False

    @property
    def limited(self) -> bool:
        return self._end < math.inf

    @property
    def left(self) -> float:
        """Seconds until the run, or the part of it that runs, must have ended."""
        return 0.0 if self.interrupted else max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left <= 0

    @contextmanager
    def share(self, fraction: float) -> Iterator[None]:
        """Within it only this fraction of what is left is left; what it does not take is for the others."""
        whole, now = self._end, time.monotonic()
        self._end = now + fraction * max(0.0, whole - now)
        try:
            yield
        finally:
            self._end = whole

    def say(self, what: str) -> None:
        """One line of progress on stderr: the clock, and what runs."""
        print(self._line(what), file=sys.stderr, flush=True)

    def _line(self, what: str) -> str:
        return f"[{_clock(time.monotonic() - self._begin)}] {what}"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it the first SIGINT or SIGTERM ends the run after the call that runs, a second at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            line = self._line("interrupted: ends after this call; once more ends it at once")
            # Not by print: the signal may have come in the middle of one. Not to descriptor 2, which
            # is another file's where stderr was closed.
            with suppress(AttributeError, OSError, ValueError):
                os.write(sys.stderr.fileno(), f"{line}\n".encode())

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
