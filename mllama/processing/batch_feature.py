"""The dictionary that the processors return: keys as attributes, and one call to move it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mllama.wording import quoted


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


def check_container(return_tensors: Any, device: Any) -> None:
    """Raises: ValueError for another name than "pt", "np" and None, no device, or one without "pt"."""
    if return_tensors is not None and (
        not isinstance(return_tensors, str) or return_tensors not in ("pt", "np")
    ):
        raise ValueError(f'return_tensors must be "pt", "np" or None, got {quoted(return_tensors)}')
    try:
        kind = "cpu"
        if device is not None:
            kind = torch.device(device).type
            torch.empty(0, device=device)  # is it there? torch says so by errors of many kinds
    except Exception:
        raise ValueError(
            f"device must name one of torch's that is here, got {quoted(device)}"
        ) from None
    if return_tensors != "pt" and kind != "cpu":
        raise ValueError(f'device {quoted(str(device))} needs return_tensors="pt"')


def convert_to_tensors(
    data: Mapping[str, Any],
    return_tensors: str | None,
    device: str | torch.device | None = None,
) -> BatchFeature:
    """Turn lists, arrays and tensors into the container asked for; integers become int64.

    Args:
        data: (nested) lists of numbers, numpy arrays, tensors, or lists of those of one shape.
        return_tensors: "pt" for torch tensors, "np" for numpy arrays, None to leave all as it is.
        device: where torch tensors go.
    Raises: ValueError for another name, for rows of unequal length, or a device without "pt".
    """
    check_container(return_tensors, device)
    if return_tensors is None:
        return BatchFeature(data)
    if return_tensors == "np":
        return BatchFeature({name: _array(name, value) for name, value in data.items()})
    tensors = BatchFeature({name: _tensor(name, value) for name, value in data.items()})
    return tensors if device is None else tensors.to(device)


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        _check_rows(name, [tuple(v.shape) for v in value])
        return torch.stack(list(value))
    tensor = torch.from_numpy(_array(name, value))
    is_list = not isinstance(value, np.ndarray)
    return tensor.float() if is_list and tensor.dtype == torch.float64 else tensor


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if any(isinstance(v, (np.ndarray, torch.Tensor)) for v in value):
        arrays = [_array(name, v) for v in value]
        _check_rows(name, [array.shape for array in arrays])
        return np.stack(arrays)
    if any(isinstance(row, (list, tuple)) for row in value):
        _check_rows(name, [(len(row),) for row in value])
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name} has nested rows of unequal length, which make no tensor"
        ) from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype} values, which make no tensor")
    return array.astype(np.int64) if array.dtype.kind in "iu" or not array.size else array


def _check_rows(name: str, shapes: list[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        lengths = sorted({shape[0] if len(shape) == 1 else shape for shape in shapes})
        raise ValueError(
            f"{name} has rows of {lengths[0]} to {lengths[-1]} entries, which make no tensor; "
            "pass padding=True, or return_tensors=None for lists"
        )
