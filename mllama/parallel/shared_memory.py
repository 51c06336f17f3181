"""What ranks on the CPU of one machine exchange through: memory that all of them have mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _library

if sys.platform == "linux":  # elsewhere no memory is made
    import fcntl

CAPACITY = 1 << 21  # bytes of a piece: what is larger is exchanged in several
_FOLDER = "/dev/shm"
_FLAG = 128  # bytes of a rank's flag, as in csrc/cpu/shared_memory.cpp: the sequence, and two sizes
_TOKEN = 16  # bytes, behind the flags, that no other file has there
_PATIENCE = 0.1  # seconds without a look at signals and at who still runs
_HALVES = (torch.bfloat16, torch.float16)


class SharedMemory:
    """Exchanges tensors of the host with the other ranks, which all call the same methods in the same order.

    It takes one call at a time. One that raises, also by Ctrl-C, is the last: what the others have read of
    it is not known. They hear of that as of a rank that has ended.

    Args:
        file: of :func:`_bytes_of` so many ranks. It is closed in the end.
        rank: of this process.
        size: how many ranks there are.
        seconds: that a rank waits for the others.
    Raises: OSError where the file cannot be mapped and locked, or the compiled library is missing.
    """

    def __init__(self, file: int, rank: int, size: int, seconds: float) -> None:
        self._closing = weakref.finalize(self, os.close, file)
        self._put, self._wait = _functions()
        self._file, self._rank, self._size, self._seconds = file, rank, size, seconds
        self._sequence, self._process = 0, os.getpid()
        memory = torch.frombuffer(mmap.mmap(file, _bytes_of(size)), dtype=torch.uint8)
        self._flags = memory[: _FLAG * size].view(torch.int64).view(size, -1)
        # By the parity of an exchange and the rank: see the source of the library for why two are enough.
        self._slots = memory[-2 * size * CAPACITY :].view(2, size, CAPACITY)
        self._addresses = [own.data_ptr() for own in self._slots[:, rank]]
        # The kernel lets go of it when this process ends, in whatever way; no child inherits it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    @classmethod
    def of_ranks(
        cls, rank: int, size: int, seconds: float, gathered: Callable[[Any], list[Any]]
    ) -> SharedMemory | None:
        """One that all ranks make together; None on all of them where not all can: on several machines, in
        containers that do not see each other's processes, without Linux, or without the room.

        Args:
            rank, size, seconds: as above.
            gathered: what each of the ranks has given, on all of them.
        """
        memory = None
        if rank == 0:
            with suppress(OSError):
                memory = cls(_new_file(size), rank, size, seconds)
        place = gathered(None if memory is None else memory._place())[0]
        if place is not None and rank:
            with suppress(OSError):
                memory = cls(_file_at(*place, size), rank, size, seconds)
        return memory if all(gathered(memory is not None)) else None

    def summed(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks in their order, the same bits on all: of halves in float32, rounded
        once."""
        own, most = x.contiguous().view(-1), CAPACITY // x.itemsize
        total = torch.empty_like(own)
        with self._unbroken():
            for begin in _begins(own.numel(), most):
                piece = own[begin : begin + most]
                parts = self._exchange(piece, x.nbytes)[:, : piece.nbytes].view(x.dtype)
                _add(parts.unbind(0), total[begin : begin + most])
        return total.view(x.shape)

    def side_by_side(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x (..., own size) of all ranks as (..., sum of sizes), in their order."""
        rows, widest = x.shape[:-1].numel(), max(sizes)
        own, every = x.reshape(rows, x.shape[-1]), x.new_empty(rows, sum(sizes))
        # Pieces are some rows, or a part of one.
        width = max(1, min(widest, CAPACITY // x.itemsize))
        height = CAPACITY // (width * x.itemsize)
        with self._unbroken():
            for top in _begins(rows, height):
                for left in _begins(widest, width):
                    at = slice(top, top + height), slice(left, left + width)
                    slots = self._exchange(own[at].contiguous(), rows * widest * x.itemsize)
                    for slot, part in zip(slots, every.split(list(sizes), dim=-1), strict=True):
                        piece = part[at]
                        piece.copy_(slot[: piece.nbytes].view(x.dtype).view(piece.shape))
        return every.view(*x.shape[:-1], sum(sizes))

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """All pieces of what is exchanged, or this was the last."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this is a child of rank {self._rank}, and no rank of the model itself"
            )
        if not self._closing.alive:
            raise RuntimeError(
                f"rank {self._rank} has failed in an exchange with the others, or has broken one off: load "
                "the model again on all of them"
            )
        try:
            yield
        except BaseException:
            self._closing()
            raise

    def _exchange(self, piece: Tensor, size: int) -> Tensor:
        """The slots of all ranks (ranks, CAPACITY), to be read before the next exchange.

        Args:
            piece: of this rank, contiguous.
            size: bytes of what it is a piece of, on the rank with the most: all have to say the same.
        """
        self._sequence += 1
        turn = self._sequence % 2
        flag, slot = self._flags.data_ptr() + _FLAG * self._rank, self._addresses[turn]
        self._put(flag, self._sequence, slot, piece.data_ptr(), piece.nbytes, size)
        self._wait_for_all(size)
        return self._slots[turn]

    def _wait_for_all(self, size: int) -> None:
        begin, polls, flags = time.monotonic(), True, self._flags.data_ptr()
        most = int(1e6 * _PATIENCE)
        while (found := self._wait(flags, self._size, self._sequence, size, most, polls)) >= 0:
            polls = False
            if found >= self._size:
                other = found - self._size
                given = self._flags[other, 1 + self._sequence % 2].item()
                raise RuntimeError(
                    f"rank {self._rank} exchanges {size} bytes, and rank {other} {given}: all ranks of a "
                    "split model run the same code on the same inputs"
                )
            for rank in range(found, self._size):
                # In this order: it may raise its flag, and then end.
                if self._has_left(rank) and self._flags[rank, 0] < self._sequence:
                    raise RuntimeError(
                        f"rank {rank} of {self._size} is gone: its process has ended, or it has failed in "
                        "an exchange with the others"
                    )
            if time.monotonic() - begin > self._seconds:
                raise RuntimeError(
                    f"timed out: rank {found} of {self._size} has not come to an exchange within "
                    f"{self._seconds:g} s"
                )

    def _has_left(self, rank: int) -> bool:
        if rank == self._rank:
            return False
        try:
            # Shared, as others may ask at the same time.
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _place(self) -> tuple[str, bytes]:
        """Where other processes of this machine open the file, and what is in no other."""
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        return path, os.pread(self._file, _TOKEN, _FLAG * self._size)


def _functions() -> tuple[Any, Any]:
    if _library.path is None:
        raise OSError(_library.missing)
    library = ctypes.CDLL(str(_library.path))
    put, wait = library.mllama_kernels_shared_memory_put, library.mllama_kernels_shared_memory_wait
    put.restype, wait.restype = None, ctypes.c_int64
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    put.argtypes = (pointer, ctypes.c_uint64, pointer, pointer, whole, whole)
    wait.argtypes = (pointer, whole, ctypes.c_uint64, whole, whole, ctypes.c_bool)
    return put, wait


def _bytes_of(size: int) -> int:
    """Flags and token on pages of their own, and two slots for each rank."""
    flags = -(-(_FLAG * size + _TOKEN) // mmap.PAGESIZE) * mmap.PAGESIZE
    return flags + 2 * size * CAPACITY


def _new_file(size: int) -> int:
    """One without a name, so that nothing is left of it when the processes have ended."""
    if sys.platform != "linux":
        raise OSError("files without a name, and places of open files, are known of Linux alone")
    file = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Where there is not so much memory that is said here, and not by a signal to who first writes to it.
        os.posix_fallocate(file, 0, _bytes_of(size))
        os.pwrite(file, secrets.token_bytes(_TOKEN), _FLAG * size)
    except OSError:
        os.close(file)
        raise
    return file


def _file_at(path: str, token: bytes, size: int) -> int:
    """That of the first rank. Raises: OSError where it is none, or another, as on another machine."""
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if os.pread(file, _TOKEN, _FLAG * size) != token:
        os.close(file)
        raise FileNotFoundError(path)
    return file


def _begins(count: int, most: int) -> range:
    """Where pieces of so many begin; of nothing there is an empty one, so that others may not have more."""
    return range(0, max(count, 1), most)


def _add(parts: Sequence[Tensor], total: Tensor) -> None:
    """Element by element: how torch orders the terms of `sum` depends on where an element lies."""
    first, second, *others = parts
    if not others:
        torch.add(first, second, out=total)
        return
    so_far = (first.float() if first.dtype in _HALVES else first) + second
    for part in others:
        so_far += part
    total.copy_(so_far)
