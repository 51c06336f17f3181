"""This process as one of several ranks that `torchrun`, or a module beside this one, has started."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from mllama.wording import quoted

# The process that has started the ranks, where that is ours; it looks at what they report.
LAUNCHER = "MLLAMA_LAUNCHER"
# Where a rank says why it failed: of torch's launchers.
REPORT = "TORCHELASTIC_ERROR_FILE"
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where they meet


@dataclass(frozen=True)
class Member:
    """A rank.

    Attributes:
        rank: among all, of which there are ``size``.
        local_rank: among those of this machine, of which there are ``local_size``.
        is_ours: whether `parallel/launch.py` or `parallel/beside.py` has started it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    is_ours: bool

    @classmethod
    def of_environment(cls) -> Member | None:
        """What the environment says; None for a process by itself. Raises: ValueError for a part of it."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        texts = [os.environ.get(name) for name in _NAMES]
        if missing := [name for name in (*_NAMES, *_ADDRESS) if name not in os.environ]:
            raise ValueError(
                f"the environment has WORLD_SIZE={quoted(texts[1])}, but no {' and no '.join(missing)}: "
                "start the ranks with torchrun, or unset WORLD_SIZE"
            )
        if not all(text is not None and text.isdecimal() for text in texts):
            values = ", ".join(f"{name}={quoted(text)}" for name, text in zip(_NAMES, texts))
            raise ValueError(f"the environment must number the ranks, got {values}")
        rank, size, local_rank, local_size = (int(text or 0) for text in texts)
        if not (rank < size and local_rank < local_size <= size):
            raise ValueError(
                f"the environment has rank {rank} of {size}, and {local_rank} of {local_size} on this "
                "machine: ranks are numbered from 0; start them with torchrun, or unset WORLD_SIZE"
            )
        is_ours = os.environ.get(LAUNCHER) == str(os.getppid())
        return cls(rank, size, local_rank, local_size, is_ours)

    def end_with_parent(self) -> None:
        """Let the kernel end this process as soon as the one that has started it is gone, however that is.

        Of Linux, and of a parent that is known to be torch's launcher or ours.
        """
        launcher = os.environ.get(LAUNCHER)
        if sys.platform != "linux" or not (launcher or _OF_TORCHRUN in os.environ):
            return
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if launcher is not None and not self.is_ours:
            os._exit(1)  # it has gone already

    def keep_quiet(self) -> None:
        """Leave printing and reading to the first rank. What is written to the file of stderr beside Python's
        own, as by a crash, is still seen."""
        if self.rank == 0:
            return
        null = os.open(os.devnull, os.O_RDWR)
        sys.stdout.flush()
        for standard in (0, 1):
            os.dup2(null, standard)
        sys.stderr = os.fdopen(null, "w", encoding="utf-8")

    def fail(self, code: int, reason: str, text: str, errors: TextIO) -> NoReturn:
        """End this process without waiting for others, who may wait for it, and say why.

        Args:
            code: to exit with.
            reason: for the launcher, in whose form it is reported; empty where nobody is to be told.
            text: for a person, to whom our launcher speaks for all ranks.
            errors: where that goes otherwise.
        """
        if path := os.environ.get(REPORT):
            extra = {"py_callstack": reason, "timestamp": str(int(time.time()))}
            report = {"message": {"message": reason, "extraInfo": extra}}
            Path(path).write_text(json.dumps(report), encoding="utf-8")
        if text and (not reason or not self.is_ours):
            print(text, file=errors, flush=True)
        with suppress(OSError):  # whoever reads it may have gone
            sys.stdout.flush()
        os._exit(code)


def reported(path: str) -> tuple[str | None, float | None]:
    """What a rank has reported there, and when; None if it has not."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))["message"]["message"]
        return report, os.stat(path).st_mtime
    except (OSError, ValueError):
        return None, None
