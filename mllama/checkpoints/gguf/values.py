"""From the bytes of a tensor to what a parameter is filled with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mllama.checkpoints.gguf.types import GgmlType
from mllama.checkpoints.meta_layout import halves_from_pairs
from mllama_kernels.quantized_decoding import decode
from mllama_kernels.quantized_tensor import QuantizedTensor

_AT_ONCE = 2**22  # elements, whose indices and halves take some ten times their bytes


def packed(
    data: Tensor, kind: GgmlType, shape: tuple[int, ...], heads: int | None
) -> QuantizedTensor:
    """A quantised weight of its blocks; with ``heads`` its rows are taken from pairs to halves.

    Args:
        data: uint8, the bytes of the tensor.
    """
    blocks = _in_order(data.reshape(shape[0], -1), heads)
    assert kind.encoding is not None
    return QuantizedTensor.from_blocks(blocks, kind.encoding, pack=False)


def plain(data: Tensor, kind: GgmlType, shape: tuple[int, ...], heads: int | None) -> Tensor:
    """A tensor of its bytes: as it is stored, or of blocks as float32."""
    if kind.dtype is not None:
        values = data.view(kind.dtype).reshape(shape)
    else:
        values = torch.empty(math.prod(shape), dtype=torch.float32, device="cpu")
        step = _AT_ONCE // kind.block
        for blocks, into in zip(
            data.reshape(-1, kind.nbytes).split(step), values.split(step * kind.block)
        ):
            if kind.decode is not None:
                into.copy_(kind.decode(blocks).flatten())
            else:
                assert kind.encoding is not None
                into.copy_(decode(kind.encoding, {"blocks": blocks}).flatten())
        values = values.reshape(shape)
    return _in_order(values, heads)


def _in_order(rows: Tensor, heads: int | None) -> Tensor:
    return rows if heads is None else halves_from_pairs(rows, heads)
