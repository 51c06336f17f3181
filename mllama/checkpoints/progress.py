"""A progress line on stderr for long loads, rewritten in place; silent if stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_INTERVAL_S = 0.2


class ByteProgress:
    """Counts bytes towards a total; a context manager, `advance(count)` after each piece."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = time.monotonic()
        self._shown = 0.0
        self._active = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> ByteProgress:
        return self

    def advance(self, count: int) -> None:
        """Note that `count` more bytes are done."""
        self._done += count
        now = time.monotonic()
        if self._active and now - self._shown >= _INTERVAL_S:
            self._shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        share = self._done / self._total if self._total else 1.0
        rate = self._done / max(now - self._start, 1e-6)
        bar = "#" * round(20 * share)
        sys.stderr.write(
            f"\r{self._label} [{bar:<20}] {share:4.0%}  "
            f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s "
        )
        sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            self._show(time.monotonic())
            sys.stderr.write("\n")
