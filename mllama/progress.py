"""Progress lines on stderr, rewritten in place; without a terminal nothing, or a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TypeVar

_INTERVAL_S = 0.2
_PLAIN_INTERVAL_S = 30.0  # between the lines of a long run whose stderr is a file

_Self = TypeVar("_Self", bound="_Progress")


class _Progress:
    """Counts towards a total; a context manager, `advance(count)` after each piece."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total = label, total
        self._begin = self._done = done
        self._start = time.monotonic()
        self._shown = 0.0
        self._active = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self: _Self) -> _Self:
        return self

    def advance(self, count: int) -> None:
        """Note that `count` more are done."""
        self._done += count
        now = time.monotonic()
        if self._active and now - self._shown >= _INTERVAL_S:
            self._shown = now
            sys.stderr.write("\r" + self._line(now))
            sys.stderr.flush()

    def _line(self, now: float) -> str:
        share = self._done / self._total if self._total else 1.0
        rate = (self._done - self._begin) / max(now - self._start, 1e-6)
        return f"{self._label} [{'#' * round(20 * share):<20}] {share:4.0%}  {self._detail(rate)} "

    def _detail(self, rate: float) -> str:
        raise NotImplementedError

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            sys.stderr.write("\r" + self._line(time.monotonic()) + "\n")


class ByteProgress(_Progress):
    """Of a long load, in bytes; silent if stderr is no terminal."""

    def _detail(self, rate: float) -> str:
        return f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"


class StepProgress(_Progress):
    """Of a training run, in steps; if stderr is no terminal, a line every half minute.

    Attributes:
        note: what is to be shown besides, such as the latest loss.
    """

    note = ""

    def advance(self, count: int) -> None:
        super().advance(count)
        now = time.monotonic()
        if not self._active and sys.stderr is not None and now - self._shown >= _PLAIN_INTERVAL_S:
            self._shown = now
            print(self._line(now).rstrip(), file=sys.stderr, flush=True)

    def _detail(self, rate: float) -> str:
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else ""
        parts = (f"{self._done}/{self._total} steps", left, self.note)
        return ", ".join(filter(None, parts))
