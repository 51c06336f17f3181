"""The command `mllama`, one of whose ranks meets its fate in the middle of a forward. FATE of the environment
is RANK:WHAT: a signal, sleep, poor (of memory, before the forward), or the message of an error."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from mllama.cli import main
from mllama.parallel import room
from mllama.parallel.ranks import Ranks

_SUMS = 5  # that go well before


def _meet(what: str) -> None:
    if what == "poor":
        room.free_bytes = lambda device: 10**6
        return
    count, summed = 0, Ranks.summed

    def sum_or_fail(self: Ranks, x: Any) -> Any:
        nonlocal count
        count += 1
        if count > _SUMS:
            if what.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[what])
            elif what == "sleep":
                time.sleep(600)
            else:
                raise ValueError(what)
        return summed(self, x)

    Ranks.summed = sum_or_fail


if __name__ == "__main__":
    rank, _, what = os.environ.get("FATE", "").partition(":")
    if what and os.environ.get("RANK") == rank:
        _meet(what)
    sys.exit(main())
