"""compressed-tensors w4a16 and w8a16: integers in words of 32 bits.

`X.weight_packed` is int32 (N, K * bits / 32), the first number in the lowest bits, each 8 too high, or 128 of
8 bits; `X.weight_shape` says (N, K), `X.weight_scale` has (N, K / group) or (N, 1). Asymmetric ones have
`X.weight_zero_point`, packed along the rows, (N * bits / 32, K / group). `X.weight_g_idx` has the group of
each column where the columns were quantised in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.published.common import (
    FLOATS,
    Checks,
    DecodedNotes,
    Parts,
    checked_scales,
    column_groups,
    decoded,
    encoded,
    grouped_values,
    int4_bytes,
    kernel_group,
    stored_bytes,
    unpacked,
    widened,
)
from mllama.checkpoints.published.compressed_tensors_config import (
    activation_scales,
    config_notes,
    config_problems,
    signed_scales,
)
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeight
from mllama.wording import quoted, shown

_PACKED, _SHAPE, _SCALE, _ZERO, _ORDER = (
    ".weight_packed",
    ".weight_shape",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
)
_MAX_ORDER = 2**22  # bytes of a g_idx: the widest row has 28,672 columns


def find_packed(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> Found | None:
    """The weights that are packed in int32; see `stored_weights.Finder`."""
    modules = [
        name.removesuffix(_PACKED)
        for name, info in stored.tensors.items()
        if name.endswith(_PACKED) and info.dtype_name == "I32"
    ]
    if not modules:
        return None
    checks, notes = Checks(stored), DecodedNotes()
    shapes = _sizes(checks, modules)
    orders = checks.read(
        [name for m in modules if (name := f"{m}{_ORDER}") in stored.tensors], _MAX_ORDER
    )
    found: dict[str, StoredWeight] = {}
    others: set[str] = set()
    bits = set()
    for module in modules:
        members = (_PACKED, _SHAPE, _SCALE, _ZERO, _ORDER)
        others |= {f"{module}{member}" for member in members} & stored.tensors.keys()
        if module not in shapes:
            continue
        layout = _layout(checks, module, shapes[module], orders, signed_scales(config))
        if layout is not None:
            bits.add(layout.bits)
            found[f"{module}.weight"] = layout.weight(stored, notes)
    others |= activation_scales(stored)
    method = " ".join(["compressed-tensors", *(f"w{n}a16" for n in sorted(bits))])
    told = [*notes.lines(), *config_notes(config, stored)]
    problems = [*checks.problems, *config_problems(config)]
    return Found(method, found, frozenset(others), problems, told)


def _sizes(checks: Checks, modules: list[str]) -> dict[str, tuple[int, int]]:
    """The (N, K) of each weight whose weight_shape is there and has two sizes."""
    names = [
        f"{m}{_SHAPE}"
        for m in modules
        if checks.has(f"{m}{_PACKED}", f"{m}{_SHAPE}", ("I64", "I32"), (2,))
    ]
    sizes = {}
    for name, numbers in checks.read(names, 16).items():
        rows, columns = numbers.tolist()
        if rows > 0 and columns > 0:
            sizes[name.removesuffix(_SHAPE)] = (rows, columns)
        else:
            checks.add(name, f"holds {(rows, columns)}, expected two sizes")
    return sizes


@dataclass(frozen=True)
class _Layout:
    """How one weight is packed.

    Attributes:
        bits: 4 or 8.
        groups: of a row.
        zero: the name of the zero point, or None where it is the middle.
        order: the group of each column where they are not in order.
    """

    module: str
    shape: tuple[int, int]
    bits: int
    groups: int
    zero: str | None
    order: Tensor | None
    signed: bool

    @property
    def packed(self) -> str:
        return f"{self.module}{_PACKED}"

    @property
    def scale(self) -> str:
        return f"{self.module}{_SCALE}"

    def weight(self, stored: SafetensorsCheckpoint, notes: DecodedNotes) -> StoredWeight:
        zeros = () if self.zero is None else (self.zero,)
        parts = (self.packed, self.scale, *zeros)
        rows, columns = self.shape
        group = kernel_group(columns // self.groups)
        if self.order is None and self.bits == 4 and group is not None:
            nbytes = int4_bytes(self.shape, group, stored.tensors[self.scale].dtype_name)
            return encoded(stored, self.packed, "int4", self.shape, nbytes, parts, self.int4, group)
        if self.order is None and self.bits == 8 and self.groups == 1 and self.zero is None:
            nbytes = rows * columns + 4 * rows
            return encoded(stored, self.packed, "int8", self.shape, nbytes, parts, self.int8)
        if self.order is not None:
            reason = "columns that were quantised in another order"
        else:
            reason = f"no kernel for {self.bits} bits in groups of {columns // self.groups}"
        notes.add(reason, self.shape, sum(stored_bytes(stored.tensors[p]) for p in parts))
        return decoded(stored, self.packed, self.shape, parts, self.values)

    def int4(self, tensors: Parts) -> Parts:
        rows, columns = self.shape
        group = kernel_group(columns // self.groups)
        assert group is not None
        zero = self._zeros(tensors)
        if isinstance(zero, int):
            zero = torch.full((rows, columns // group), zero, dtype=torch.uint8)
        else:
            zero = widened(zero.to(torch.uint8), columns, group)
        return {
            "data": tensors[self.packed].contiguous().view(torch.uint8),
            "scale": widened(self._scales(tensors), columns, group),
            "zero": zero,
        }

    def int8(self, tensors: Parts) -> Parts:
        numbers = tensors[self.packed].contiguous().view(torch.uint8)
        # 128 less, which in 8 bits is the highest one turned over.
        return {
            "data": (numbers ^ 128).view(torch.int8),
            "scale": self._scales(tensors).float().flatten().contiguous(),
        }

    def values(self, tensors: Parts) -> Tensor:
        """(N, K) float32."""
        numbers = unpacked(tensors[self.packed].contiguous(), self.bits)
        return grouped_values(numbers, self._zeros(tensors), self._scales(tensors), self.order)

    def _scales(self, tensors: Parts) -> Tensor:
        """(N, groups)."""
        scales = checked_scales(tensors[self.scale], self.scale, signed=self.signed)
        rows = self.shape[0]
        return scales.reshape(-1, self.groups).expand(rows, self.groups).contiguous()

    def _zeros(self, tensors: Parts) -> Tensor | int:
        """(N, groups) in the count of the packed numbers, or one for all."""
        middle = 1 << (self.bits - 1)
        if self.zero is None:
            return middle
        stored, rows = tensors[self.zero], self.shape[0]
        if stored.dtype == torch.int8:
            zeros = stored.view(rows, self.groups).short() + middle
        else:
            zeros = unpacked(stored.t().contiguous(), self.bits)[:, :rows].t().short()
        if not bool(((zeros >= 0) & (zeros < 2 * middle)).all()):
            raise ValueError(f"{shown(self.zero)} holds zero points beyond {self.bits} bits")
        return zeros


def _layout(
    checks: Checks, module: str, shape: tuple[int, int], orders: Parts, signed: bool
) -> _Layout | None:
    stored, packed = checks.stored, f"{module}{_PACKED}"
    rows, columns = shape
    found = stored.tensors[packed].shape
    bits = {columns * n // 32: n for n in (4, 8)} if columns % 8 == 0 else {}
    if len(found) != 2 or found[0] != rows or found[1] not in bits:
        checks.add(
            packed,
            f"is {quoted(found)}, which for the weight_shape {shape} is neither 4 nor 8 bits a weight: "
            f"expected {[(rows, words) for words in bits] or 'rows of a multiple of 8'}",
        )
        return None
    width = bits[found[1]]
    scale, zero, order = f"{module}{_SCALE}", f"{module}{_ZERO}", f"{module}{_ORDER}"
    if not checks.may_be_quantised(f"{module}.weight", packed) or not checks.has(
        packed, scale, FLOATS
    ):
        return None
    groups = _groups(stored.tensors[scale].shape, rows, columns)
    if groups is None:
        checks.add(
            scale,
            f"has {quoted(stored.tensors[scale].shape)} scales for a weight {shape}, expected "
            f"({rows}, groups) of equal groups, or one",
        )
        return None
    if zero in stored.tensors and not _zeros_fit(checks, zero, rows, groups, width):
        return None
    group_of = None
    if order in stored.tensors:
        if not checks.fits(order, ("I32", "I64"), (columns,)):
            return None
        if order in orders:
            try:
                group_of = column_groups(orders[order], groups)
            except ValueError as error:
                checks.add(order, str(error))
                return None
    return _Layout(
        module, shape, width, groups, zero if zero in stored.tensors else None, group_of, signed
    )


def _groups(scales: tuple[int, ...], rows: int, columns: int) -> int | None:
    if scales in ((), (1,), (1, 1), (rows,)):
        return 1
    if len(scales) != 2 or scales[0] != rows or scales[1] == 0 or columns % scales[1]:
        return None
    return scales[1]


def _zeros_fit(checks: Checks, zero: str, rows: int, groups: int, bits: int) -> bool:
    if checks.stored.tensors[zero].dtype_name == "I8":
        shapes = [(rows, groups)] + ([(rows,)] if groups == 1 else [])
        return checks.fits(zero, ("I8",), *shapes)
    return checks.fits(zero, ("I32",), (-(-rows * bits // 32), groups))
