"""This process and another as the two ranks of models that are split: the other one follows engines."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import mllama

_TO_MEET = 300.0  # seconds that ranks have to start
# Forks a process that has imported torch, which alone takes seconds.
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload([__name__, "mllama.engine.following", "mllama.model"])
_Class = type[mllama.MllamaForCausalLM]


class Pair:
    """Two ranks, of which this process is the first.

    Args:
        folder: for what they exchange.
        seconds: that one waits for the other in a collective of a model.

    Attributes:
        other: the process that is the second.
        model_folder: of the model that was split last.
    """

    def __init__(self, folder: Path, seconds: float = 60) -> None:
        self._folder, self._seconds, self._count = folder, seconds, 0
        self.model_folder: Path | None = None
        self._pipe, theirs = _NURSERY.Pipe()
        self.other = _NURSERY.Process(target=_follow_all, args=(folder, seconds, theirs))
        self.other.start()
        theirs.close()
        _join(folder, 0)

    def split(self, model: Any) -> Any:
        """A copy of a model that is split over both, the second rank following."""
        self._count += 1
        folder = self.model_folder = self._folder / f"model{self._count}"
        model.save_pretrained(folder)
        options = {"semantics": model.semantics, "dtype": model.dtype, "backend": model.backend}
        self._pipe.send((type(model), folder, options))
        copy = _part(self._seconds, type(model), folder, options)
        copy.generation_config = model.generation_config
        return copy

    def ended(self) -> str | None:
        """What a follower raised; None where it came to its end. Waits for one."""
        return self._pipe.recv()

    def close(self) -> None:
        self.other.kill()
        self.other.join()
        dist.destroy_process_group()


@contextmanager
def pair(seconds: float = 60) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as folder:
        made = Pair(Path(folder), seconds)
        try:
            yield made
        finally:
            made.close()


@functools.cache
def shared() -> Pair:
    """One pair for a whole run of tests."""
    context = pair()
    made = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return made


def _join(folder: Path, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_TO_MEET),
    )


def _part(seconds: float, cls: _Class, folder: Path, options: dict[str, Any]) -> Any:
    """Of a model, which has a process group of its own: engines of several may be open at once."""
    wait = timedelta(seconds=seconds)
    group = dist.new_group([0, 1], timeout=wait, use_local_synchronization=True)
    return cls.from_pretrained(folder, tensor_parallel=group, **options)


def _follow_all(folder: Path, seconds: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    _join(folder, 1)

    def run(made: threading.Event, *given: Any) -> None:
        try:
            model = _part(seconds, *given)
            made.set()
            mllama.follow(model)
        except Exception as error:
            pipe.send(str(error))
        else:
            pipe.send(None)

    while True:
        try:
            given = pipe.recv()
        except EOFError:
            return
        made = threading.Event()
        threading.Thread(target=run, args=(made, *given), daemon=True).start()
        made.wait()
