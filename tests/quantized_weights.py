"""Quantised weights of every encoding for the tests: parts of random bits, or of values like a model's."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import QuantizedTensor
from mllama_kernels.encodings import ENCODINGS, GGML

# Every encoding, with the group and the planes of int4: (encoding, group, dtypes of scale and zero).
Kind = tuple[str, int, tuple[torch.dtype, ...]]
INT4: list[Kind] = [
    ("int4", 128, (torch.bfloat16, torch.uint8)),
    ("int4", 32, (torch.float16, torch.float16)),
    ("int4", 64, (torch.float32, torch.uint8)),
    ("int4", 32, (torch.float32, torch.float32)),
    ("int4", 128, (torch.bfloat16, torch.bfloat16)),
    ("int4", 64, (torch.float16, torch.uint8)),
]
KINDS: list[Kind] = [(name, 0, ()) for name in ENCODINGS if name != "int4"] + INT4[:3]
EVERY = [*KINDS, *INT4[3:]]


def kind_name(kind: Kind) -> str:
    encoding, group, dtypes = kind
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return "-".join([encoding, *([str(group)] if group else []), *words])


def columns_of(kind: Kind, about: int) -> int:
    """Whole blocks, and at least one."""
    unit = max(ENCODINGS[kind[0]].block, kind[1])
    return max(1, about // unit) * unit


def _bytes(*sizes: int) -> Tensor:
    return torch.randint(0, 256, sizes, dtype=torch.uint8)


def random_parts(kind: Kind, rows: int, columns: int) -> dict[str, Tensor]:
    """Of any bits, also those that no quantiser writes: NaN and infinite scales, minus zero, denormals."""
    encoding, group, dtypes = kind
    found = ENCODINGS[encoding]
    width = columns // found.block * found.bytes_per_block
    if encoding in GGML:
        return {"blocks": _bytes(rows, width)}

    def plane(dtype: torch.dtype, *sizes: int) -> Tensor:
        size = dtype.itemsize
        return _bytes(*sizes[:-1], sizes[-1] * size).view(dtype)

    if encoding in ("int8", "fp8"):
        dtype = torch.int8 if encoding == "int8" else torch.float8_e4m3fn
        return {"data": _bytes(rows, width).view(dtype), "scale": plane(torch.float32, rows)}
    if encoding == "int4":
        scale, zero = (plane(dtype, rows, columns // group) for dtype in dtypes)
        return {"data": _bytes(rows, width), "scale": scale, "zero": zero}
    absmax = plane(torch.float32, rows, columns // 64)
    return {"data": _bytes(rows, width), "absmax": absmax, "table": torch.randn(16)}


def like_a_model(kind: Kind, rows: int, columns: int) -> dict[str, Tensor]:
    """Parts of values of about 1 / sqrt(columns): random numbers, and scales that fit them."""
    encoding = kind[0]
    parts = random_parts(kind, rows, columns)
    size = columns**-0.5

    def scales(like: Tensor, most: float) -> Tensor:
        return ((torch.rand(like.shape) + 0.5) * size / most).to(like.dtype)

    if encoding in GGML:
        found = ENCODINGS[encoding]
        blocks = parts["blocks"].view(rows, columns // found.block, found.bytes_per_block)
        # The bytes where a float16 scale begins, and the largest product of it with the rest.
        places = {
            "q8_0": {0: 127},
            "q4_0": {0: 8},
            "q4_k": {0: 63 * 15, 2: 63},
            "q6_k": {208: 127 * 32},
        }[encoding]
        for place, most in places.items():
            scale = scales(torch.empty(rows, blocks.shape[1], 1, dtype=torch.float16), most)
            blocks[..., place : place + 2] = (
                scale.flatten().view(torch.uint8).view(rows, blocks.shape[1], 2)
            )
    elif encoding == "fp8":
        data = torch.randn(rows, columns) * 100
        parts = {"data": data.to(torch.float8_e4m3fn), "scale": scales(parts["scale"], 200)}
    elif encoding == "int8":
        parts["scale"] = scales(parts["scale"], 127)
    elif encoding == "int4":
        parts["scale"] = scales(parts["scale"], 8)
        zero = parts["zero"]
        parts["zero"] = torch.randint(4, 12, zero.shape).to(zero.dtype)
    else:
        parts["absmax"] = scales(parts["absmax"], 1)
        parts["table"] = torch.linspace(-1, 1, 16)
    return parts


def random_weight(
    kind: Kind, rows: int, columns: int, device: torch.device | str = "cpu"
) -> QuantizedTensor:
    """A weight of :func:`like_a_model`."""
    parts = like_a_model(kind, rows, columns)
    return QuantizedTensor.from_parts(kind[0], {n: p.to(device) for n, p in parts.items()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)
