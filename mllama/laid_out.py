"""How weights lie in memory: several as the rows of one matrix, each of which is a tensor of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllama_kernels.quantized_tensor import QuantizedTensor


def can_be_joined(weights: list[Tensor]) -> bool:
    """Whether weights can be laid out as the rows of one matrix, and nobody else knows where they are now:
    those that share their memory with anything, of this process or another, stay in it."""
    if not all(type(weight) is nn.Parameter for weight in weights):
        return False
    memories = [weight.untyped_storage() for weight in weights]
    whole = sum(weight.nbytes for weight in weights)
    return (
        len({(w.dtype, w.device, w.shape[1], w.is_inference()) for w in weights}) == 1
        and len({memory.data_ptr() for memory in memories}) == len(weights)
        and memories[0].nbytes() in (weights[0].nbytes, whole)
        and all(m.nbytes() == w.nbytes for m, w in zip(memories[1:], weights[1:]))
        and not (weights[0].is_cpu and any(memory.is_shared() for memory in memories))
    )


def joined_matrix(weights: list[Tensor]) -> Tensor | None:
    """The weights (n, in) as one matrix; None where their memory is not that of one: each begins where the
    one before it ends, in the allocation of the first."""
    first, rows = weights[0], 0
    if type(first) is not nn.Parameter:  # of functional calls, perhaps without any memory
        return None
    end = first.data_ptr()
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.data_ptr() != end:
            return None
        if not weight.is_contiguous():
            return None
        end += weight.nbytes
        rows += weight.shape[0]
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None
    width = first.shape[1]
    return first.as_strided((rows, width), (width, 1))


def joined_rows(
    weights: list[QuantizedTensor],
) -> tuple[QuantizedTensor, list[QuantizedTensor]] | None:
    """Weights of one encoding as the rows of one weight, in its memory; None where they cannot be."""
    if len(weights) == 1:
        return weights[0], weights
    try:
        whole = QuantizedTensor.cat(weights)
    except ValueError:  # 4-bit tables that differ
        return None
    rows, begin = [], 0
    for weight in weights:
        rows.append(whole.rows(begin, begin + weight.shape[0]))
        begin += weight.shape[0]
    own = [part.planes[0].untyped_storage().data_ptr() for part in rows]
    return (whole, rows) if set(own) == {whole.planes[0].untyped_storage().data_ptr()} else None


def lay_out(weights: list[Tensor]) -> None:
    """Let the weights be the rows of one matrix, in new memory."""
    # A tensor of inference mode cannot take over the memory of another kind, nor the reverse.
    with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
        rows = rows_of_one(torch.cat(weights), [len(weight) for weight in weights])
        for weight, part in zip(weights, rows, strict=True):
            weight.data = part


def rows_of_one(whole: Tensor, sizes: list[int]) -> list[Tensor]:
    """Its rows in parts, in its memory, of which the first has all and each of the others a storage of its
    own: what saves models takes tensors of one storage for the same, and keeps one of them."""
    first, *others = whole.split(sizes)
    if whole.is_meta:  # which has no memory
        return [first, *others]
    return [first, *map(in_own_storage, others)]


def in_own_storage(part: Tensor) -> Tensor:
    """A contiguous tensor with a storage that ends where it ends, in the same memory."""
    begin = part.storage_offset() * part.element_size()
    own = part.untyped_storage()[begin : begin + part.nbytes]
    return part.new_empty(0).set_(own, 0, part.shape, part.stride())
