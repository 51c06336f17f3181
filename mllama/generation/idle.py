"""Caches of finished calls, kept with the decode steps captured on them for later calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mllama.cache import PAGE_SIZE, MllamaCache
from mllama.generation.sampling import SamplingConfig


class Bucket(NamedTuple):
    """What calls have in common that can replay one captured step.

    capacity: tokens per row there is room for.
    tiles: per row, of all images.
    is_masked: whether the prompt says which tiles a token sees.
    stream: the work of two calls is in order on one.
    inference_mode: its tensors are of another kind.
    """

    batch_size: int
    capacity: int
    tiles: int
    is_masked: bool
    sampling: SamplingConfig
    device: torch.device
    dtype: torch.dtype
    stream: int
    inference_mode: bool


def rounded_capacity(tokens: int) -> int:
    """Room for ``tokens``: pages rounded up to a power of two.

    No result depends on the rounding: the splits of decode attention change at powers of two alone
    (csrc/cuda/attention/decode.h).
    """
    pages = -(-tokens // PAGE_SIZE)
    return PAGE_SIZE * 2 ** (pages - 1).bit_length()


class IdleCaches:
    """The caches of a model that no call is using, each with the step captured on it.

    They take at most a sixteenth of the device's memory together, or there is only one; the least
    recently used goes first. Before a call makes a new cache, one that is larger than that goes as
    well, so that calls need at most that sixteenth more than without.

    Copying or pickling gives an empty one.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Bucket, MllamaCache]] = []  # the last is the latest used
        # Reentrant, since the garbage collector may close a suspended stream() anywhere.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[IdleCaches], tuple[()]]:
        return IdleCaches, ()

    def clear(self) -> None:
        """Free all; those in use are not kept either when their calls end."""
        with self._lock:
            self._entries = []

    def has(self, bucket: Bucket) -> bool:
        """Whether there is one that a call of this kind can take."""
        with self._lock:
            return any(entry[0] == bucket for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Of the caches that are kept, which a call that needs the room frees."""
        with self._lock:
            return sum(cache.nbytes for _, cache in self._entries)

    @contextmanager
    def lend(self, bucket: Bucket, make: Callable[[], MllamaCache]) -> Iterator[MllamaCache]:
        """A cache of ``bucket`` for one call, empty, and nobody else's meanwhile.

        It is kept when the call has ended as planned or its generator was closed, if a step was
        captured. After another exception it is dropped: it may be half updated.
        """
        entries = self._entries
        cache = self._take(bucket) or make()
        try:
            yield cache
        except GeneratorExit:  # between two steps
            self._keep(entries, bucket, cache)
            raise
        self._keep(entries, bucket, cache)

    def _take(self, bucket: Bucket) -> MllamaCache | None:
        with self._lock:
            found = next((e for e in reversed(self._entries) if e[0] == bucket), None)
            if found is None:
                self._shrink(least=0)
                return None
            self._entries.remove(found)
        cache = found[1]
        cache.reset()
        return cache

    def _keep(
        self, entries: list[tuple[Bucket, MllamaCache]], bucket: Bucket, cache: MllamaCache
    ) -> None:
        with self._lock:
            was_cleared = entries is not self._entries
            if not was_cleared and cache.captured is not None and cache.captured.has_graph:
                entries.append((bucket, cache))
                self._shrink(least=1)

    def _shrink(self, least: int) -> None:
        entries = self._entries
        while len(entries) > least:
            if sum(cache.nbytes for _, cache in entries) <= _budget(entries[-1][1].lengths.device):
                return
            entries.pop(0)


def _budget(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // 16
