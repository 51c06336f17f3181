"""What else multiplies by quantised weights: PyTorch's packs and bitsandbytes, which hold the codes of the
case, and torchao, which quantises the decoded weight itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Arguments, Impl, Setting
from benchmarks.peers import compiled, from_package
from benchmarks.random_codes import GROUP
from mllama_kernels import QuantizedTensor

BNB_BLOCK = 64  # values that share an absmax
INNER_TILES = 8  # of the layout of 4-bit weights on a GPU; a CPU has one layout


def of(setting: Setting, encoding: str) -> list[Impl]:
    """Those that have such an encoding."""
    if encoding == "int8":
        return [_int8_pack(), _torchao(setting, "torchao int8, compiled", _int8_config)]
    if encoding == "int4":
        return [_int4_pack(setting), _torchao(setting, "torchao int4, compiled", _int4_config)]
    return [_bitsandbytes(setting, encoding)] if encoding in ("nf4", "fp4") else []


def _int8_pack() -> Impl:
    """What torchao runs on a CPU."""

    def prepare(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Arguments:
        return x, weight.data.contiguous(), weight.scale.to(x.dtype)

    return Impl("aten _weight_int8pack_mm", torch.ops.aten._weight_int8pack_mm, prepare)


def _int4_pack(setting: Setting) -> Impl:
    """What torchao runs: (q - 8) * scale + zero."""
    name = "_weight_int4pack_mm" if setting.on_gpu else "_weight_int4pack_mm_for_cpu"
    multiply = getattr(torch.ops.aten, name)

    def prepare(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Arguments:
        parts = weight.parts()
        data, scale = parts["data"], parts["scale"].to(x.dtype)
        zero = (8 - parts["zero"].to(x.dtype)) * scale
        if setting.on_gpu:
            swapped = (data << 4) | (data >> 4)
            packed = torch.ops.aten._convert_weight_to_int4pack(swapped, INNER_TILES)
        else:
            codes = torch.stack([data & 15, data >> 4], -1).flatten(1).int()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return x, packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()

    return Impl(f"aten {name}", lambda x, packed, both: multiply(x, packed, GROUP, both), prepare)


def _int8_config(torchao: Any) -> Any:
    return torchao.Int8WeightOnlyConfig()


def _int4_config(torchao: Any) -> Any:
    return torchao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")


def _torchao(setting: Setting, name: str, config: Callable[[Any], Any]) -> Impl:
    """A linear that torchao has quantised itself, of the decoded weight."""

    def make(torchao: Any) -> Callable[..., Any]:
        config(torchao)  # what it lacks is said before anything is made
        return compiled(lambda linear, x: linear(x)).call

    def prepare(x: Tensor, _: QuantizedTensor, decoded: Tensor) -> Arguments:
        import torchao.quantization as torchao

        n, k = decoded.shape
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = nn.Parameter(decoded.clone(), requires_grad=False)
        torchao.quantize_(linear, config(torchao))
        return linear, x

    return from_package(setting, name, "torchao.quantization", make, prepare)


def _bitsandbytes(setting: Setting, encoding: str) -> Impl:
    def prepare(x: Tensor, weight: QuantizedTensor, _: Tensor) -> Arguments:
        from bitsandbytes.functional import QuantState

        parts = weight.parts()
        data = parts["data"]
        state = QuantState(
            parts["absmax"].flatten(),
            weight.shape,
            parts["table"],
            BNB_BLOCK,
            encoding,
            x.dtype,
        )
        return x, ((data << 4) | (data >> 4)).view(-1, 1), state

    return from_package(
        setting, "bitsandbytes", "bitsandbytes", lambda package: package.matmul_4bit, prepare
    )
