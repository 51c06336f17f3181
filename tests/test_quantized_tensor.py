"""QuantizedTensor: its parts, its layouts and its values."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import SIMULATED
from numerics import opcheck, simulated_share
from quantized_weights import (
    EVERY,
    INT4,
    Kind,
    columns_of,
    kind_name,
    like_a_model,
    random_parts,
    random_weight,
    same_bits,
)

from mllama_kernels import QuantizedTensor, _dispatch
from mllama_kernels.encodings import CODES, ENCODINGS, GGML
from mllama_kernels.quantized_decoding import decode, round_to_int8

every_kind = pytest.mark.parametrize("kind", EVERY, ids=kind_name)
ONE_OF_EACH_FORM: list[Kind] = [("q4_k", 0, ()), ("int8", 0, ()), ("nf4", 0, ()), INT4[0]]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def on(device, parts):
    return {name: part.to(device) for name, part in parts.items()}


@every_kind
def test_autocast_leaves_the_parts_as_they_are(device, kind):
    parts = random_parts(kind, 24, columns_of(kind, 300))
    with torch.autocast(device.type, torch.bfloat16):
        weight = QuantizedTensor.from_parts(kind[0], on(device, parts))
        found = weight.parts()
        some = weight.rows(3, 20).parts()  # packed anew
        again = QuantizedTensor.cat([weight.rows(0, 3), weight.rows(3)]).parts()
    for name, part in parts.items():
        assert same_bits(found[name].cpu(), part) and same_bits(again[name].cpu(), part)
        assert same_bits(some[name].cpu(), part if name == "table" else part[3:20])


@simulated_share(2)
@every_kind
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 16, 33])
def test_every_bit_of_the_parts_comes_back(device, kind, rows):
    for about in (1, 300, 1100):
        parts = random_parts(kind, rows, columns_of(kind, about))
        weight = QuantizedTensor.from_parts(kind[0], on(device, parts))
        assert weight.is_packed and weight.device.type == device.type
        assert weight.shape == (rows, columns_of(kind, about)) and weight.group in (0, kind[1], 64)
        back = weight.parts()
        assert list(back) == list(ENCODINGS[kind[0]].parts)
        assert all(same_bits(back[name].cpu(), part) for name, part in parts.items())


@pytest.mark.parametrize("encoding", sorted(GGML))
def test_values_are_those_of_the_gguf_package(device, encoding):
    """Of any bits: scales that are not finite, denormal, minus zero."""
    gguf = pytest.importorskip("gguf")
    kind = (encoding, 0, ())
    blocks = random_parts(kind, 37, 1024)["blocks"]
    type_ = gguf.GGMLQuantizationType[encoding.upper()]
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), type_))
    weight = QuantizedTensor.from_blocks(blocks.to(device), encoding)
    for values in (weight.dequantize().cpu(), weight.decoded().cpu()):
        finite = ~expected.isnan()
        assert torch.equal(values.isnan(), ~finite)
        assert same_bits(values[finite], expected[finite])
    assert torch.equal(weight.blocks().cpu(), blocks)
    bytes_per_block = ENCODINGS[encoding].bytes_per_block
    assert gguf.GGML_QUANT_SIZES[type_] == (ENCODINGS[encoding].block, bytes_per_block)


def test_values_are_what_the_parts_say():
    data = torch.tensor([[0x21, 0xF0]] * 2, dtype=torch.uint8).repeat(1, 32)
    quants = torch.tensor([1.0, 2.0, 0.0, 15.0]).repeat(32)
    zero = torch.tensor([[1.5], [8]]).bfloat16().repeat(1, 2)
    scale = torch.tensor([[-2.0], [0.5]]).bfloat16().repeat(1, 2)
    int4 = QuantizedTensor.from_parts("int4", {"data": data, "scale": scale, "zero": zero})
    assert torch.equal(int4.dequantize(), torch.stack([(quants - 1.5) * -2, (quants - 8) * 0.5]))
    table, absmax = torch.randn(16), torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
    nf4 = QuantizedTensor.from_parts("nf4", {"data": data, "absmax": absmax, "table": table})
    expected = table[quants.long()] * absmax.repeat_interleave(64, 1)
    assert torch.equal(nf4.dequantize(), expected)
    scale = torch.tensor([0.5, -3.0])
    numbers = torch.tensor([[-128, 127, 0], [1, -1, 7]], dtype=torch.int8)
    int8 = QuantizedTensor.from_parts("int8", {"data": numbers, "scale": scale})
    assert torch.equal(int8.dequantize(), numbers.float() * scale[:, None])
    fp8 = QuantizedTensor.from_parts(
        "fp8", {"data": numbers.to(torch.float8_e4m3fn), "scale": scale}
    )
    assert torch.equal(fp8.dequantize(), numbers.to(torch.float8_e4m3fn).float() * scale[:, None])


@simulated_share(2)
@every_kind
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_the_kernel_decodes_as_plain_pytorch_does(device, kind, dtype):
    for parts in (random_parts, like_a_model):
        given = parts(kind, 21, columns_of(kind, 600))
        weight = QuantizedTensor.from_parts(kind[0], on(device, given))
        expected = decode(kind[0], given).to(dtype)
        values = weight.dequantize(dtype).cpu()
        finite = ~expected.isnan()
        assert torch.equal(values.isnan(), ~finite)
        assert same_bits(values[finite], expected[finite])
        some = weight.dequantize(dtype, 5, 18).cpu()
        assert same_bits(some[finite[5:18]], expected[5:18][finite[5:18]])
        assert weight.dequantize(dtype, 7, 7).shape == (0, weight.shape[1])


@pytest.mark.parametrize("pack", [True, False])
def test_it_decodes_to_floats_alone(device, pack):
    parts = random_weight(("q8_0", 0, ()), 9, 64, device).parts()
    weight = QuantizedTensor.from_parts("q8_0", parts, pack=pack)
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(
            RuntimeError, match="dtype must be float32, float16, bfloat16 or float64"
        ):
            weight.dequantize(dtype)


@every_kind
def test_rows_and_their_joining(device, kind):
    whole = random_weight(kind, 40, columns_of(kind, 300), device)
    for begin, end in ((0, 40), (0, 16), (16, 40), (8, 24), (3, 11), (40, 40), (5, 5)):
        part = whole.rows(begin, end)
        assert part.shape == (end - begin, whole.shape[1]) and part.encoding == whole.encoding
        expected = whole.parts()
        for name, value in part.parts().items():
            assert same_bits(
                value, expected[name] if name == "table" else expected[name][begin:end]
            )
    first, last = whole.rows(0, 16), whole.rows(16)  # whole tiles, which are views
    assert first.planes[0].data_ptr() == whole.planes[0].data_ptr()
    assert last.planes[0].data_ptr() == first.planes[0].data_ptr() + first.planes[0].nbytes
    assert same_bits(QuantizedTensor.cat([first, last]).planes[0], whole.planes[0])
    joined = QuantizedTensor.cat([whole.rows(0, 16), whole.rows(16, 21), whole.rows(21)])
    assert same_bits(joined.dequantize(), whole.dequantize())
    assert same_bits(joined.planes[0], whole.planes[0])
    with pytest.raises(ValueError, match="rows 3 to 41 are not among the 40"):
        whole.rows(3, 41)
    with pytest.raises(ValueError, match="rows -1 to 2 are not among the 40"):
        whole.dequantize(begin=-1, end=2)


@every_kind
@pytest.mark.parametrize("pack", [True, False])
def test_columns_are_those_of_the_decoded_weight(device, kind, pack):
    parts = on(device, like_a_model(kind, 21, 4 * columns_of(kind, 1)))
    whole = QuantizedTensor.from_parts(kind[0], parts, pack=pack)
    width, unit = whole.shape[1], whole.unit
    assert width == 4 * unit
    for begin, end in ((0, 4), (0, 1), (1, 3), (3, 4)):
        begin, end = unit * begin, unit * end
        part = whole.columns(begin, end)
        assert part.shape == (21, end - begin) and part.is_packed == pack
        assert same_bits(part.dequantize(), whole.dequantize()[:, begin:end])
        for name in {"scale", "table"} & parts.keys():
            of_rows = parts[name].dim() == 1
            assert not of_rows or same_bits(part.parts()[name], parts[name])
    assert whole.columns(0) is whole
    for wrong in ((0, width + 1), (-unit, width), (unit, unit), (2 * unit, unit)):
        with pytest.raises(ValueError, match=rf"columns {wrong[0]} to {wrong[1]} are not among"):
            whole.columns(*wrong)
    for wrong in ((1, width), (0, width - 1)) if unit > 1 else ():
        with pytest.raises(ValueError, match=rf"{kind[0]} are no whole blocks, of {unit} columns"):
            whole.columns(*wrong)


def test_what_does_not_go_together(device):
    weight = random_weight(("q8_0", 0, ()), 8, 64, device)
    with pytest.raises(ValueError, match="one encoding, got q8_0, q4_0"):
        QuantizedTensor.cat([weight, random_weight(("q4_0", 0, ()), 8, 64, device)])
    with pytest.raises(ValueError, match="equal rows"):
        QuantizedTensor.cat([weight, random_weight(("q8_0", 0, ()), 8, 96, device)])
    with pytest.raises(ValueError, match="one zero_type, got 4, 3"):
        QuantizedTensor.cat(
            [random_weight(kind, 8, 128, device) for kind in INT4 if kind[1] == 128]
        )
    tables = [random_weight(("nf4", 0, ()), 8, 64, device) for _ in range(2)]
    tables[1].planes[1].add_(1)
    with pytest.raises(ValueError, match="one table"):
        QuantizedTensor.cat(tables)
    with pytest.raises(ValueError, match=r"QuantizedTensor\.cat was given no weights"):
        QuantizedTensor.cat([])


@every_kind
def test_without_kernels_it_keeps_its_parts(device, kind, monkeypatch):
    parts = on(device, like_a_model(kind, 12, columns_of(kind, 300)))
    packed = QuantizedTensor.from_parts(kind[0], parts)
    monkeypatch.setattr(_dispatch, "BACKEND", "reference")
    plain = QuantizedTensor.from_parts(kind[0], parts)
    assert not plain.is_packed and len(plain.planes) == len(parts)
    assert same_bits(plain.dequantize(), packed.dequantize())
    assert same_bits(plain.rows(3, 9).dequantize(), packed.dequantize(begin=3, end=9))
    assert same_bits(QuantizedTensor.cat([plain, plain]).decoded()[12:], packed.decoded())
    assert all(same_bits(p, parts[name]) for name, p in plain.parts().items())
    assert plain.nbytes == sum(part.nbytes for part in parts.values())


def test_what_a_weight_says_of_itself(device):
    weight = random_weight(("q4_k", 0, ()), 32, 512, device)
    assert (
        weight.encoding == "q4_k" and weight.shape == (32, 512) and weight.dim() == weight.ndim == 2
    )
    assert (
        weight.dtype == torch.uint8
        and not weight.requires_grad
        and weight.device.type == device.type
    )
    assert weight.nbytes == sum(plane.nbytes for plane in weight.planes)
    assert 1 <= weight.nbytes / ENCODINGS["q4_k"].nbytes(32, 512) < 1.05
    assert repr(weight) == f"QuantizedTensor(q4_k, (32, 512), {weight.device})"
    assert weight.form == (CODES["q4_k"], 32, 512, 0, 0, 0)
    with pytest.raises(AttributeError, match="q4_k has blocks, no scale"):
        weight.scale  # noqa: B018
    int8 = random_weight(("int8", 0, ()), 5, 7, device)
    assert int8.data.dtype == torch.int8 and int8.scale.shape == (5,)
    with pytest.raises(AttributeError, match="int8 has data, scale, no blocks"):
        int8.blocks()
    with pytest.raises(RuntimeError, match="has no gradient: train adapters"):
        weight.requires_grad_()
    assert weight.requires_grad_(False) is weight


def test_it_does_not_change(device):
    weight = random_weight(("q4_k", 0, ()), 16, 256, device)
    before = dict(vars(weight))
    for name in (*before, "dtype", "device", "data", "grad", "anything"):
        with pytest.raises(AttributeError, match=f"^{name} of a QuantizedTensor cannot be set"):
            setattr(weight, name, None)
        with pytest.raises(AttributeError, match=f"^{name} of a QuantizedTensor cannot be deleted"):
            delattr(weight, name)
    with pytest.raises(RuntimeError, match="has no gradient: train adapters"):
        weight.requires_grad = True
    weight.requires_grad = False
    assert vars(weight) == before and not weight.requires_grad


def test_moving_and_copying(device):
    weight = random_weight(("nf4", 0, ()), 16, 128, device)
    assert weight.to(weight.device) is weight and weight.to(str(weight.device)) is weight
    there = weight.to("cpu")
    assert there.device.type == "cpu" and same_bits(there.dequantize(), weight.dequantize().cpu())
    pair = copy.deepcopy([weight, weight])
    assert pair[0] is pair[1] or pair[0].planes[0] is pair[1].planes[0]
    assert pair[0].planes[0].data_ptr() != weight.planes[0].data_ptr()
    assert same_bits(pair[0].dequantize(), weight.dequantize())
    assert copy.copy(weight) is weight
    meta = weight.to("meta")
    assert meta.shape == weight.shape and meta.device.type == "meta" and not meta.is_packed
    with pytest.raises(TypeError, match=r"not cast: dequantize\(torch.float16\) gives its values"):
        weight.to(torch.float16)


def test_it_is_not_pickled(device):
    weight = random_weight(("q8_0", 0, ()), 4, 32, device)
    for save in (pickle.dumps, lambda w: torch.save({"w": w}, io.BytesIO())):
        with pytest.raises(TypeError, match="not pickled: its memory is laid out for the kernels"):
            save(weight)


@pytest.mark.parametrize(
    ("encoding", "change", "message"),
    [
        ("q9", {}, "the encodings of a quantised weight are q8_0, .*; got 'q9'"),
        ("int8", {"scale": None}, "int8 is made of data, scale; got data"),
        ("int8", {"zero": torch.ones(2)}, "int8 is made of data, scale; got data, scale, zero"),
        ("int8", {"scale": [1.0, 2.0]}, "scale must be a tensor, got a list"),
        ("int8", {"scale": torch.ones(3)}, r"scale must be \(2,\) float32, got \(3,\) float32"),
        ("int8", {"scale": torch.ones(2).half()}, r"scale must be \(2,\) float32, got \(2,\) float16"),
        ("int8", {"data": torch.ones(2, 3)}, r"data must be \(2, 3\) int8, got \(2, 3\) float32"),
        ("int8", {"data": torch.ones(2, dtype=torch.int8)}, r"data must be a matrix, got \(2,\) int8"),
        ("int8", {"scale": torch.ones(2, requires_grad=True)}, "scale wants a gradient"),
        ("int8", {"scale": torch.ones(2, device="meta")}, "scale is on meta, data on cpu"),
        ("int8", {"data": torch.ones(2, 0, dtype=torch.int8)}, "rows of whole blocks"),
        ("q4_k", {"blocks": torch.zeros(2, 143, dtype=torch.uint8)},
         r"rows of whole blocks, of 144 bytes for 256 columns, got \(2, 143\) uint8"),
        ("int4", {"scale": torch.ones(2, 3)}, "scale must have 4 or 2 or 1 columns for 128 of the weight"),
        ("int4", {"scale": torch.ones(2, 2).double()}, r"scale must be \(2, 2\) float32 or float16 or"),
        ("int4", {"zero": torch.ones(2, 2).half()}, r"zero must be \(2, 2\) float32 or uint8, got"),
        ("int4", {"data": torch.zeros(2, 15, dtype=torch.uint8)}, "rows of whole blocks, of 16 bytes"),
        ("nf4", {"absmax": torch.ones(2, 4)}, "absmax must have 2 columns for 128 of the weight"),
        ("nf4", {"table": torch.ones(15)}, r"table must be \(16,\) float32, got \(15,\) float32"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(encoding, change, message):
    data = torch.zeros(2, 64, dtype=torch.uint8)
    parts = {
        "int8": {"data": torch.ones(2, 3, dtype=torch.int8), "scale": torch.ones(2)},
        "int4": {"data": data, "scale": torch.ones(2, 2), "zero": torch.ones(2, 2)},
        "nf4": {"data": data, "absmax": torch.ones(2, 2), "table": torch.ones(16)},
    }.get(encoding, {})
    parts = {name: part for name, part in (parts | change).items() if part is not None}
    with pytest.raises((ValueError, TypeError), match=message):
        QuantizedTensor.from_parts(encoding, parts)


def test_only_ggml_has_blocks():
    with pytest.raises(
        ValueError, match="int8 is not made of blocks, as q4_0, q4_k, q6_k, q8_0 are"
    ):
        QuantizedTensor.from_blocks(torch.zeros(2, 34, dtype=torch.uint8), "int8")


@pytest.mark.parametrize("kind", ONE_OF_EACH_FORM if SIMULATED else EVERY, ids=kind_name)
def test_torch_machinery(device, kind):
    columns = columns_of(kind, 300)
    parts = on(device, like_a_model(kind, 9, columns))
    weight = QuantizedTensor.from_parts(kind[0], parts)
    if kind[0] != "fp8":  # torch's own check multiplies the arguments, and cannot these
        stored = (*(part for name, part in parts.items() if name != "table"), None, None)[:3]
        opcheck("quantized_pack", (*stored, *weight.form))
        opcheck("quantized_unpack", (weight.planes[0], *weight.form))
    opcheck("quantized_dequantize", (*weight.packed_and_table, *weight.form, 2, 7, torch.bfloat16))

    def decoded(w, begin):
        return w.dequantize(torch.bfloat16, begin) + w.rows(begin).dequantize().sum()

    torch.compiler.reset()
    compiled = torch.compile(decoded, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight, 2), decoded(weight, 2))


def test_a_packed_weight_is_made_within_a_graph(device):
    parts = on(device, like_a_model(("q4_0", 0, ()), 16, 64))

    def make(blocks):
        return QuantizedTensor.from_blocks(blocks, "q4_0").dequantize()

    torch.compiler.reset()
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(parts["blocks"]), make(parts["blocks"]))


def test_ops_check_what_they_are_told(device):
    ops = torch.ops.mllama_kernels
    weight = random_weight(("q8_0", 0, ()), 16, 64, device)
    packed, table = weight.packed_and_table
    code, *rest = weight.form
    for form, message in (
        ((9, *rest), "encoding must be from 0 to 8, got 9"),
        ((-1, *rest), "encoding must be from 0 to 8, got -1"),
        ((code, -1, 64, 0, 0, 0), "n must be from 0 to 2.31 - 1"),
        ((code, 16, 2**40, 0, 0, 0), "n must be from 0 to 2.31 - 1"),
        ((code, 16, 48, 0, 0, 0), "k must be whole blocks of 32 columns for encoding q8_0, got 48"),
        ((code, 16, 64, 32, 0, 0), "group must be 0 for q8_0, got 32"),
        ((code, 16, 64, 0, 1, 0), "scale_type and zero_type must be 0, got 1, 0"),
        ((CODES["int4"], 16, 64, 16, 1, 1), "group must be 32, 64 or 128 for int4, got 16"),
        (
            (CODES["int4"], 16, 64, 32, 1, 2),
            "must be 1 to 3, and the same or 4, for int4, got 1, 2",
        ),
        ((CODES["nf4"], 16, 64, 32, 0, 0), "group must be 64 for nf4, got 32"),
        ((code, 16, 96, 0, 0, 0), r"packed must have shape \(\d+,\), got"),
        ((code, 2**31 - 1, 2**31 - 32, 0, 0, 0), "n must be from 0 to 2.31 - 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.quantized_unpack(packed, *form)
        with pytest.raises(RuntimeError, match=message):
            ops.quantized_dequantize(packed, table, *form, 0, 1, torch.float32)
    with pytest.raises(RuntimeError, match="q8_0 has no table, but one was given"):
        ops.quantized_dequantize(
            packed, torch.ones(16, device=device), *weight.form, 0, 1, torch.float32
        )
    with pytest.raises(RuntimeError, match="packed must be uint8, got int8"):
        ops.quantized_unpack(packed.view(torch.int8), *weight.form)
    with pytest.raises(RuntimeError, match="start on a boundary of"):
        ops.quantized_unpack(torch.cat([packed[:1], packed])[1:], *weight.form)
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16, got int64"):
        ops.quantized_dequantize(packed, table, *weight.form, 0, 1, torch.int64)
    with pytest.raises(RuntimeError, match="begin and end must be among the 16 rows of the weight"):
        ops.quantized_dequantize(packed, table, *weight.form, 3, 17, torch.float32)
    nf4 = random_weight(("nf4", 0, ()), 16, 64, device)
    with pytest.raises(RuntimeError, match="nf4 needs a table"):
        ops.quantized_dequantize(nf4.planes[0], None, *nf4.form, 0, 1, torch.float32)
    with pytest.raises(RuntimeError, match=r"table must have shape \(16,\), got \(15,\)"):
        ops.quantized_dequantize(
            *nf4.planes[:1], nf4.planes[1][:15], *nf4.form, 0, 1, torch.float32
        )
    blocks = weight.blocks()
    with pytest.raises(RuntimeError, match="q8_0 is packed of 1 of data, scale and zero, got 2"):
        ops.quantized_pack(blocks, blocks, None, *weight.form)
    with pytest.raises(RuntimeError, match="nf4 is packed of 2 of data, scale and zero, got 1"):
        ops.quantized_pack(nf4.data, None, None, *nf4.form)
    with pytest.raises(RuntimeError, match=r"blocks must have shape \(16, 68\), got \(15, 68\)"):
        ops.quantized_pack(blocks[:15], None, None, *weight.form)


def test_activations_in_eight_bits():
    x = torch.randn(3, 50)
    x[0, :32], x[1, 3] = 0, 1e4
    rounded = round_to_int8(x)
    assert rounded[0, :32].eq(0).all() and rounded.shape == x.shape
    groups = torch.nn.functional.pad(x, (0, 14)).view(3, 2, 32)
    step = groups.abs().amax(-1, keepdim=True).div(127).expand(3, 2, 32).flatten(1)[:, :50]
    assert ((rounded - x).abs() <= step * 0.5001).all()
    assert round_to_int8(x.bfloat16()).dtype == torch.bfloat16
