"""The values of a quantised weight, and of activations in 8 bits, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_kernels.encodings import ENCODINGS

Parts = Mapping[str, Tensor]


def decode(encoding: str, parts: Parts) -> Tensor:
    """(N, K) float32, of the parts that `mllama_kernels.encodings.Encoding` describes; of ggml's blocks bit
    for bit what the `gguf` package decodes."""
    return _DECODERS[encoding](parts)


def round_to_int8(x: Tensor) -> Tensor:
    """x (..., K) as 8-bit integers and a scale for every 32 columns hold it, in x's dtype."""
    wide = x.float() if x.element_size() < 4 else x
    columns = x.shape[-1]
    groups = F.pad(wide, (0, -columns % 32)).unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    quants = torch.where(scale == 0, 0, groups / scale).round()
    return (quants * scale).flatten(-2)[..., :columns].to(x.dtype)


def _halves(blocks: Tensor, offset: int) -> Tensor:
    """(N, B, 1) float32, the float16 number at a byte of each block (N, B, bytes)."""
    return (
        blocks[..., offset : offset + 2]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float16)
        .float()
    )


def _blocks(encoding: str, parts: Parts) -> Tensor:
    return parts["blocks"].unflatten(1, (-1, ENCODINGS[encoding].bytes_per_block))


def _signed(data: Tensor) -> Tensor:
    return data.clone(memory_format=torch.contiguous_format).view(torch.int8)


def _q8_0(parts: Parts) -> Tensor:
    blocks = _blocks("q8_0", parts)
    return (_signed(blocks[..., 2:]).float() * _halves(blocks, 0)).flatten(1)


def _q4_0(parts: Parts) -> Tensor:
    blocks = _blocks("q4_0", parts)
    data = blocks[..., 2:]
    quants = torch.cat([data & 15, data >> 4], -1).float() - 8
    return (_halves(blocks, 0) * quants).flatten(1)


def _q4_k(parts: Parts) -> Tensor:
    blocks = _blocks("q4_k", parts)
    low, middle, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], -1).float()
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], -1).float()
    scales, minima = _halves(blocks, 0) * scales, _halves(blocks, 2) * minima
    data = blocks[..., 16:].unflatten(-1, (4, 32))
    quants = torch.stack([data & 15, data >> 4], -2).flatten(-3, -2).float()
    return (scales.unsqueeze(-1) * quants - minima.unsqueeze(-1)).flatten(1)


def _q6_k(parts: Parts) -> Tensor:
    blocks = _blocks("q6_k", parts)
    scales = _halves(blocks, 208) * _signed(blocks[..., 192:208]).float()
    low = blocks[..., :128].unflatten(-1, (2, 2, 32))
    low = torch.cat([low & 15, low >> 4], -2)  # of the four groups of each half
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -2)
    quants = (low | (high << 4)).flatten(-3).unflatten(-1, (16, 16)).float() - 32
    return (scales.unsqueeze(-1) * quants).flatten(1)


def _rows_scaled(parts: Parts) -> Tensor:
    return parts["data"].float() * parts["scale"].unsqueeze(1)


def _nibbles(data: Tensor) -> Tensor:
    return torch.stack([data & 15, data >> 4], -1).flatten(1)


def _int4(parts: Parts) -> Tensor:
    scale, zero = parts["scale"].float(), parts["zero"].float()
    quants = _nibbles(parts["data"]).float().unflatten(1, (scale.shape[1], -1))
    return ((quants - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)


def _by_table(parts: Parts) -> Tensor:
    quants, absmax = _nibbles(parts["data"]), parts["absmax"]
    values = parts["table"].index_select(0, quants.flatten().int()).view(quants.shape)
    return (values.unflatten(1, (absmax.shape[1], -1)) * absmax.unsqueeze(-1)).flatten(1)


_DECODERS: dict[str, Callable[[Parts], Tensor]] = {
    "int8": _rows_scaled,
    "fp8": _rows_scaled,
    "q8_0": _q8_0,
    "q6_k": _q6_k,
    "q4_k": _q4_k,
    "q4_0": _q4_0,
    "int4": _int4,
    "nf4": _by_table,
    "fp4": _by_table,
}
