"""Whether the parts of a quantised weight fit together, and what they say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllama_kernels.encodings import PLANE_TYPES, Encoding

DATA_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # bytes for the others
_SCALES = PLANE_TYPES[1:4]


def description_of(encoding: Encoding, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape, group and types of the planes. Raises: ValueError for parts that do not fit."""
    what = f"mllama_kernels.QuantizedTensor: {encoding.name}"
    if set(parts) != set(encoding.parts):
        got = ", ".join(map(str, parts)) or "nothing"
        raise ValueError(f"{what} is made of {', '.join(encoding.parts)}; got {got}")
    for name, part in parts.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"{what}: {name} must be a tensor, got a {type(part).__name__}")
        if part.requires_grad:
            raise ValueError(
                f"{what}: {name} wants a gradient, which a quantised weight cannot have; detach it"
            )
    lead = parts[encoding.parts[0]]
    for name, part in parts.items():
        if part.device != lead.device:
            raise ValueError(
                f"{what}: {name} is on {part.device}, {encoding.parts[0]} on {lead.device}"
            )
    if lead.dim() != 2:
        raise ValueError(f"{what}: {encoding.parts[0]} must be a matrix, got {_given(lead)}")
    rows, width = lead.shape
    columns, rest = divmod(width * encoding.block, encoding.bytes_per_block)
    if rest or not encoding.fits(columns):
        raise ValueError(
            f"{what}: {encoding.parts[0]} must have rows of whole blocks, of {encoding.bytes_per_block} "
            f"bytes for {encoding.block} columns, got {_given(lead)}"
        )
    _expect(
        what, encoding.parts[0], lead, (rows, width), DATA_TYPES.get(encoding.name, torch.uint8)
    )
    group, scale_type, zero_type = 0, 0, 0
    if encoding.name in ("int8", "fp8"):
        _expect(what, "scale", parts["scale"], (rows,), torch.float32)
    elif encoding.parts != ("blocks",):
        scale = parts[encoding.parts[1]]
        group = _group(what, encoding, encoding.parts[1], scale, columns)
        sizes = (rows, columns // group)
        if encoding.name == "int4":
            zero = parts["zero"]
            _expect(what, "scale", scale, sizes, *_SCALES)
            _expect(what, "zero", zero, sizes, scale.dtype, torch.uint8)
            scale_type, zero_type = PLANE_TYPES.index(scale.dtype), PLANE_TYPES.index(zero.dtype)
        else:
            _expect(what, "absmax", scale, sizes, torch.float32)
            _expect(what, "table", parts["table"], (16,), torch.float32)
    types = {"group": group, "scale_type": scale_type, "zero_type": zero_type}
    return {"shape": (rows, columns), **types}


def _group(what: str, encoding: Encoding, name: str, scale: Tensor, columns: int) -> int:
    """Columns that share a scale, by how many scales there are."""
    groups = [g for g in encoding.groups if scale.dim() == 2 and scale.shape[1] * g == columns]
    if not groups:
        expected = " or ".join(str(columns // g) for g in encoding.groups if columns % g == 0)
        raise ValueError(
            f"{what}: {name} must have {expected} columns for {columns} of the weight, got {_given(scale)}"
        )
    return groups[0]


def _expect(what: str, name: str, part: Tensor, sizes: tuple[int, ...], *dtypes: Any) -> None:
    if tuple(part.shape) == sizes and part.dtype in dtypes:
        return
    expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
    raise ValueError(f"{what}: {name} must be {sizes} {expected}, got {_given(part)}")


def _given(part: Tensor) -> str:
    return f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}"
