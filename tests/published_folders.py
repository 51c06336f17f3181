"""Folders as libraries that quantise write them: the demo's checkpoint with some weights in their formats.

A writer takes a weight (N, K) and gives the stored tensors, by the end of their names after the module, and
what a reader must make of them, in float32. Nothing of the readers is used here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllama.demo import checkpoint_path

Written = tuple[dict[str, Tensor], Tensor]

# A self and a cross layer, the self layer alone, and with them a part of the vision tower.
TEXT = r"language_model\.model\.layers\.[01]\.(self_attn|cross_attn|mlp)\.\w+_proj"
SELF_LAYERS = r"language_model\.model\.layers\.0\.(self_attn|mlp)\.\w+_proj"
TEXT_AND_VISION = rf"{TEXT}|vision_model\.global_transformer\..*\.(fc1|fc2|[qkvo]_proj)"
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12


def grouped(weight: Tensor, group: int) -> Tensor:
    return weight.float().view(weight.shape[0], -1, group)


def words(numbers: Tensor, bits: int) -> Tensor:
    """int32 (rows, n * bits / 32) of integers (rows, n), the first in the lowest bits."""
    per_word = 32 // bits
    numbers = numbers.long().view(numbers.shape[0], -1, per_word)
    packed = (numbers << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


# ------------------------------------------------------------------------------------- bitsandbytes


def text(entries: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def four_bit(
    kind: str = "nf4", *, nested: bool = True, block: int = 64, storage: torch.dtype = torch.uint8
) -> Callable[[Tensor], Written]:
    table = NF4 if kind == "nf4" else FP4

    def write(weight: Tensor) -> Written:
        numel = weight.numel()
        blocks = torch.zeros(-(-numel // block) * block)
        blocks[:numel] = weight.float().flatten()
        blocks = blocks.view(-1, block)
        absmax = blocks.abs().amax(1)
        entries: dict[str, Any] = {
            "quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)
        }  # fmt: skip
        tensors = {"weight.absmax": absmax, "weight.quant_map": table.clone()}
        if nested:
            offset = absmax.mean()
            codes = torch.linspace(-1, 1, 256)
            of_factor = torch.arange(absmax.numel()) // 256
            factors = torch.zeros(int(of_factor[-1]) + 1)
            factors.scatter_reduce_(0, of_factor, (absmax - offset).abs(), "amax")
            spread = factors[of_factor]
            numbers = (codes - ((absmax - offset) / spread)[:, None]).abs().argmin(1)
            entries |= {
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": offset.item(),
            }
            tensors["weight.absmax"] = numbers.to(torch.uint8)
            tensors |= {"weight.nested_absmax": factors, "weight.nested_quant_map": codes}
            absmax = codes[numbers] * spread + torch.tensor(offset.item())
        numbers = (table - (blocks / absmax[:, None])[..., None]).abs().argmin(-1).flatten()[:numel]
        packed = (numbers[0::2] << 4 | numbers[1::2]).to(torch.uint8)
        tensors["weight"] = packed.view(storage).view(-1, 1)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text(entries)
        spread = absmax.repeat_interleave(block)[:numel]
        return tensors, (table[numbers] * spread).view(weight.shape)

    return write


def eight_bit(weight: Tensor) -> Written:
    largest = weight.float().abs().amax(1)
    numbers = (weight.float() * (127 / largest[:, None])).round().to(torch.int8)
    tensors = {
        "weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)
    }  # fmt: skip
    return tensors, numbers.float() * (largest / 127)[:, None]


# ------------------------------------------------------------------------------ compressed-tensors


def fp8(scales: str = "rows", dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensor], Written]:
    """``scales``: "rows", "one" for a tensor, "groups" of 64 columns, or "blocks" of 48 x 80."""

    def write(weight: Tensor) -> Written:
        weight = weight.float()
        rows, columns = weight.shape
        height, width = {"rows": (1, columns), "one": (rows, columns), "groups": (1, 64)}.get(
            scales, (48, 80)
        )
        down, across = -(-rows // height), -(-columns // width)
        padded = torch.zeros(down * height, across * width)
        padded[:rows, :columns] = weight
        largest = padded.view(down, height, across, width).abs().amax((1, 3))
        scale = (largest / 448).to(dtype)
        spread = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)
        spread = spread[:rows, :columns]
        numbers = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = scale.view(()) if scales == "one" else scale
        return {"weight": numbers, "weight_scale": scale}, numbers.float() * spread

    return write


def int8(zero: bool = False) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        scale = (weight.float().abs().amax(1, keepdim=True) / 120).bfloat16()
        offset = torch.full_like(scale, 3 if zero else 0, dtype=torch.int8)
        numbers = (weight.float() / scale.float() + offset).round().clamp(-128, 127).to(torch.int8)
        tensors = {"weight": numbers, "weight_scale": scale, "weight_zero_point": offset}
        return tensors, (numbers.float() - offset) * scale.float()

    return write


def packed(
    bits: int = 4,
    group: int = 32,
    *,
    zero: bool = False,
    order: bool = False,
    negative: bool = False,
) -> Callable[[Tensor], Written]:
    """``group`` 0: one scale for a row."""

    def write(weight: Tensor) -> Written:
        rows, columns = weight.shape
        length = group or columns
        middle, most = 1 << (bits - 1), (1 << bits) - 1
        index = torch.arange(columns) // length
        if order:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
        values = weight.float()[:, index.argsort(stable=True)]
        scale = (grouped(values, length).abs().amax(-1) / middle).bfloat16()
        scale = -scale if negative else scale
        offsets = torch.full(scale.shape, middle)
        if zero:
            offsets = (torch.arange(scale.numel()) % (most + 1)).view(scale.shape)
        spread, shift = scale.float()[:, index], offsets[:, index]
        numbers = (weight.float() / spread + shift).round().clamp(0, most)
        tensors = {
            "weight_packed": words(numbers, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if zero:  # packed along the rows
            padded = torch.zeros(-(-rows * bits // 32) * 32 // bits, scale.shape[1])
            padded[:rows] = offsets
            tensors["weight_zero_point"] = words(padded.t(), bits).t().contiguous()
        if order:
            tensors["weight_g_idx"] = index.int()
        return tensors, (numbers - shift) * spread

    return write


# --------------------------------------------------------------------------------- GPTQ, AutoRound


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    subtracted: int = 1,
    zero: bool = False,
    order: bool = False,
    negative: bool = False,
    index: bool = True,
) -> Callable[[Tensor], Written]:
    """``subtracted`` from the stored zeros; ``index``: whether g_idx is written."""

    def write(weight: Tensor) -> Written:
        columns = weight.shape[1]
        length = group or columns
        middle, most = 1 << (bits - 1), (1 << bits) - 1
        g_idx = torch.arange(columns) // length
        if order:
            g_idx = g_idx[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        values = weight.float()[:, g_idx.argsort(stable=True)]
        scale = (grouped(values, length).abs().amax(-1) / middle).half()
        if negative:
            scale = torch.where(torch.arange(scale.shape[1]) % 2 == 0, -scale, scale)
        zeros = torch.full(scale.shape, middle)
        if zero:
            zeros = (1 + torch.arange(scale.numel()) % (most - 1)).view(scale.shape)
        spread, shift = scale.float()[:, g_idx], zeros[:, g_idx]
        numbers = (weight.float() / spread + shift).round().clamp(0, most)
        tensors = {
            "qweight": words(numbers, bits).t().contiguous(),
            "qzeros": words(zeros.t() - subtracted, bits),
            "scales": scale.t().contiguous(),
        }
        if index:
            tensors["g_idx"] = g_idx.int()
        return tensors, (numbers - shift) * spread

    return write


# ------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Published:
    """A kind of folder.

    Attributes:
        write: of one weight.
        config: the quantization_config.
        modules: which are quantised, a regular expression over published names.
        encoding: of the loaded weights; None: decoded.
    """

    write: Callable[[Tensor], Written]
    config: dict[str, Any] | None
    modules: str
    encoding: str | None
    older: dict[str, Any] = field(default_factory=dict)


def _compressed(kind: str, activations: Any = None, **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, **more},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["re:.*lm_head", "re:multi_modal_projector.*", "re:vision_model.*"],
    }


def _gptq(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
    } | more


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
_BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
_DYNAMIC = {"num_bits": 8, "dynamic": True}
_FLOAT, _INT, _WORDS = "float-quantized", "int-quantized", "pack-quantized"
_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [48, 80]}

FOLDERS: dict[str, Published] = {
    "bnb nf4": Published(four_bit(), _BNB, TEXT_AND_VISION, "nf4"),
    "bnb nf4 not nested": Published(four_bit(nested=False), _BNB, TEXT, "nf4"),
    "bnb nf4 of 128": Published(four_bit(block=128), _BNB, TEXT, "nf4"),
    "bnb nf4 of 4096": Published(four_bit(block=4096), _BNB, TEXT, "nf4"),
    "bnb nf4 of 32": Published(four_bit(block=32), _BNB, TEXT, None),
    "bnb nf4 in bfloat16": Published(four_bit(storage=torch.bfloat16), _BNB, TEXT, "nf4"),
    "bnb fp4": Published(four_bit("fp4"), _BNB, TEXT, "fp4"),
    "bnb int8": Published(eight_bit, _BNB8, TEXT, "int8"),
    "fp8 dynamic": Published(fp8(), _compressed(_FLOAT, _DYNAMIC), TEXT, "fp8"),
    "fp8 of tensors": Published(fp8("one", torch.float32), _compressed(_FLOAT), TEXT, "fp8"),
    "fp8 of groups": Published(fp8("groups"), _compressed(_FLOAT), TEXT, None),
    "fp8 of blocks": Published(fp8("blocks", torch.float32), _BLOCKS, TEXT, None),
    "int8": Published(int8(), _compressed(_INT, _DYNAMIC), TEXT, "int8"),
    "int8 asymmetric": Published(int8(zero=True), _compressed(_INT), TEXT, None),
    "w4a16": Published(packed(), _compressed(_WORDS), TEXT, "int4"),
    "w4a16 of rows": Published(packed(group=0), _compressed(_WORDS), TEXT, "int4"),
    "w4a16 asymmetric": Published(packed(group=64, zero=True), _compressed(_WORDS), TEXT, "int4"),
    "w4a16 in another order": Published(packed(order=True), _compressed(_WORDS), TEXT, None),
    "w4a16 of 16": Published(packed(group=16), _compressed(_WORDS), TEXT, None),
    "w4a16 of AutoRound": Published(
        packed(negative=True), _compressed(_WORDS) | {"provider": "auto-round"}, TEXT, "int4"
    ),
    "w8a16": Published(packed(8, 0), _compressed(_WORDS), TEXT, "int8"),
    "w8a16 of groups": Published(packed(8, 32, zero=True), _compressed(_WORDS), TEXT, None),
    "gptq": Published(gptq(), _gptq(checkpoint_format="gptq"), SELF_LAYERS, "int4"),
    "gptq of 128": Published(gptq(group=128), _gptq(), SELF_LAYERS, "int4"),
    "gptq asymmetric": Published(gptq(zero=True), _gptq(sym=False), SELF_LAYERS, "int4"),
    "gptq v2 asymmetric": Published(
        gptq(zero=True, subtracted=0),
        _gptq(sym=False, checkpoint_format="gptq_v2"),
        SELF_LAYERS,
        "int4",
    ),
    "gptq v2": Published(gptq(subtracted=0), _gptq(), SELF_LAYERS, "int4"),
    # Nothing says whether it is symmetric: then it is.
    "gptq v2 without sym": Published(
        gptq(subtracted=0), {"quant_method": "gptq", "bits": 4}, SELF_LAYERS, "int4"
    ),
    "gptq without a config": Published(gptq(), None, SELF_LAYERS, "int4"),
    "gptq with an older config": Published(
        gptq(zero=True), None, SELF_LAYERS, "int4", {"bits": 4, "sym": False}
    ),
    "gptq in another order": Published(gptq(order=True), _gptq(desc_act=True), SELF_LAYERS, None),
    "gptq of 8 bits": Published(gptq(8, zero=True), _gptq(bits=8, sym=False), SELF_LAYERS, None),
    "AutoRound": Published(
        gptq(negative=True), _ROUND | {"packing_format": "auto_round:auto_gptq"}, TEXT, "int4"
    ),
    "AutoRound asymmetric": Published(
        gptq(zero=True, subtracted=0, negative=True, index=False), _ROUND, TEXT, "int4"
    ),
    "AutoRound asymmetric for AutoGPTQ": Published(
        gptq(zero=True), _ROUND | {"backend": "auto_round:gptq:exllamav2"}, TEXT, "int4"
    ),
}


def write_folder(folder: Path, published: Published) -> dict[str, Tensor]:
    """Write the demo's checkpoint so quantised, and give what its weights decode to, by published name."""
    shutil.copytree(checkpoint_path(), folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    decoded = {}
    for name in list(tensors):
        module, _, member = name.rpartition(".")
        if member == "weight" and re.fullmatch(published.modules, module):
            stored, decoded[name] = published.write(tensors.pop(name))
            tensors |= {f"{module}.{end}": tensor for end, tensor in stored.items()}
    assert decoded
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if published.config is not None:
        config["quantization_config"] = published.config
    (folder / "config.json").write_text(json.dumps(config))
    if published.older:
        (folder / "quantize_config.json").write_text(json.dumps(published.older))
    return decoded
