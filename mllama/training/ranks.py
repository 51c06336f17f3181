"""The processes of a run: one, or those that torchrun has started."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mllama.checkpoints.placement import resolve_device
from mllama.parallel.group import make_default_group
from mllama.wording import quoted, reason

_T = TypeVar("_T")
# Seconds that ranks wait for one that writes or evaluates more than they do.
_TIMEOUT = 1800.0
_WORD_SECONDS = 2  # for the first rank to say why: the launcher ends it when another has ended


@dataclass(frozen=True)
class TrainingRanks:
    """This process among all of a run.

    Attributes:
        rank: its number.
        size: how many there are.
        device: what it computes on.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def started(cls, device: str | None) -> Iterator[TrainingRanks]:
        """The ranks that the environment tells of, as torchrun writes it, connected while this lasts.

        Args:
            device: cpu, cuda, or with one process a GPU by its number; None: cuda if there is one.
        Raises: ValueError for a device that several processes would share, or that is not there.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
            yield cls(0, 1, resolve_device(chosen, None))
            return
        try:
            place = _own_device(device)
        except ValueError:
            if os.environ.get("RANK") != "0":
                _leave()
            raise
        if os.environ.get("RANK") != "0":
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        is_own = not dist.is_initialized()
        if is_own:
            if place.type == "cuda":
                torch.cuda.set_device(place)
            make_default_group(_TIMEOUT, place.type)
        try:
            yield cls(dist.get_rank(), size, place)
        finally:
            if is_own:
                dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    @property
    def on_this_host(self) -> int:
        """How many of them share the memory of this host."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part, without collectives, that all ranks get through or none.

        Raises: on the first rank its own error, or a ValueError that names the rank that had one; on the
            others SystemExit, with nothing printed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.size > 1:
            said: list[Any] = [None] * self.size
            dist.all_gather_object(said, None if failure is None else reason(failure))
            failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
            if failed and not self.is_first:
                _leave()
            if failed and failure is None:
                raise ValueError(f"rank {failed[0][0]}: {failed[0][1]}")
        if failure is not None:
            raise failure

    def from_first(self, value: _T) -> _T:
        """The value that the first rank gives, on all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, value: float) -> float:
        """The sum of what all ranks give."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def wait(self) -> None:
        """Return once all ranks are here."""
        self.sum(0)


def _own_device(device: str | None) -> torch.device:
    """That of one of several processes."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(
            f"every rank has a device of its own, {quoted(kind)} is one for all: give --device cuda (or "
            "nothing), and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > count:
        raise ValueError(f"{here} ranks on this machine need a GPU each; it has {count}")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _leave() -> NoReturn:
    """End a rank that has nothing to say."""
    time.sleep(_WORD_SECONDS)
    raise SystemExit(1)
