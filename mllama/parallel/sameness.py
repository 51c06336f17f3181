"""What has to be the same on all ranks, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def require_same(every: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what differs, which raises on all ranks alike.

    Args:
        every: of each rank what it has, by the name that an error gives.
    Raises: ValueError.
    """
    for name in dict.fromkeys(name for own in every for name in own):
        values = [own.get(name) for own in every]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name} is not the same on ranks 0 and {other}: all ranks of a split model run the same "
                "code on the same inputs"
            )


def digest(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype and a hash of the bytes."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    hashed = hashlib.blake2b(data, digest_size=16).hexdigest()
    return tuple(tensor.shape), str(tensor.dtype), hashed
