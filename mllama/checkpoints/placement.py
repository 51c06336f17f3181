"""Where a model that is loaded goes: one device, however it is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from mllama.memory import require_room
from mllama.wording import quoted

# Names by which `transformers` and `accelerate` spread a model over what there is.
_CHOSEN = ("auto", "balanced", "balanced_low_0", "sequential")
ONE_DEVICE = (
    "a process has its part of a model on one device: over several run a process for each under torchrun and "
    "load with tensor_parallel=True (--devices gpu-0,gpu-1 of the commands starts them)"
)


def resolve_device(device: Any, device_map: Any, of_rank: bool = False) -> torch.device:
    """The one device of ``device`` and ``device_map``, either of which may be None.

    A map may be "auto" or another of those names (the current GPU if there is one, else the CPU), a
    device, an index, or a dictionary whose values are all the same device. Without both it is torch's
    default device.

    Args:
        of_rank: of a process among several, to each of which "cuda" is the GPU of its place on the machine.
    Raises: ValueError for a map over several devices, two that differ, the meta device, and one that is
        not there.
    """
    named = [
        _one_device(value, of_rank)
        for value in (device, _unmapped(device_map))
        if value is not None
    ]
    if len(set(named)) > 1:
        raise ValueError(
            f"device={quoted(device)} and device_map={quoted(device_map)} are different devices"
        )
    place = named[0] if named else torch.get_default_device()
    if place.type == "meta":
        raise ValueError(
            "the meta device holds no weights: load to another one with device=, also inside "
            'torch.device("meta"), or make a model without weights of its configuration there'
        )
    return place


def check_room(place: torch.device, nbytes: int) -> None:
    """Raises: ValueError if a device has less than ``nbytes`` free."""
    require_room(place, nbytes, "the model", ONE_DEVICE if place.type == "cuda" else "")


def _unmapped(device_map: Any) -> Any:
    """What a map names: one device, or None where there is no map."""
    if isinstance(device_map, str) and device_map in _CHOSEN:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device_map, Mapping):
        return device_map
    places = {_one_device(value) for value in device_map.values()}
    if len(places) != 1:
        raise ValueError(
            f"device_map={quoted(dict(device_map))} names {len(places)} devices: {ONE_DEVICE}"
        )
    return places.pop()


def _one_device(value: Any, of_rank: bool = False) -> torch.device:
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"cuda:{value}"
    if value == "disk":
        raise ValueError("weights cannot stay on the disk: a model lies on one device as a whole")
    try:
        place = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"a device must be one such as 'cpu' or 'cuda:0', an index, or in a device_map one of "
            f"{list(_CHOSEN)}, got {quoted(value)}"
        ) from None
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if place.index is None:
            local = os.environ.get("LOCAL_RANK", "") if of_rank else ""
            current = torch.cuda.current_device() if count else 0
            place = torch.device("cuda", int(local) if local.isdecimal() else current)
        if place.index >= count:
            raise ValueError(
                f"device {quoted(value)} was asked for, but there are {count} CUDA devices"
            )
    return place
