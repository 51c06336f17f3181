"""Processes that are the ranks of one process group of gloo, each doing the same check."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mllama.parallel.ranks import Ranks

# Forks a process that has imported torch, which alone takes seconds.
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload([__name__])

ENDED = "ended without a word"


def on_ranks(
    size: int, check: Callable[..., Any], *arguments: Any, seconds: float = 60
) -> list[Any]:
    """What ``check(ranks, *arguments)`` returns on each of so many ranks, the traceback where it raises, and
    `ENDED` where the process ends within it.

    Args:
        check: of a module, gets the ranks before they are told of a device.
        seconds: that one waits for the others in an exchange.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            here, there = _NURSERY.Pipe()
            given = (there, Path(folder, "meeting"), rank, size, seconds, check, arguments)
            process = _NURSERY.Process(target=_be, args=given, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_said(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _said(pipe: Connection) -> Any:
    try:
        assert wait([pipe], 120), "a rank says nothing"
        return pipe.recv()
    except EOFError:
        return ENDED


def _be(
    pipe: Connection,
    meeting: Path,
    rank: int,
    size: int,
    seconds: float,
    check: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    try:
        found = check(Ranks(dist.group.WORLD, rank, size), *arguments)
    except Exception:
        found = traceback.format_exc()
    pipe.send(found)
    with suppress(EOFError):  # others may still read what this one has sent
        pipe.recv()
