"""bitsandbytes' 4 bits: `unsloth/*-bnb-4bit` and everything that `load_in_4bit` has saved.

`X.weight` is uint8 (numel/2, 1), two numbers to a byte, the first in the high half, row by row; training in
shards stores the same bytes under a wider type. Beside it are `X.weight.quant_map`, the 16 values of a
number, `X.weight.absmax`, a factor for each 64 weights, and `X.weight.quant_state.bitsandbytes__nf4` (or
`__fp4`), JSON with the shape. Nested, a factor is a byte: nested_quant_map[byte] * nested_absmax +
nested_offset, one `nested_absmax` to 256 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.published.common import (
    VALUES_AT_ONCE,
    Checks,
    DecodedNotes,
    Parts,
    checked_scales,
    decoded,
    encoded,
    stored_bytes,
)
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeight
from mllama.strict_json import parse_json
from mllama.wording import quoted, shown

_MARK = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MEMBERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ENDS = tuple(f".weight.{member}" for member in _MEMBERS)
_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_MAX_JSON = 4096  # bytes; the library writes about 150
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")
_GROUP = 64  # weights that share a factor in the kernels
# Of the library's own; a factor is spread over a whole block, which a longer one would make without end.
_MAX_BLOCK = 4096


@dataclass(frozen=True)
class _State:
    """What the JSON says.

    Attributes:
        shape: (N, K).
        block: how many weights share a factor, over the ends of rows.
        nested: how many bytes of `absmax` share a nested factor, or None where they are float32.
        offset: of nested ones.
    """

    kind: str
    shape: tuple[int, int]
    block: int
    nested: int | None
    offset: float


def find_four_bit(stored: SafetensorsCheckpoint, config: Mapping[str, Any]) -> Found | None:
    """The weights beside a quant_state; see `stored_weights.Finder`."""
    marked = [name for name in stored.tensors if _MARK in name]
    weights = {name.partition(_MARK)[0] for name in marked}
    members = {name for name in stored.tensors if name.endswith(_ENDS)}
    if not marked and not members:
        return None
    checks, notes = Checks(stored), DecodedNotes()
    for name in sorted(members):
        weight = name.rpartition(".")[0]
        if weight not in weights:
            checks.add(name, f"has no {shown(weight)}{_MARK}nf4 or __fp4 beside it")
    texts = checks.read(marked, _MAX_JSON)
    found: dict[str, StoredWeight] = {}
    for name in marked:
        weight, _, kind = name.partition(_MARK)
        if kind not in _KINDS:
            checks.add(name, f"is of a kind that is not read, expected {' or '.join(_KINDS)}")
        elif weight in found:
            checks.add(name, f"is a second quantisation of {shown(weight)}")
        elif name in texts and checks.may_be_quantised(weight, name):
            try:
                state = _state(texts[name], kind)
            except ValueError as error:
                checks.add(name, f"is unusable: {error}")
                continue
            made = _weight(checks, weight, state, notes)
            if made is not None:
                found[weight] = made
    kinds = sorted({name.rpartition("__")[2] for name in marked} & set(_KINDS))
    method = " ".join(["bitsandbytes", *kinds])
    return Found(method, found, members | set(marked), checks.problems, notes.lines())


def _state(stored: Tensor, kind: str) -> _State:
    """Raises: ValueError for what is no JSON, or not the library's."""
    if stored.dtype != torch.uint8 or stored.dim() != 1:
        raise ValueError(f"{stored.dtype} {tuple(stored.shape)} holds no text, expected uint8 (n,)")
    entries = parse_json(bytes(stored.tolist()).decode("utf-8"))
    if not isinstance(entries, dict) or not entries.keys() >= _KEYS:
        raise ValueError(f"its JSON needs {sorted(_KEYS)}, got {quoted(entries)}")
    nested = entries.keys() & _NESTED_KEYS
    if unknown := sorted(entries.keys() - _KEYS - _NESTED_KEYS):
        raise ValueError(f"its JSON has unknown entries {quoted(unknown)}")
    if nested and nested != _NESTED_KEYS:
        raise ValueError(
            f"its JSON needs all of {sorted(_NESTED_KEYS)} or none, got {sorted(nested)}"
        )
    if entries["quant_type"] != kind:
        raise ValueError(f"its quant_type is {quoted(entries['quant_type'])}, its name says {kind}")
    shape = entries["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_size(n) for n in shape):
        raise ValueError(f"its shape must be two sizes, got {quoted(shape)}")
    sizes = [entries["blocksize"], *([entries["nested_blocksize"]] if nested else [])]
    if not all(_is_size(n) and n <= _MAX_BLOCK for n in sizes):
        raise ValueError(
            f"its block sizes must be positive integers up to {_MAX_BLOCK:,}, got {quoted(sizes)}"
        )
    offset = entries["nested_offset"] if nested else 0.0
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(f"its nested_offset must be a finite number, got {quoted(offset)}")
    if nested and entries["nested_dtype"] != "float32":
        raise ValueError(f"its nested_dtype must be float32, got {quoted(entries['nested_dtype'])}")
    rows, columns = shape
    return _State(
        kind, (rows, columns), entries["blocksize"], sizes[1] if nested else None, float(offset)
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _weight(checks: Checks, weight: str, state: _State, notes: DecodedNotes) -> StoredWeight | None:
    """The weight whose stored parts have the sizes that its state asks for, else None and problems."""
    stored, (rows, columns) = checks.stored, state.shape
    mark = f"{weight}{_MARK}{state.kind}"
    if not checks.has(mark, weight, _STORAGE):
        return None
    numel = rows * columns
    length = stored_bytes(stored.tensors[weight])
    if length != (numel + 1) // 2:
        checks.add(
            weight,
            f"has {length:,} bytes, the shape {state.shape} of its quant_state takes {(numel + 1) // 2:,}",
        )
        return None
    blocks = -(-numel // state.block)
    asked = {"quant_map": ("F32", 16), "absmax": ("F32", blocks)}
    if state.nested is not None:
        asked["absmax"] = ("U8", blocks)
        asked["nested_absmax"] = ("F32", -(-blocks // state.nested))
        asked["nested_quant_map"] = ("F32", 256)
    elif checks.stored.tensors.keys() & {f"{weight}.{name}" for name in _MEMBERS[2:]}:
        checks.add(weight, "has nested factors, of which its quant_state says nothing")
        return None
    fine = [
        checks.has(weight, f"{weight}.{name}", (kind,), (length,))
        for name, (kind, length) in asked.items()
    ]
    if not all(fine):
        return None
    parts = (weight, *(f"{weight}.{name}" for name in asked))
    reader = _Reader(weight, state)
    # A block of the library's may go over the end of a row, one of the kernels' may not.
    if state.block % _GROUP == 0 and columns % _GROUP == 0:
        nbytes = numel // 2 + numel // _GROUP * 4 + 64
        return encoded(stored, weight, state.kind, state.shape, nbytes, parts, reader.parts)
    reason = f"no kernel for bitsandbytes blocks of {state.block} in such rows"
    notes.add(reason, state.shape, sum(stored_bytes(stored.tensors[part]) for part in parts))
    return decoded(stored, weight, state.shape, parts, reader.values)


@dataclass(frozen=True)
class _Reader:
    """Turns the stored tensors of one weight into parts of nf4 and fp4, or into values."""

    weight: str
    state: _State

    def parts(self, tensors: Parts) -> Parts:
        rows, columns = self.state.shape
        packed = tensors[self.weight].contiguous().view(torch.uint8).view(rows, columns // 2)
        absmax = self._absmax(tensors).repeat_interleave(self.state.block // _GROUP)
        count = rows * columns // _GROUP  # the last block may be cut short
        return {
            "data": (packed << 4) | (packed >> 4),
            "absmax": absmax[:count].view(rows, columns // _GROUP).contiguous(),
            "table": self._table(tensors),
        }

    def values(self, tensors: Parts) -> Tensor:
        """(N, K) float32."""
        packed = tensors[self.weight].flatten().contiguous().view(torch.uint8)
        table, absmax, block = self._table(tensors), self._absmax(tensors), self.state.block
        values = torch.empty(math.prod(self.state.shape))
        # The two values of each byte, looked up as one number of 64 bits.
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=-1).view(
            torch.int64
        )
        # Whole blocks and whole bytes.
        step = 2 * block * max(1, VALUES_AT_ONCE // (2 * block))
        for begin in range(0, values.numel(), step):
            found = packed[begin // 2 : (begin + step) // 2].int()
            found = pairs.flatten().index_select(0, found).view(torch.float32)
            factors = absmax[begin // block : (begin + step) // block].repeat_interleave(block)
            place = values[begin : begin + step]
            torch.mul(found[: len(place)], factors[: len(place)], out=place)
        return values.view(self.state.shape)

    def _table(self, tensors: Parts) -> Tensor:
        part = f"{self.weight}.quant_map"
        return checked_scales(tensors[part], part, signed=True).clone()

    def _absmax(self, tensors: Parts) -> Tensor:
        part = f"{self.weight}.absmax"
        absmax = tensors[part]
        if self.state.nested is None:
            return checked_scales(absmax, part)
        factor = f"{self.weight}.nested_absmax"
        factors = checked_scales(tensors[factor], factor).repeat_interleave(self.state.nested)
        table = tensors[f"{self.weight}.nested_quant_map"]
        # In this order in float32, as the library does. A small factor may come out below 0.
        absmax = table[absmax.int()] * factors[: absmax.numel()] + self.state.offset
        return checked_scales(absmax, part, signed=True)
