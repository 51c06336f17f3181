"""What ranks of one machine exchange through memory: exact, and an error where one of them fails."""

from __future__ import annotations

import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shared_memory_ranks import ENDED, on_ranks
from torch import Tensor

from mllama.parallel import shared_memory
from mllama.parallel.ranks import Ranks
from mllama_kernels import _library

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEPT: list[Any] = []
SHAPES = ((), (0,), (1,), (7, 5), (2, 0, 3), (1, 1, 4096), (3, 1025), (2, 3, 700))

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this PyTorch has no gloo",
    ),
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here"),
    pytest.mark.skipif(_library.path is None, reason="the compiled library is missing"),
]


def with_memory(ranks: Ranks, capacity: int | None = None) -> Ranks:
    """Ranks that have it, with pieces of so many bytes."""
    if capacity is not None:
        shared_memory.CAPACITY = capacity
    made = ranks.on_device(CPU)
    assert made.memory is not None
    return made


def error_of(call: Callable[[], Any]) -> str:
    try:
        return f"nothing was raised: {call()!r:.80}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def summed(parts: list[Tensor]) -> Tensor:
    """In order, rounded once."""
    dtype = parts[0].dtype
    wide = [part.double() if dtype == torch.float64 else part.float() for part in parts]
    total = wide[0]
    for part in wide[1:]:
        total = total + part
    return total.to(dtype)


def compare_all(ranks: Ranks, seed: int) -> int:
    """Every dtype and shape, on tensors that all ranks know; what came out is compared in the end, when
    the slots have been written again. Returns: how many."""
    generator, found = torch.Generator().manual_seed(seed), []
    for dtype in FLOATS:
        for shape in SHAPES:
            parts = [torch.randn(shape, generator=generator).to(dtype) for _ in range(ranks.size)]
            own, expected = parts[ranks.rank], summed(parts)
            found.append((ranks.summed(own.clone()), expected))
            turned = own.clone().movedim(0, -1) if own.dim() else own.clone()
            found.append((ranks.summed(turned), expected.movedim(0, -1) if own.dim() else expected))
        for rows in ((), (0,), (3,), (2, 5)):
            for widest in (1, 6, 2500):
                sizes = [max(1, widest - rank) for rank in range(ranks.size)]
                parts = [
                    torch.randn(*rows, n, generator=generator, dtype=torch.float32).to(dtype)
                    for n in sizes
                ]
                own = parts[ranks.rank]
                doubled = own.repeat_interleave(2, -1)[..., ::2]
                for x in (own, doubled):
                    found.append((ranks.side_by_side(x, sizes), torch.cat(parts, -1)))
    for actual, expected in found:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert torch.equal(actual, expected)
    return len(found)


def exact(ranks: Ranks, seed: int, capacity: int | None) -> int:
    return compare_all(with_memory(ranks, capacity), seed)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("capacity", [None, 4096])
def test_values_are_exact(size: int, capacity: int | None, seed: int) -> None:
    count = len(FLOATS) * (2 * len(SHAPES) + 4 * 3 * 2)
    assert on_ranks(size, exact, seed, capacity) == [count] * size


def rounds(ranks: Ranks, seed: int, count: int) -> str:
    """Sums and rows in random order and of random sizes, with ranks that come late here and there."""
    ranks = with_memory(ranks, 4096)
    same, own = random.Random(seed), random.Random(seed + ranks.rank + 1)
    for number in range(count):
        features, n = same.choice((1, 3, 64, 512, 1023, 1500, 3000)), same.randint(1, 3)
        numbers = torch.arange(n * features, dtype=torch.float32).view(n, features) + number
        if own.random() < 0.02:
            time.sleep(own.choice((0, 0.0001, 0.004)))
        if same.random() < 0.5:
            total = ranks.summed(numbers * (ranks.rank + 1))
            expected = numbers * (ranks.size * (ranks.size + 1) // 2)
        else:
            total = ranks.side_by_side(numbers + ranks.rank, [features] * ranks.size)
            expected = torch.cat([numbers + rank for rank in range(ranks.size)], -1)
        if not torch.equal(total, expected):
            return f"round {number}: {total} instead of {expected}"
    return "all are right"


@pytest.mark.parametrize(("size", "count"), [(2, 4000), (4, 1500)])
def test_thousands_of_rounds(size: int, count: int, seed: int) -> None:
    assert on_ranks(size, rounds, seed, count) == ["all are right"] * size


def unequal(ranks: Ranks) -> list[str]:
    ranks = with_memory(ranks)
    ranks.summed(torch.ones(4))
    last = ranks.rank == ranks.size - 1
    return [error_of(lambda: ranks.summed(torch.ones(5 if last else 4))) for _ in range(2)]


@pytest.mark.parametrize("size", [2, 4])
def test_sizes_that_differ_are_named(size: int) -> None:
    *found, last = on_ranks(size, unequal)
    for rank, (first, second) in enumerate(found):
        assert first.startswith(
            f"RuntimeError: rank {rank} exchanges 16 bytes, and rank {size - 1} 20: all ranks of a split"
        )
        assert second.startswith(f"RuntimeError: rank {rank} has failed in an exchange")
    assert last[0].startswith(f"RuntimeError: rank {size - 1} exchanges 20 bytes, and rank 0 16: ")


def killed(ranks: Ranks, mark: Path) -> str:
    ranks = with_memory(ranks)
    for _ in range(3):
        ranks.summed(torch.ones(4))
    if ranks.rank == ranks.size - 1:
        if not os.fork():  # a child that lives on is no rank, whatever it has open
            for number in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError):
                    if "/dev/shm" not in os.readlink(f"/proc/self/fd/{number}"):
                        os.close(number)
            while mark.exists():
                time.sleep(0.1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: ranks.summed(torch.ones(4)))


@pytest.mark.parametrize("size", [2, 4])
def test_a_killed_rank_is_missed_at_once(size: int, tmp_path: Path) -> None:
    mark = tmp_path / "running"
    mark.touch()
    *found, last = on_ranks(size, killed, mark)
    mark.unlink()
    assert last == ENDED
    for error in found:
        assert error.startswith(f"RuntimeError: rank {size - 1} of {size} is gone: its process has")


def late(ranks: Ranks) -> str:
    ranks = with_memory(ranks)
    assert ranks.memory._seconds == 60
    ranks.memory._seconds = 1  # that many for everything else would be too few on a busy machine
    if ranks.rank == 1:
        _KEPT.append(ranks)
        return "is elsewhere"
    return error_of(lambda: ranks.summed(torch.ones(4)))


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_group_says() -> None:
    error = "RuntimeError: timed out: rank 1 of 3 has not come to an exchange within 1 s"
    assert on_ranks(3, late, seconds=60) == [error, "is elsewhere", error]


def interrupted(ranks: Ranks) -> list[Any]:
    ranks = with_memory(ranks)
    if ranks.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ranks.summed(torch.ones(1))
    dist.barrier()
    return [error_of(lambda: ranks.summed(torch.ones(1))) for _ in range(2)]


def test_a_rank_that_waits_can_be_interrupted() -> None:
    first, second = on_ranks(2, interrupted)
    for error in first:
        assert error.startswith(
            "RuntimeError: rank 0 has failed in an exchange with the others, or has"
        )
    assert second[0] == "nothing was raised: tensor([2.])"  # the other had given its part
    assert second[1].startswith("RuntimeError: rank 0 of 2 is gone: its process has ended, or it")


def forked(ranks: Ranks) -> tuple[str, float]:
    ranks = with_memory(ranks)
    here, there = os.pipe()
    if not os.fork():
        os.write(there, error_of(lambda: ranks.summed(torch.ones(1))).encode())
        os._exit(0)
    return os.read(here, 1000).decode(), ranks.summed(torch.ones(1)).item()


def test_a_child_is_no_rank() -> None:
    for rank, (error, total) in enumerate(on_ranks(2, forked)):
        assert error.startswith(f"RuntimeError: this is a child of rank {rank}") and total == 2


def compiled(ranks: Ranks) -> list[float]:
    ranks = with_memory(ranks)

    def run(x: Tensor) -> Tensor:
        return ranks.side_by_side(ranks.summed(x + 1) * 2, [3, 3])

    whole = torch.compile(run, backend="eager", fullgraph=True)
    with torch.no_grad():
        return whole(torch.full((3,), float(ranks.rank))).tolist()


def test_a_compiled_graph_has_the_exchange_of_the_group() -> None:
    assert on_ranks(2, compiled) == [[6.0] * 6] * 2


def open_files() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing, or of another thread
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found


def leaves_nothing(ranks: Ranks, folder: str) -> tuple[list[str], bool, bool]:
    shared_memory._FOLDER = folder
    with_memory(ranks).summed(torch.ones(1))  # and everything that the first one opens
    made = with_memory(ranks)
    made.summed(torch.ones(1))
    names, is_open = os.listdir(folder), any(folder in path for path in open_files())
    dist.barrier()
    del made
    return names, is_open, any(folder in path for path in open_files())


def test_nothing_is_left() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert on_ranks(2, leaves_nothing, folder) == [([], True, False)] * 2
        assert os.listdir(folder) == []


def two_groups(ranks: Ranks, count: int) -> list[bool]:
    """Models of the same ranks, which two threads use."""
    own = [with_memory(Ranks(dist.new_group([0, 1]), ranks.rank, 2)) for _ in range(2)]

    def run(made: Ranks, begin: int) -> bool:
        totals = [made.summed(torch.full((9,), float(begin + n))) for n in range(count)]
        return all((total == 2 * (begin + n)).all() for n, total in enumerate(totals))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, own, (0, 10 * count)))


def test_two_groups_at_once() -> None:
    assert on_ranks(2, two_groups, 300) == [[True, True]] * 2


def without(ranks: Ranks, seed: int, why: str, path: str) -> int:
    if why == "no folder":
        shared_memory._FOLDER = "/nonexistent"
    if why == "no room" and ranks.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if why == "another process" and ranks.rank == 0:
        shared_memory.SharedMemory._place = lambda _self: ("/proc/0/fd/3", b"0123456789abcdef")
    if why == "another file" and ranks.rank == 0:
        shared_memory.SharedMemory._place = lambda _self: (path, b"0123456789abcdef")
    if why == "no library" and ranks.rank == 1:
        _library.path = None
    made = ranks.on_device(CPU)
    assert made.memory is None
    return compare_all(made, seed)


@pytest.mark.parametrize(
    "why", ["no folder", "no room", "another process", "another file", "no library"]
)
def test_without_common_memory_the_group_exchanges_the_same(
    why: str, seed: int, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    path.write_bytes(bytes(5000))
    found = on_ranks(2, without, seed, why, str(path))
    assert found[0] == found[1] and isinstance(found[0], int) and found[0] > 0, found
    assert path.read_bytes() == bytes(5000)
