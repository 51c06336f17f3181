"""The default process group of the ranks, and how they meet outside of collectives and part."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = (
    120.0  # seconds that a rank waits for the others in a collective, where nobody says otherwise
)
_LOOK = 0.05  # seconds between two looks at what the others have done


def make_default_group(timeout: float = TIMEOUT, device: str | None = None) -> dist.Store:
    """Join the group of all ranks that the environment describes, as `torchrun` writes it: gloo between CPUs,
    and NCCL between GPUs.

    Args:
        timeout: seconds after which a collective that some rank does not come to fails on the others.
        device: of each rank, "cpu" or a GPU; None: a GPU where there are any.
    Returns: what the ranks have met through.
    Raises: ValueError where the environment says no address; RuntimeError where some rank does not come.
    """
    wait = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=wait))
    has_gpu = torch.cuda.is_available() if device is None else device != "cpu"
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait
    )
    return store


class Meeting:
    """All ranks, outside of collectives: here they may wait for the first without a limit.

    Args:
        timeout, device: see :func:`make_default_group`.
    """

    def __init__(self, timeout: float, device: str) -> None:
        self._store = dist.PrefixStore("meeting", make_default_group(timeout, device))
        self._timeout, self._said = timeout, 0

    def of_first(self, say: Callable[[], str]) -> str:
        """A text that the first rank makes, on all of them; they wait for as long as that takes."""
        key = f"said/{self._said}"
        self._said += 1
        if dist.get_rank() == 0:
            text = say()
            self._store.set(key, json.dumps(text))
            return text
        while not self._store.check([key]):
            time.sleep(_LOOK)
        return json.loads(self._store.get(key))

    def leave(self) -> None:
        """Wait until all are done, since a socket that closes takes along what the other has not read."""
        end = time.monotonic() + self._timeout
        with suppress(dist.DistError):  # whoever started the ranks is gone
            self._store.add("done", 1)
            while self._store.add("done", 0) < dist.get_world_size() and time.monotonic() < end:
                time.sleep(_LOOK)
        dist.destroy_process_group()
