"""8 bits a weight in their own type: `RedHatAI/*-FP8-dynamic`, `neuralmagic/*`, and our own int8 and fp8.

`X.weight` is float8_e4m3fn or int8 (N, K), and `X.weight_scale` has one factor for a row, (N, 1) or (N,), or
one for all. Groups along a row, (N, G), and blocks, (N / b, K / c), which DeepSeek calls `weight_scale_inv`,
are decoded, and so is int8 with a `weight_zero_point` that is not 0. Scales of activations belong to kernels
that multiply in 8 bits: they change no weight.
"""

from __future__ import annotations

import re
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
    Shape,
    checked_scales,
    decoded,
    encoded,
    grouped_values,
    stored_bytes,
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

_ENCODINGS = {"F8_E4M3": "fp8", "I8": "int8"}
_METHODS = {"F8_E4M3": "FP8", "I8": "INT8"}
_SCALE, _INVERSE, _ZERO, _SCB = ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".SCB"
_MAX_ZEROS = 2**22  # bytes: of 128,256 rows there are 128,256


def find_eight_bit(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> Found | None:
    """The weights of 8 bits with a weight_scale; see `stored_weights.Finder`."""
    checks, notes = Checks(stored), DecodedNotes()
    scales = {n for n in stored.tensors if n.endswith((_SCALE, _INVERSE))}
    scaled = {n.rpartition(".")[0] for n in scales}
    # What is packed is another module's.
    modules = [
        name.removesuffix(".weight")
        for name, info in stored.tensors.items()
        if name.endswith(".weight") and (info.dtype_name in _ENCODINGS or _is_scaled(name, scaled))
    ]
    modules = [m for m in modules if f"{m}{_SCB}" not in stored.tensors or m in scaled]
    if not modules:
        return None
    asymmetric = _asymmetric(checks, modules)
    found: dict[str, StoredWeight] = {}
    others: set[str] = set()
    kinds = set()
    for module in modules:
        weight = f"{module}.weight"
        kinds.add(_METHODS.get(stored.tensors[weight].dtype_name, ""))
        members = (_SCALE, _INVERSE, _ZERO)
        others |= {f"{module}{member}" for member in members} & stored.tensors.keys()
        made = _weight(checks, module, config, f"{module}{_ZERO}" in asymmetric, notes)
        if made is not None:
            found[weight] = made
    others |= activation_scales(stored)
    method = " ".join(["compressed-tensors", *sorted(kinds - {""})])
    told = [*notes.lines(), *config_notes(config, stored)]
    problems = [*checks.problems, *config_problems(config)]
    return Found(method, found, frozenset(others), problems, told)


def _is_scaled(weight: str, scaled: set[str]) -> bool:
    """Whether a weight has a scale: one of another type waits for being quantised, or is not read."""
    return weight.removesuffix(".weight") in scaled


def _asymmetric(checks: Checks, modules: list[str]) -> set[str]:
    """The zero points that are not 0 everywhere."""
    names = [name for m in modules if (name := f"{m}{_ZERO}") in checks.stored.tensors]
    return {
        name for name, zeros in checks.read(names, _MAX_ZEROS).items() if bool(zeros.float().any())
    }


def _weight(
    checks: Checks, module: str, config: Mapping[str, Any], asymmetric: bool, notes: DecodedNotes
) -> StoredWeight | None:
    stored, weight = checks.stored, f"{module}.weight"
    shape, kind = stored.tensors[weight].shape, stored.tensors[weight].dtype_name
    if kind in FLOATS:
        checks.add(
            weight, f"is {kind} and has a weight_scale: it was saved before it was compressed"
        )
        return None
    if kind not in _ENCODINGS:
        checks.add(
            weight,
            f"is {kind} and has a weight_scale, expected F8_E4M3 (float8_e4m3fn) or I8: no other type of 8 "
            "bits is read",
        )
        return None
    named = [s for end in (_SCALE, _INVERSE) if (s := f"{module}{end}") in stored.tensors]
    if len(named) != 1:
        known = "weight_scale, weight_scale_inv or SCB"
        checks.add(weight, f"is {kind} and has {'two scales' if named else f'no {known}'}")
        return None
    (scale,) = named
    if not checks.may_be_quantised(weight, weight):
        return None
    if len(shape) != 2 or 0 in shape:
        checks.add(weight, f"has shape {quoted(shape)}, expected (N, K)")
        return None
    if stored.tensors[scale].dtype_name in ("U8", "F8_E8M0"):
        checks.add(
            scale, "is of powers of two: MX formats are not read, load the model in BF16 or FP8"
        )
        return None
    if not checks.fits(scale, FLOATS):
        return None
    zero = f"{module}{_ZERO}" if asymmetric else None
    if zero is not None and kind != "I8":
        checks.add(zero, "is not 0, which FP8 has no use for")
        return None
    if zero is not None and not checks.fits(zero, ("I8",), stored.tensors[scale].shape):
        return None
    block = _block(checks, scale, shape, config)
    if block is None:
        return None
    reader = _Reader(weight, scale, zero, shape, block, signed_scales(config))
    parts = (weight, scale) if zero is None else (weight, scale, zero)
    if zero is None and block[1] == shape[1] and block[0] in (1, shape[0]):
        nbytes = shape[0] * shape[1] + 4 * shape[0]
        return encoded(stored, weight, _ENCODINGS[kind], shape, nbytes, parts, reader.parts)
    reason = "no kernel for 8 bits with a zero point or with scales of blocks"
    notes.add(reason, shape, sum(stored_bytes(stored.tensors[part]) for part in parts))
    return decoded(stored, weight, shape, parts, reader.values)


def _block(
    checks: Checks, scale: str, shape: Shape, config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, None and a problem where the scales fit no rule."""
    rows, columns = shape
    found = checks.stored.tensors[scale].shape
    if found in ((), (1,), (1, 1)):
        return rows, columns
    if found in ((rows,), (rows, 1)):
        return 1, columns
    if len(found) == 2 and found[0] == rows and found[1] and columns % found[1] == 0:
        return 1, columns // found[1]
    blocks = _config_blocks(config)
    for height, width in blocks:
        if found == (-(-rows // height), -(-columns // width)):
            # A block may say that it is longer than the weight; a scale is spread over no more than that.
            return min(height, rows), min(width, columns)
    given = f" or for blocks of {listed_blocks(blocks)}" if blocks else ""
    checks.add(
        scale,
        f"has {quoted(found)} scales for {shown(scale.rpartition('.')[0])}.weight {quoted(shape)}, "
        f"expected ({rows}, 1), ({rows},), (1,), groups of a row{given}",
    )
    return None


def listed_blocks(blocks: list[tuple[int, int]]) -> str:
    return ", ".join(f"{height} x {width}" for height, width in blocks)


def _config_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The blocks that config.json names, as a list or as text such as "128x128"."""
    groups = config.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [s.get("weights") for s in schemes if isinstance(s, Mapping)]
    named = [w.get("block_structure") for w in weights if isinstance(w, Mapping)]
    found = []
    for one in (config.get("weight_block_size"), *named):
        if isinstance(one, str) and (sizes := re.fullmatch(r"(\d{1,6})x(\d{1,6})", one)):
            one = [int(sizes[1]), int(sizes[2])]
        if isinstance(one, list) and len(one) == 2 and all(type(n) is int and n > 0 for n in one):
            found.append((one[0], one[1]))
    return found


@dataclass(frozen=True)
class _Reader:
    """Turns the stored tensors of one weight into parts, or into values."""

    weight: str
    scale: str
    zero: str | None
    shape: Shape
    block: tuple[int, int]
    signed: bool

    def parts(self, tensors: Parts) -> Parts:
        scale = self._scale(tensors).float().flatten()
        return {
            "data": tensors[self.weight].contiguous(),
            "scale": scale.expand(self.shape[0]).contiguous(),
        }

    def values(self, tensors: Parts) -> Tensor:
        """(N, K) float32."""
        columns, width = self.shape[1], self.block[1]
        scale = self._by_row(self._scale(tensors))
        zero = 0 if self.zero is None else self._by_row(tensors[self.zero])
        # The last block of a row may be cut short.
        group_of = torch.arange(columns) // width if columns % width else None
        return grouped_values(tensors[self.weight], zero, scale, group_of)

    def _by_row(self, values: Tensor) -> Tensor:
        """One for each block, (rows, blocks of a row)."""
        rows, columns = self.shape
        height, width = self.block
        values = values.reshape(-(-rows // height), -(-columns // width))
        return values.repeat_interleave(height, dim=0)[:rows]

    def _scale(self, tensors: Parts) -> Tensor:
        return checked_scales(tensors[self.scale], self.scale, signed=self.signed)
