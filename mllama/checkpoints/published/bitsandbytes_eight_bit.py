"""bitsandbytes' 8 bits (`load_in_8bit`): `X.weight` int8 (N, K) beside `X.SCB`, the largest magnitude of each
row. A weight is q * SCB / 127."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllama.checkpoints.published.common import (
    ACTIVATIONS_STAY,
    Checks,
    Parts,
    checked_scales,
    encoded,
)
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeight

_SCALE, _FORMAT = ".SCB", ".weight_format"
_ROW_MAJOR = 0  # the order of weights; the others were for GPUs of before 2023


def find_eight_bit(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> Found | None:
    """The weights beside an SCB; see `stored_weights.Finder`."""
    modules = [name.removesuffix(_SCALE) for name in stored.tensors if name.endswith(_SCALE)]
    formats = {f"{m}{_FORMAT}" for m in modules} & stored.tensors.keys()
    if not modules:
        return None
    checks = Checks(stored)
    orders = checks.read(sorted(formats), 8)
    found: dict[str, StoredWeight] = {}
    for module in modules:
        weight, scale, order = f"{module}.weight", f"{module}{_SCALE}", f"{module}{_FORMAT}"
        if not checks.has(scale, weight, ("I8",)) or not checks.may_be_quantised(weight, scale):
            continue
        shape = stored.tensors[weight].shape
        if len(shape) != 2 or 0 in shape:
            checks.add(weight, f"has shape {shape}, expected (N, K)")
            continue
        if not checks.fits(scale, ("F32",), shape[:1]):
            continue
        if order in orders and orders[order].flatten().tolist() != [_ROW_MAJOR]:
            checks.add(order, "says that the weight is not stored row by row, which is not read")
            continue
        nbytes = shape[0] * shape[1] + 4 * shape[0]
        reader = _Reader(weight, scale)
        found[weight] = encoded(
            stored, weight, "int8", shape, nbytes, (weight, scale), reader.parts
        )
    others = formats | {f"{module}{_SCALE}" for module in modules}
    notes = [ACTIVATIONS_STAY]
    return Found("bitsandbytes int8", found, frozenset(others), checks.problems, notes)


@dataclass(frozen=True)
class _Reader:
    weight: str
    scale: str

    def parts(self, tensors: Parts) -> Parts:
        largest = checked_scales(tensors[self.scale], self.scale)
        return {"data": tensors[self.weight].contiguous(), "scale": largest / 127}
