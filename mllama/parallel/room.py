"""Whether the ranks of a model have the room for their parts, which they find out together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mllama.memory import free_bytes
from mllama.parallel.ranks import Ranks
from mllama.wording import size


@dataclass(frozen=True)
class Room:
    """Of a rank.

    Attributes:
        device: its name.
        needs, free: bytes; None of those that are free where the system does not tell.
    """

    rank: int
    device: str
    needs: int
    free: int | None

    @property
    def missing(self) -> int:
        return 0 if self.free is None else max(self.needs - self.free, 0)


def own_free_bytes(device: torch.device, ranks: Ranks | None) -> int | None:
    """What this process may take of a device; of the host all ranks of this machine have equal parts."""
    free = free_bytes(device)
    if free is None or ranks is None or device.type != "cpu":
        return free
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


def rooms(ranks: Ranks, device: torch.device, needs: int, free: int | None) -> list[Room]:
    """What every rank needs and has, on all of them. They ask and go on together: none loads while another
    still looks at what is free."""
    every = ranks.gathered((str(device), needs, free))
    return [Room(rank, *own) for rank, own in enumerate(every)]


def least_free_bytes(ranks: Ranks, device: torch.device) -> int | None:
    """What the rank with the fewest has left, for what must be of one size on all of them; None where the
    system of some does not tell."""
    every = [room.free for room in rooms(ranks, device, 0, own_free_bytes(device, ranks))]
    known = [free for free in every if free is not None]
    return min(known) if len(known) == len(every) else None


def table(rooms: list[Room]) -> str:
    """A line for each rank, under a head."""
    lines = [f"{'rank':4}  {'device':8}  {'needs':>10}  {'has free':>10}"]
    for room in rooms:
        free = "?" if room.free is None else size(room.free)
        note = f"  {size(room.missing)} are missing" if room.missing else ""
        lines.append(f"{room.rank:4}  {room.device:8}  {size(room.needs):>10}  {free:>10}{note}")
    return "\n".join(lines)


def require_rooms(
    ranks: Ranks, device: torch.device, needs: int, refusal: Callable[[int, str], str]
) -> None:
    """Refuse what does not fit on some rank, on all of them.

    Args:
        needs: bytes of this rank.
        refusal: what to say of a rank that has so many bytes free, and of its name.
    Raises: ValueError with that, of the rank that misses most, and the table.
    """
    every = rooms(ranks, device, needs, own_free_bytes(device, ranks))
    worst = max(every, key=lambda room: room.missing)
    if worst.free is not None and worst.missing:
        text = refusal(worst.free, f"rank {worst.rank} of {ranks.size} on {worst.device}")
        raise ValueError(f"{text}\n{table(every)}")
