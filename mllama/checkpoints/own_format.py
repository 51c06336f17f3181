"""Our own quantised weights in safetensors: the name of the weight with the encoding appended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.checkpoint import TensorInfo
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Found, StoredWeight
from mllama.quantization.names import part_names, split_name
from mllama.wording import quoted, shown
from mllama_kernels.encodings import ENCODINGS, Encoding
from mllama_kernels.quantized_tensor import QuantizedTensor

METHOD = "mllama_kernels"
VERSION = 1
# The entry of a folder whose scales of int8 and fp8 may be negative, as AutoRound's are: in another folder a
# negative scale is damage.
SIGNED = "signed_scales"
# By what safetensors calls them, the types that only parts have.
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


def find_own(stored: SafetensorsCheckpoint, quantization_config: Mapping[str, Any]) -> Found | None:
    """A :class:`mllama.checkpoints.stored_weights.Finder`."""
    weights: dict[tuple[str, str], dict[str, str]] = {}
    for name in stored.tensors:
        if (place := split_name(name)) is not None:
            weight, encoding, part = place
            weights.setdefault((weight, encoding), {})[part] = name
    is_named = quantization_config.get("quant_method") == METHOD
    if not weights and not is_named:
        return None
    problems: list[str] = []
    other: set[str] = set()
    own: dict[str, StoredWeight] = {}
    version = quantization_config.get("version")
    if is_named and (version != VERSION or isinstance(version, bool)):
        problems.append(
            f"config.json: quantization_config has version {quoted(version)}, this release reads {VERSION}"
        )
    if is_named and not weights:
        problems.append(f"config.json says quant_method {METHOD!r}, but no tensor is stored so")
    signed = quantization_config.get(SIGNED) is True
    for (weight, encoding), parts in weights.items():
        try:
            described = _described(stored, ENCODINGS[encoding], parts, signed)
        except ValueError as error:
            problems.append(str(error))
            other.update(parts.values())
            continue
        if weight in own:
            problems.append(
                f"{_place(stored, described)} and {_place(stored, own[weight])} are the same parameter, "
                "quantised twice"
            )
        own[weight] = described
    return Found(METHOD, own, frozenset(other), problems)


def _place(stored: SafetensorsCheckpoint, weight: StoredWeight) -> str:
    """A weight and its files, for messages."""
    files = sorted({stored.tensors[part].file for part in weight.parts})
    return f"{shown(weight.info.stored_name)} in {shown(', '.join(files))}"


def _described(
    stored: SafetensorsCheckpoint, encoding: Encoding, names: dict[str, str], signed: bool
) -> StoredWeight:
    """Raises: ValueError for parts that make no weight, as far as headers tell."""
    infos = {part: stored.tensors[name] for part, name in names.items()}
    appended = part_names(encoding.name)
    if missing := [appended[part] for part in encoding.parts if part not in infos]:
        part, there = next(iter(infos.items()))
        stem = there.stored_name.removesuffix(appended[part])
        lacking = ", ".join(shown(stem + end) for end in missing)
        raise ValueError(
            f"{shown(there.stored_name)} in {shown(there.file)} has no {lacking} beside it, which a weight "
            f"in {encoding.name} is made of too"
        )
    first = infos[encoding.parts[0]]
    try:
        outline = QuantizedTensor.from_parts(
            encoding.name, {part: _outline(info) for part, info in infos.items()}
        )
    except ValueError as error:
        raise ValueError(f"{shown(first.stored_name)} in {shown(first.file)}: {error}") from None

    def make(parts: dict[str, Tensor]) -> QuantizedTensor:
        given = {part: parts[name] for part, name in names.items()}
        for part in {"scale", "absmax", "table", "zero"} & given.keys():
            values = given[part]
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError(f"its {part} holds values that are infinite or no numbers")
            # Those of int4 may be negative (AutoRound's), and so may factors that were nested: see
            # published/bitsandbytes_four_bit.py.
            may_be_negative = signed or part != "scale" or encoding.name == "int4"
            if not may_be_negative and bool((values < 0).any()):
                raise ValueError(f"its {part} holds negative values")
        return QuantizedTensor.from_parts(encoding.name, given, pack=False)

    info = TensorInfo(
        stored_name=first.stored_name,
        file="",
        shape=tuple(outline.shape),
        dtype=None,
        dtype_name=encoding.name,
        encoding=encoding.name,
        packed_bytes=outline.nbytes,
        group=outline.group,
    )
    return StoredWeight(info, tuple(names.values()), make)


def _outline(info: TensorInfo) -> Tensor:
    """A tensor without memory, as a file announces it. Raises: ValueError for a type that no part has."""
    dtype = info.dtype or _DTYPES.get(info.dtype_name)
    if dtype is None or math.prod(info.shape) == 0:
        raise ValueError(f"no part of a quantised weight is {info.dtype_name} {quoted(info.shape)}")
    return torch.empty(info.shape, dtype=dtype, device="meta")
