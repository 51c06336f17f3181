"""What is done to one weight of a folder that somebody else has quantised, and what an error must name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from published_folders import text
from torch import Tensor

Tensors = dict[str, Tensor]

MODULE = "language_model.model.layers.0.mlp.down_proj"  # (128, 256)
NORM = "language_model.model.layers.0.input_layernorm"
_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Case:
    """Attributes:
    kind: of `published_folders.FOLDERS`.
    change: of the tensors.
    words: that the error has, beside the file's name.
    built: whether only the data tells, so that the model is there already.
    """

    kind: str
    change: Callable[[Tensors], None]
    words: tuple[str, ...]
    built: bool = False


def put(end: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{MODULE}.{end}": value})


def drop(*ends: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for end in ends:
            del tensors[f"{MODULE}.{end}"]

    return change


def edit(end: str, how: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{end}"] = how(tensors[f"{MODULE}.{end}"]).contiguous()

    return change


def set_first(end: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{end}"].flatten()[0] = value

    return change


def state(**entries: Any) -> Callable[[Tensors], None]:
    """Change entries of the JSON; None removes one."""

    def how(stored: Tensor) -> Tensor:
        found = json.loads(bytes(stored.tolist())) | entries
        return text({key: value for key, value in found.items() if value is not None})

    return edit(_STATE, how)


def raw(data: bytes) -> Callable[[Tensors], None]:
    return put(_STATE, torch.tensor(list(data), dtype=torch.uint8))


def both(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for one in changes:
            one(tensors)

    return change


def norm(*ends: str) -> Callable[[Tensors], None]:
    """Quantise a norm as the module is."""

    def change(tensors: Tensors) -> None:
        del tensors[f"{NORM}.weight"]
        for end in ends:
            tensors[f"{NORM}.{end}"] = tensors[f"{MODULE}.{end}"].clone()

    return change


def cut(tensor: Tensor) -> Tensor:
    return tensor[: len(tensor) // 2]


NAN, INF = float("nan"), float("inf")
_BNB = ("weight", "weight.absmax", "weight.quant_map", _STATE)
_NESTED = (*_BNB, "weight.nested_absmax", "weight.nested_quant_map")
_PACKED = ("weight_packed", "weight_scale", "weight_shape")
_GPTQ = ("qweight", "qzeros", "scales", "g_idx")

CASES: dict[str, Case] = {
    # bitsandbytes, 4 bits
    "bytes cut": Case(
        "bnb nf4", edit("weight", cut), ("down_proj.weight", "8,192 bytes", "16,384")
    ),
    "bytes in int64": Case("bnb nf4", edit("weight", lambda t: t.long()), ("I64", "expected U8")),
    "no bytes": Case("bnb nf4", drop("weight"), ("has no", "down_proj.weight")),
    "absmax cut": Case("bnb nf4", edit("weight.absmax", cut), ("absmax", "(256,)", "(512,)")),
    "absmax in float": Case("bnb nf4", edit("weight.absmax", torch.Tensor.float), ("F32", "U8")),
    "absmax in half": Case(
        "bnb nf4 not nested", edit("weight.absmax", torch.Tensor.half), ("F16", "expected F32")
    ),
    "no absmax": Case("bnb nf4", drop("weight.absmax"), ("has no", "weight.absmax")),
    "no table": Case("bnb nf4", drop("weight.quant_map"), ("has no", "weight.quant_map")),
    "table of 15": Case("bnb nf4", edit("weight.quant_map", lambda t: t[:15]), ("(15,)", "(16,)")),
    "nested without its map": Case(
        "bnb nf4", drop("weight.nested_quant_map"), ("has no", "nested_quant_map")
    ),
    "nested without its factors": Case(
        "bnb nf4", drop("weight.nested_absmax"), ("has no", "nested_absmax")
    ),
    "nested map of 16": Case(
        "bnb nf4", edit("weight.nested_quant_map", lambda t: t[:16]), ("(16,)", "(256,)")
    ),
    "nested that is not said": Case(
        "bnb nf4",
        state(nested_blocksize=None, nested_dtype=None, nested_offset=None),
        ("nested factors", "says nothing"),
    ),
    "no state": Case("bnb nf4", drop(_STATE), ("has no", "bitsandbytes__nf4")),
    "state of nothing": Case("bnb nf4", raw(b""), ("bitsandbytes__nf4", "unusable")),
    "state of blanks": Case("bnb nf4", raw(b" " * 100), ("bitsandbytes__nf4", "unusable")),
    "state cut": Case("bnb nf4", edit(_STATE, cut), ("bitsandbytes__nf4", "unusable")),
    "state of a megabyte": Case("bnb nf4", raw(b" " * 2**20), ("4,096 bytes",)),
    "state in no UTF-8": Case("bnb nf4", raw(b"\xff\xfe{}"), ("bitsandbytes__nf4", "unusable")),
    "state of lists": Case("bnb nf4", raw(b"[" * 4000), ("bitsandbytes__nf4", "unusable")),
    "state of a list": Case("bnb nf4", raw(b"[]"), ("its JSON needs",)),
    "state of a key twice": Case("bnb nf4", raw(b'{"shape":[1,2],"shape":[1,2]}'), ("same key",)),
    "state of floats": Case("bnb nf4", edit(_STATE, torch.Tensor.float), ("holds no text",)),
    "state of two dimensions": Case(
        "bnb nf4", edit(_STATE, lambda t: t[None]), ("bitsandbytes__nf4", "holds no text")
    ),
    "state without a shape": Case("bnb nf4", state(shape=None), ("its JSON needs",)),
    "state with more": Case("bnb nf4", state(code="x"), ("unknown entries", "code")),
    "state with half of nested": Case("bnb nf4", state(nested_offset=None), ("all of",)),
    "shape lies": Case("bnb nf4", state(shape=[128, 128]), ("16,384 bytes", "(128, 128)")),
    "shape turned": Case("bnb nf4", state(shape=[256, 128]), ("(256, 128)", "(128, 256)")),
    "shape of 2^62": Case("bnb nf4", state(shape=[2**62, 4]), ("bytes, the shape",)),
    "shape of 2^70": Case("bnb nf4", state(shape=[2**70, 4]), ("two sizes",)),
    "shape of digits": Case("bnb nf4", raw(b'{"shape":[' + b"9" * 3000 + b"]}"), ("JSON needs",)),
    "shape negative": Case("bnb nf4", state(shape=[-128, -256]), ("two sizes", "-128")),
    "shape of 0": Case("bnb nf4", state(shape=[0, 256]), ("two sizes",)),
    "shape of floats": Case("bnb nf4", state(shape=[128.0, 256]), ("two sizes",)),
    "shape of bools": Case("bnb nf4", state(shape=[True, 32768]), ("two sizes",)),
    "shape of three": Case("bnb nf4", state(shape=[1, 128, 256]), ("two sizes",)),
    "shape of text": Case("bnb nf4", state(shape="128x256"), ("two sizes",)),
    "blocks of 0": Case("bnb nf4", state(blocksize=0), ("positive integers",)),
    "blocks of -64": Case("bnb nf4", state(blocksize=-64), ("positive integers",)),
    "blocks of 2^70": Case("bnb nf4", state(blocksize=2**70), ("positive integers",)),
    "blocks without end": Case(
        "bnb nf4",
        both(
            state(blocksize=2**40),
            edit("weight.absmax", lambda t: t[:1]),
            edit("weight.nested_absmax", lambda t: t[:1]),
        ),
        ("bitsandbytes__nf4", "up to 4,096"),
    ),
    "nested blocks without end": Case(
        "bnb nf4",
        both(state(nested_blocksize=2**40), edit("weight.nested_absmax", lambda t: t[:1])),
        ("bitsandbytes__nf4", "up to 4,096"),
    ),
    "blocks that lie": Case("bnb nf4", state(blocksize=128), ("absmax", "(512,)", "(256,)")),
    "nested blocks of 0": Case("bnb nf4", state(nested_blocksize=0), ("positive integers",)),
    "nested blocks that lie": Case(
        "bnb nf4", state(nested_blocksize=64), ("nested_absmax", "(8,)")
    ),
    "nested in half": Case("bnb nf4", state(nested_dtype="float16"), ("nested_dtype",)),
    "nested offset of text": Case("bnb nf4", state(nested_offset="0"), ("nested_offset",)),
    "nested offset of NaN": Case("bnb nf4", raw(b'{"nested_offset":NaN}'), ("unusable",)),
    "another kind": Case("bnb nf4", state(quant_type="fp4"), ("quant_type", "nf4")),
    "two states": Case(
        "bnb nf4",
        lambda t: t.update({f"{MODULE}.weight.quant_state.bitsandbytes__fp4": text({})}),
        ("bitsandbytes__",),
    ),
    "an unknown kind": Case(
        "bnb nf4",
        lambda t: t.update(
            {f"{MODULE}.weight.quant_state.bitsandbytes__int3": t.pop(f"{MODULE}.{_STATE}")}
        ),
        ("bitsandbytes__int3", "not read"),
    ),
    "a norm in nf4": Case("bnb nf4", norm(*_NESTED), ("input_layernorm", "norms")),
    "absmax of NaN": Case(
        "bnb nf4 not nested", set_first("weight.absmax", NAN), ("absmax", "nan"), True
    ),
    "absmax negative": Case(
        "bnb nf4 not nested", set_first("weight.absmax", -1), ("absmax", "-1"), True
    ),
    "absmax infinite": Case(
        "bnb nf4 not nested", set_first("weight.absmax", INF), ("absmax", "inf"), True
    ),
    "nested absmax negative": Case(
        "bnb nf4", set_first("weight.nested_absmax", -1), ("nested_absmax",), True
    ),
    "nested map infinite": Case(
        "bnb nf4", edit("weight.nested_quant_map", lambda t: t * INF), ("absmax",), True
    ),
    "table of NaN": Case("bnb nf4", set_first("weight.quant_map", NAN), ("quant_map", "nan"), True),
    # bitsandbytes, 8 bits
    "SCB cut": Case("bnb int8", edit("SCB", cut), ("SCB", "(64,)", "(128,)")),
    "SCB in half": Case("bnb int8", edit("SCB", torch.Tensor.half), ("SCB", "F16", "F32")),
    "SCB without a weight": Case("bnb int8", drop("weight"), ("SCB", "has no")),
    "no SCB": Case("bnb int8", drop("SCB"), ("down_proj.weight", "I8", "SCB")),
    "SCB of floats": Case("bnb int8", edit("weight", torch.Tensor.float), ("F32", "I8")),
    "turned for old GPUs": Case(
        "bnb int8", put("weight_format", torch.tensor(2).byte()), ("row by row",)
    ),
    "SCB negative": Case("bnb int8", set_first("SCB", -1), ("SCB", "-1"), True),
    "SCB of NaN": Case("bnb int8", set_first("SCB", NAN), ("SCB", "nan"), True),
    "SCB and scale": Case(
        "bnb int8", put("weight_scale", torch.ones(128, 1)), ("quantised twice",)
    ),
    "int8 of one dimension": Case(
        "bnb int8", edit("weight", torch.Tensor.flatten), ("(32768,)", "(N, K)")
    ),
    # compressed-tensors, 8 bits
    "no scale": Case(
        "fp8 dynamic", drop("weight_scale"), ("down_proj.weight", "F8_E4M3", "no weight_scale")
    ),
    "fp8 of another kind": Case(
        "fp8 dynamic",
        edit("weight", lambda t: t.float().to(torch.float8_e5m2)),
        ("down_proj.weight", "F8_E5M2", "expected F8_E4M3 (float8_e4m3fn)"),
    ),
    "a scale beside bytes": Case(
        "fp8 dynamic",
        edit("weight", lambda t: t.view(torch.uint8)),
        ("down_proj.weight", "U8", "expected F8_E4M3 (float8_e4m3fn) or I8"),
    ),
    "scales cut": Case(
        "fp8 dynamic", edit("weight_scale", cut), ("weight_scale", "(64, 1)", "(128, 1)")
    ),
    "scales of none": Case(
        "fp8 dynamic", put("weight_scale", torch.ones(128, 0)), ("weight_scale", "(128, 0)")
    ),
    "scales in int32": Case(
        "fp8 dynamic", edit("weight_scale", torch.Tensor.int), ("weight_scale", "I32")
    ),
    "scales of powers of two": Case(
        "fp8 dynamic", edit("weight_scale", torch.Tensor.byte), ("MX",)
    ),
    "scales twice": Case("fp8 dynamic", put("weight_scale_inv", torch.ones(1)), ("two scales",)),
    "scale of NaN": Case(
        "fp8 dynamic", set_first("weight_scale", NAN), ("weight_scale", "nan"), True
    ),
    "scale negative": Case(
        "fp8 dynamic", set_first("weight_scale", -1), ("weight_scale", "-1"), True
    ),
    "scale infinite": Case("int8", set_first("weight_scale", INF), ("weight_scale", "inf"), True),
    "fp8 with a zero point": Case(
        "fp8 dynamic",
        put("weight_zero_point", torch.ones(128, 1).char()),
        ("weight_zero_point", "FP8"),
    ),
    "zero points cut": Case(
        "int8 asymmetric", edit("weight_zero_point", cut), ("weight_zero_point", "(64, 1)")
    ),
    "a norm in fp8": Case(
        "fp8 dynamic", norm("weight", "weight_scale"), ("input_layernorm", "norms")
    ),
    "blocks that config.json does not name": Case(
        "fp8 dynamic", put("weight_scale", torch.ones(3, 4)), ("(3, 4)", "expected (128, 1)")
    ),
    # compressed-tensors, packed
    "weight_shape lies": Case(
        "w4a16", put("weight_shape", torch.tensor([128, 512])), ("(128, 512)", "(128, 32)")
    ),
    "weight_shape turned": Case(
        "w4a16", put("weight_shape", torch.tensor([256, 128])), ("(256, 128)",)
    ),
    "weight_shape negative": Case(
        "w4a16", put("weight_shape", torch.tensor([-1, 256])), ("(-1, 256)", "two sizes")
    ),
    "weight_shape of 2^62": Case(
        "w4a16", put("weight_shape", torch.tensor([2**62, 2**62])), ("neither 4 nor 8",)
    ),
    "weight_shape of three": Case(
        "w4a16", put("weight_shape", torch.tensor([1, 128, 256])), ("(3,)", "(2,)")
    ),
    "weight_shape of floats": Case(
        "w4a16", put("weight_shape", torch.tensor([128.0, 256])), ("F32", "I64")
    ),
    "no weight_shape": Case("w4a16", drop("weight_shape"), ("has no", "weight_shape")),
    "no weight_scale": Case("w4a16", drop("weight_scale"), ("has no", "weight_scale")),
    "words cut": Case("w4a16", edit("weight_packed", cut), ("(64, 32)", "neither 4 nor 8")),
    "groups that do not divide": Case(
        "w4a16", put("weight_scale", torch.ones(128, 7)), ("(128, 7)", "equal groups")
    ),
    "no groups": Case(
        "w4a16", put("weight_scale", torch.ones(128, 0)), ("(128, 0)", "equal groups")
    ),
    "zeros cut": Case(
        "w4a16 asymmetric", edit("weight_zero_point", cut), ("weight_zero_point", "(16, 4)")
    ),
    "zeros beyond": Case(
        "w4a16",
        put("weight_zero_point", torch.full((128, 8), 100).char()),
        ("beyond 4 bits",),
        True,
    ),
    "order beyond": Case(
        "w4a16 in another order", set_first("weight_g_idx", 8), ("weight_g_idx", "0 to 7")
    ),
    "order negative": Case(
        "w4a16 in another order", set_first("weight_g_idx", -2), ("weight_g_idx", "-2")
    ),
    "order cut": Case(
        "w4a16 in another order", edit("weight_g_idx", cut), ("weight_g_idx", "(128,)", "(256,)")
    ),
    "order in floats": Case(
        "w4a16 in another order", edit("weight_g_idx", torch.Tensor.float), ("weight_g_idx", "F32")
    ),
    "packed scale of NaN": Case(
        "w4a16", set_first("weight_scale", NAN), ("weight_scale", "nan"), True
    ),
    "packed scale negative": Case(
        "w4a16", set_first("weight_scale", -1), ("weight_scale", "-1"), True
    ),
    "packed and plain": Case(
        "w4a16", put("weight", torch.ones(128, 256)), ("quantised and plain",)
    ),
    "packed and GPTQ": Case(
        "w4a16",
        both(
            put("qweight", torch.ones(32, 128).int()),
            put("scales", torch.ones(8, 128)),
            put("qzeros", torch.ones(8, 16).int()),
        ),
        ("quantised twice",),
    ),
    "a norm in w4a16": Case("w4a16", norm(*_PACKED), ("input_layernorm", "norms")),
    # GPTQ
    "no qzeros": Case("gptq", drop("qzeros"), ("has no", "qzeros")),
    "no scales": Case("gptq", drop("scales"), ("has no", "scales")),
    "qweight cut": Case("gptq", edit("qweight", cut), ("down_proj", "g_idx")),
    "qweight in int64": Case("gptq", edit("qweight", torch.Tensor.long), ("qweight", "I64", "I32")),
    "qweight of nothing": Case("gptq", put("qweight", torch.ones(0, 128).int()), ("(0, 128)",)),
    "qweight of one dimension": Case(
        "gptq", edit("qweight", torch.Tensor.flatten), ("qweight", "(4096,)")
    ),
    "scales of GPTQ cut": Case("gptq", edit("scales", cut), ("(4, 128)", "4 or 8 bits")),
    "scales of another width": Case(
        "gptq", edit("scales", lambda t: t[:, :64]), ("(8, 64)", "4 or 8 bits")
    ),
    "qzeros cut": Case("gptq", edit("qzeros", lambda t: t[:, :7]), ("(8, 7)", "4 or 8 bits")),
    "three groups": Case(
        "gptq",
        both(edit("scales", lambda t: t[:3]), edit("qzeros", lambda t: t[:3])),
        ("3 groups", "256 columns"),
    ),
    "g_idx beyond": Case("gptq", set_first("g_idx", 8), ("g_idx", "0 to 7")),
    "g_idx of 2^31": Case("gptq", set_first("g_idx", 2**31 - 1), ("g_idx", "0 to 7")),
    "g_idx negative": Case("gptq", set_first("g_idx", -1), ("g_idx", "-1")),
    "g_idx cut": Case("gptq", edit("g_idx", cut), ("g_idx", "(128,)", "(256,)")),
    "GPTQ scale of NaN": Case("gptq", set_first("scales", NAN), ("scales", "nan"), True),
    "GPTQ scale negative": Case("gptq", set_first("scales", -1), ("scales", "-1"), True),
    "AutoRound scale of NaN": Case("AutoRound", set_first("scales", NAN), ("scales", "nan"), True),
    "AutoRound scale infinite": Case(
        "w4a16 of AutoRound", set_first("weight_scale", -INF), ("weight_scale", "-inf"), True
    ),
    "GPTQ and plain": Case("gptq", put("weight", torch.ones(128, 256)), ("quantised and plain",)),
    "a norm in GPTQ": Case("gptq", norm(*_GPTQ), ("input_layernorm", "norms")),
}
