"""How much memory a device has left, asked before something large is made."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
# What a container may use, and the entry of its statistics on what it holds for good (the cache of files,
# which counts as used too, is given up as needed): of versions 2 and 1 of control groups.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.stat", "anon"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_rss",
    ),
)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell.

    Of a GPU what is free and what torch holds unused. Of the host the memory that is available, swap
    included, within the limits of the process and of its container.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    bounds = [_available(), _within_address_space(), *map(_within_group, _GROUPS)]
    return min((bound for bound in bounds if bound is not None), default=None)


def require_room(
    device: torch.device, nbytes: int, what: str, instead: str = "", freed: int = 0
) -> None:
    """Raises: ValueError with both numbers if a device has less than ``nbytes`` left.

    Args:
        what: takes the bytes, for the message.
        instead: what to do about it.
        freed: bytes in use that will be given up before.
    """
    free = free_bytes(device)
    if free is not None and nbytes > free + freed:
        raise ValueError(
            f"{what} takes {nbytes / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free"
            + (f"; {instead}" if instead else "")
        )


def return_freed() -> None:
    """Give what was freed back to the system: the C library keeps blocks of up to 32 MB, which what is kept
    for longer then lies between."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _available() -> int | None:
    entries = _entries(_MEMINFO)
    available = entries.get("MemAvailable:")
    return None if available is None else 1024 * (available + entries.get("SwapFree:", 0))


def _within_address_space() -> int | None:
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(_STATM.read_text(encoding="ascii").split()[0])
        return max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)
    except (ImportError, OSError, ValueError):
        return None


def _within_group(files: tuple[str, str, str]) -> int | None:
    limit, statistics, entry = files
    try:
        bound = int(Path(limit).read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max"
        return None
    return max(bound - _entries(Path(statistics)).get(entry, 0), 0)


def _entries(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
        return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
    except (OSError, ValueError):
        return {}
