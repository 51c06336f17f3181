"""GPTQ and AutoRound: AutoGPTQ, GPTQModel, `OPEA/*-int4-sym-inc`.

Everything is transposed: `X.qweight` is int32 (K * bits / 32, N), the first column of a weight in the lowest
bits, `X.scales` (K / group, N), and `X.qzeros` int32 (K / group, N * bits / 32), from which 1 was subtracted
where the format is GPTQ's first. `X.g_idx` has the group of each column; where the columns were quantised in
another order (desc_act), groups are no neighbours. Layers that were left alone are plain: nothing in
config.json says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, read_json
from mllama.checkpoints.key_layout import TEXT
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
from mllama.checkpoints.published.compressed_tensors_config import signed_scales
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeight
from mllama.wording import quoted, shown

_WEIGHT, _ZEROS, _SCALES, _ORDER = ".qweight", ".qzeros", ".scales", ".g_idx"
_OLDER_CONFIG = "quantize_config.json"  # beside config.json, where AutoGPTQ wrote it first
_MAX_SMALL = 2**22  # bytes of a g_idx (28,672 columns) and of a bias that is 0


def find_gptq(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> Found | None:
    """The weights of GPTQ's layout; see `stored_weights.Finder`."""
    modules = [
        name.removesuffix(_WEIGHT)
        for name in stored.tensors
        if name.endswith(_WEIGHT) and not is_awq(stored, name.removesuffix(_WEIGHT))
    ]
    if not modules:
        return None
    checks, notes = Checks(stored), DecodedNotes()
    rule = _rule(checks, config or _older_config(checks))
    orders = checks.read(
        [n for m in modules if (n := f"{m}{_ORDER}") in stored.tensors], _MAX_SMALL
    )
    found: dict[str, StoredWeight] = {}
    others = _empty_biases(checks, modules)
    for module in modules:
        members = (_WEIGHT, _ZEROS, _SCALES, _ORDER)
        others |= {f"{module}{member}" for member in members} & stored.tensors.keys()
        layout = _layout(checks, module, rule, orders)
        if layout is not None:
            found[f"{module}.weight"] = layout.weight(stored, notes)
    method = "AutoRound" if rule.signed else "GPTQ"
    return Found(method, found, frozenset(others), checks.problems, notes.lines())


def is_awq(stored: SafetensorsCheckpoint, module: str) -> bool:
    """Whether a module with a qweight has it (K, N / 8) instead of (K / 8, N)."""
    weight, scales = (stored.tensors.get(f"{module}{name}") for name in (_WEIGHT, _SCALES))
    if weight is None or scales is None or len(weight.shape) != 2 or len(scales.shape) != 2:
        return False
    return weight.shape[1] * 8 == scales.shape[1] != weight.shape[1]


@dataclass(frozen=True)
class _Rule:
    """How the folder counts.

    Attributes:
        added: to a stored zero; None: nothing says.
        symmetric: whether zeros that are all in the middle were meant to be. Where `sym` is not there they
            were: that is what it means to GPTQModel, AutoGPTQ, AutoRound and `transformers`.
        signed: whether scales may be negative.
    """

    added: int | None
    symmetric: bool
    signed: bool


def _older_config(checks: Checks) -> Mapping[str, Any]:
    if not (checks.stored.folder / _OLDER_CONFIG).is_file():
        return {}
    try:
        return read_json(checks.stored.folder / _OLDER_CONFIG)
    except CheckpointError as error:
        checks.problems += error.problems
        return {}


def _rule(checks: Checks, config: Mapping[str, Any]) -> _Rule:
    signed, sym = signed_scales(config), config.get("sym")
    if sym is not None and not isinstance(sym, bool):
        checks.problems.append(f"quantization_config: sym must be true or false, got {quoted(sym)}")
    symmetric = sym is not False
    method = config.get("quant_method")
    if signed and method != "gptq":
        # AutoRound's own packing stores zeros as they are; that for AutoGPTQ's kernels does not.
        packing = config.get("packing_format", config.get("backend", "auto_round"))
        packing = packing if isinstance(packing, str) else ""
        return _Rule(int("gptq" in packing and "gptqmodel" not in packing), symmetric, signed)
    if not config:
        return _Rule(None, symmetric, signed)
    kind = config.get("checkpoint_format", config.get("format", "gptq"))
    added = {"gptq": 1, "gptq_v2": 0}.get(kind) if isinstance(kind, str) else None
    if added is None:
        checks.problems.append(
            f"quantization_config: checkpoint_format {quoted(kind)} is not read, expected gptq or gptq_v2"
        )
    return _Rule(added, symmetric, signed)


def _empty_biases(checks: Checks, modules: list[str]) -> set[str]:
    """Biases of 0 that some versions write for layers of the text model, which have none."""
    names = [
        name
        for module in modules
        if module.startswith(TEXT) and (name := f"{module}.bias") in checks.stored.tensors
    ]
    return {name for name, bias in checks.read(names, _MAX_SMALL).items() if not bias.any()}


@dataclass(frozen=True)
class _Layout:
    """How one weight is packed.

    Attributes:
        shape: (N, K).
        groups: of a row.
        order: the group of each column where they are not in order.
    """

    module: str
    shape: tuple[int, int]
    bits: int
    groups: int
    order: Tensor | None
    rule: _Rule

    @property
    def names(self) -> tuple[str, str, str]:
        return f"{self.module}{_WEIGHT}", f"{self.module}{_ZEROS}", f"{self.module}{_SCALES}"

    def weight(self, stored: SafetensorsCheckpoint, notes: DecodedNotes) -> StoredWeight:
        named_by, _, scales = self.names
        group = kernel_group(self.shape[1] // self.groups)
        if self.order is None and self.bits == 4 and group is not None:
            nbytes = int4_bytes(self.shape, group, stored.tensors[scales].dtype_name)
            parts, make = self.names, self.int4
            return encoded(stored, named_by, "int4", self.shape, nbytes, parts, make, group)
        if self.order is not None:
            reason = "columns that were quantised in another order (desc_act)"
        else:
            length = self.shape[1] // self.groups
            reason = f"no kernel for {self.bits} bits in groups of {length}"
        notes.add(reason, self.shape, sum(stored_bytes(stored.tensors[p]) for p in self.names))
        return decoded(stored, named_by, self.shape, self.names, self.values)

    def int4(self, tensors: Parts) -> Parts:
        columns = self.shape[1]
        group = kernel_group(columns // self.groups)
        assert group is not None
        weight, _, _ = self.names
        return {
            # Words of a column become words of a row, whose bytes are in the order of int4.
            "data": tensors[weight].t().contiguous().view(torch.uint8),
            "scale": widened(self._scales(tensors), columns, group),
            "zero": widened(self._zeros(tensors), columns, group),
        }

    def values(self, tensors: Parts) -> Tensor:
        """(N, K) float32."""
        numbers = unpacked(tensors[self.names[0]].t().contiguous(), self.bits)
        return grouped_values(numbers, self._zeros(tensors), self._scales(tensors), self.order)

    def _scales(self, tensors: Parts) -> Tensor:
        """(N, groups)."""
        name = self.names[2]
        return checked_scales(tensors[name], name, signed=self.rule.signed).t()

    def _zeros(self, tensors: Parts) -> Tensor:
        """(N, groups) uint8, the number that stands for 0."""
        name = self.names[1]
        zeros = unpacked(tensors[name].contiguous(), self.bits).t()
        middle, most = 1 << (self.bits - 1), (1 << self.bits) - 1
        if self.rule.symmetric or self.rule.added is None:
            # Kernels for symmetric weights look at none of them: either count is found.
            lowest, highest = int(zeros.min()), int(zeros.max())
            if lowest == highest and lowest in (middle - 1, middle):
                return torch.full_like(zeros, middle)
        if self.rule.added is None:
            raise ValueError(
                f"{shown(name)} has other zeros than the middle, and without a checkpoint_format in "
                "config.json nothing says whether 1 was subtracted from them"
            )
        if self.rule.added and int(zeros.max()) == most:
            raise ValueError(
                f"{shown(name)} has zeros of {most}, which with checkpoint_format gptq some read as "
                f"{most + 1} and others as 0: quantise again with checkpoint_format gptq_v2"
            )
        return zeros + self.rule.added


def _layout(checks: Checks, module: str, rule: _Rule, orders: Parts) -> _Layout | None:
    stored = checks.stored
    weight, zeros, scales = (f"{module}{name}" for name in (_WEIGHT, _ZEROS, _SCALES))
    if not checks.may_be_quantised(f"{module}.weight", weight):
        return None
    there = [
        checks.fits(weight, ("I32",)),
        checks.has(weight, scales, FLOATS),
        checks.has(weight, zeros, ("I32",)),
    ]
    if not all(there):
        return None
    (packed, groups), rows, bits = _sizes(stored, weight, scales, zeros)
    if bits is None:
        checks.add(
            weight,
            f"is {quoted(stored.tensors[weight].shape)}, its scales {quoted(stored.tensors[scales].shape)} "
            f"and its qzeros {quoted(stored.tensors[zeros].shape)}, which are not those of 4 or 8 bits: "
            "expected (K * bits / 32, N), (groups, N) and (groups, N * bits / 32)",
        )
        return None
    columns = packed * 32 // bits
    if columns % groups:
        checks.add(
            scales, f"has {groups} groups, which do not divide the {columns} columns of its weight"
        )
        return None
    order, group_of = f"{module}{_ORDER}", None
    if order in stored.tensors:
        if not checks.fits(order, ("I32", "I64"), (columns,)):
            return None
        if order in orders:
            try:
                group_of = column_groups(orders[order], groups)
            except ValueError as error:
                checks.add(order, str(error))
                return None
    return _Layout(module, (rows, columns), bits, groups, group_of, rule)


def _sizes(
    stored: SafetensorsCheckpoint, weight: str, scales: str, zeros: str
) -> tuple[tuple[int, int], int, int | None]:
    """(rows of words, groups), N and bits; bits None where the three shapes contradict each other."""
    shapes = [stored.tensors[name].shape for name in (weight, scales, zeros)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        return (0, 0), 0, None
    (packed, rows), (groups, scaled), (zeroed, words) = shapes
    bits = next((n for n in (4, 8) if words * 32 == rows * n), None)
    if rows != scaled or groups != zeroed or bits is None or packed * 32 % bits:
        return (0, 0), 0, None
    return (packed, groups), rows, bits
