"""The dictionary that the processors return: keys as attributes, and one call to move it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class BatchFeature(dict[str, Any]):
    """A dict of model inputs whose entries are also attributes.

    ``model(**batch)``, ``batch["input_ids"]`` and ``batch.input_ids`` all work.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}; there are {sorted(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Move tensors in place, as ``Tensor.to``; only floating tensors change dtype.

        Args:
            *args, **kwargs: a device, a dtype, or both, and ``non_blocking``.
        Returns: this object.
        """
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    self[name] = value.to(*args, **kwargs)
                else:  # ids and masks follow to the device and keep their dtype
                    probe = torch.empty(0, device=value.device).to(*args, **kwargs)
                    self[name] = value.to(probe.device)
        return self


def convert_to_tensors(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    """Turn lists and arrays into the container asked for.

    Args:
        data: (nested) lists of integers, numpy arrays or tensors.
        return_tensors: "pt" for torch tensors, "np" for numpy arrays, None to leave all as it is.
    Raises: ValueError for another name, or for rows of unequal length.
    """
    if return_tensors is None:
        return BatchFeature(data)
    if return_tensors not in ("pt", "np"):
        raise ValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}')
    converted = BatchFeature()
    for name, value in data.items():
        array = value if isinstance(value, np.ndarray) else _rectangular(name, value)
        converted[name] = torch.from_numpy(array) if return_tensors == "pt" else array
    return converted


def _rectangular(name: str, rows: list[Any]) -> np.ndarray:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"{name} has rows of {lengths[0]} to {lengths[-1]} entries, which make no tensor; "
            "pass padding=True, or return_tensors=None for lists"
        )
    return np.asarray(rows, dtype=np.int64)
