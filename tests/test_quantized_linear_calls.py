"""How quantized_linear is called: by torch's machinery, by `linear`, without kernels, wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_compiles, opcheck
from quantized_calls import FEW, as_op, every_dtype, make
from quantized_weights import KINDS, kind_name, random_weight

import mllama_kernels
from mllama_kernels import QuantizedTensor, _dispatch, quantized_linear, reference

# The other encodings only in the full run: this is the same code for all.
few_first = pytest.mark.parametrize(
    "kind",
    [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS],
    ids=map(kind_name, KINDS),
)


@few_first
def test_torch_machinery(device, kind):
    (x, weight), kwargs = make(kind, 3, 16, 300, "all", torch.float32, device)
    opcheck("quantized_linear", as_op(weight, x, **kwargs))


@pytest.mark.parametrize("kind", FEW, ids=kind_name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_compiled_it_is_one_graph(device, kind, mode):
    (x, weight), kwargs = make(kind, 3, 16, 300, "all", torch.float32, device)
    if mode is torch.enable_grad:
        opcheck("quantized_linear", as_op(weight, x.clone().requires_grad_(), bias=kwargs["bias"]))
    with mode():
        assert_compiles(quantized_linear, x, weight, **kwargs)
        assert_compiles(mllama_kernels.linear, x, weight, **kwargs)


def test_rows_that_vary_are_one_graph(device):
    (x, weight), _ = make(("q4_0", 0, ()), 9, 24, 300, "product", torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(quantized_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 3, 7):
            some = x[:rows].clone()
            assert torch.equal(compiled(some, weight), quantized_linear(some, weight))


@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_autocast(device, kind):
    (x, weight), kwargs = make(kind, 3, 24, 300, "all", torch.float32, device)
    low = {
        n: v.bfloat16() if torch.is_tensor(v) and n != "row_mask" else v for n, v in kwargs.items()
    }
    with torch.no_grad():
        expected = quantized_linear(x.bfloat16(), weight, **low)
        product = quantized_linear(x.bfloat16(), weight)
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(quantized_linear(x, weight, **kwargs), expected)
            assert torch.equal(mllama_kernels.linear(x, weight, **kwargs), expected)
            assert weight.dequantize().dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        out = quantized_linear(x.requires_grad_(), weight)
    assert torch.equal(out, product)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


@every_dtype
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_linear_takes_a_quantised_weight(device, dtype, rows):
    (x, weight), kwargs = make(("q6_k", 0, ()), rows, 24, 300, "all", dtype, device)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            expected = quantized_linear(x, weight, **kwargs)
            assert torch.equal(mllama_kernels.linear(x, weight, **kwargs), expected)
    plain = reference.quantized_linear(x, weight, **kwargs)
    assert torch.equal(reference.linear(x, weight, **kwargs), plain)


def test_without_kernels(device, monkeypatch):
    (x, weight), kwargs = make(("q4_k", 0, ()), 3, 24, 300, "all", torch.bfloat16, device)
    expected = reference.quantized_linear(x, weight, **kwargs)
    monkeypatch.setattr(_dispatch, "BACKEND", "reference")
    assert torch.equal(quantized_linear(x, weight, **kwargs), expected)
    for refusing in (quantized_linear, mllama_kernels.linear):  # as the kernel does
        with pytest.raises(RuntimeError, match=r"got float64; mllama_kernels\.reference"):
            refusing(x.double(), weight)
    assert reference.quantized_linear(x.double(), weight).dtype == torch.float64
    parts = QuantizedTensor.from_parts("q4_k", weight.parts())
    assert torch.equal(mllama_kernels.linear(x, parts, **kwargs), expected)
    monkeypatch.undo()
    assert torch.equal(quantized_linear(x, parts, **kwargs), expected)  # not packed


@pytest.mark.parametrize("pack", [True, False])
def test_errors(device, pack):
    """With an unpacked weight, which plain PyTorch decodes, as with a packed one."""

    def made(rows: int, pack: bool = pack) -> QuantizedTensor:
        packed = random_weight(("q8_0", 0, ()), rows, 64, device)
        return QuantizedTensor.from_blocks(packed.blocks(), "q8_0", pack=pack)

    weight = made(16)
    x, gate = torch.randn(3, 64, device=device), torch.ones(1, device=device)
    residual = torch.randn(3, 16, device=device)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (x[0, 0], {}, r"x must be \(..., 64\), got shape \(\)"),
        (x[:, :32].contiguous(), {}, r"x must be \(..., 64\), got shape \(3, 32\)"),
        (x[:, :0], {}, r"x must be \(..., 64\), got shape \(3, 0\)"),
        (x.double(), {}, "got float64; mllama_kernels.reference.quantized_linear takes float64"),
        (x.int(), {}, "x must be float32, float16 or bfloat16"),
        (x, {"bias": residual[0, :8]}, r"bias must have shape \(16,\), got \(8,\)"),
        (x, {"bias": gate}, r"bias must have shape \(16,\), got \(1,\)"),
        (x, {"bias": residual[0].half()}, "bias must have the dtype of x, float32, got float16"),
        (x, {"norm_weight": gate}, r"norm_weight must have shape \(64,\), got \(1,\)"),
        (x, {"norm_weight": x[0].half()}, "norm_weight must have the dtype of x"),
        (x, {"residual": residual[:2]}, r"residual must have shape \(3, 16\), got \(2, 16\)"),
        (x, {"residual": residual.expand(5, 3, 16)}, r"residual must have shape \(3, 16\)"),
        (x, {"residual": residual, "swiglu": True}, r"residual must have shape \(3, 8\)"),
        (x, {"residual": residual.half()}, "residual must have the dtype of x"),
        (x, {"gate": gate}, "gate goes with residual, row_mask with gate"),
        (x, {"residual": residual, "row_mask": mask}, "gate goes with residual, row_mask with gate"),
        (x, {"residual": residual, "gate": residual[0, :2]}, "gate must have one element"),
        (x, {"residual": residual, "gate": gate, "row_mask": mask[:2]}, r"row_mask must have shape"),
        (x, {"residual": residual, "gate": gate, "row_mask": mask.long()}, "row_mask must be bool"),
        (x, {"norm_weight": x[0], "eps": -1.0}, "eps must not be negative or infinite, got -1"),
    ]  # fmt: skip
    with torch.no_grad():
        for given, kwargs, message in cases:
            with pytest.raises(RuntimeError, match=message):
                quantized_linear(given, weight, **kwargs)
        with pytest.raises(RuntimeError, match="even number of rows with swiglu, got 15"):
            quantized_linear(x, made(15), swiglu=True)
    with pytest.raises(ValueError, match="activations must be None or \"int8\", got 'int4'"):
        quantized_linear(x, weight, activations="int4")
    with pytest.raises(TypeError, match="weight must be a QuantizedTensor, got a Tensor"):
        quantized_linear(x, residual)
    with pytest.raises(TypeError, match="weight must be a tensor or a QuantizedTensor, got a list"):
        mllama_kernels.linear(x, [1.0])
    with pytest.raises(RuntimeError, match=r"residual must (be|have)"):  # as a step of its own
        quantized_linear(x, weight, residual=residual[:1])
    op = torch.ops.mllama_kernels.quantized_linear
    for kwargs in ({"gate": gate}, {"residual": residual, "row_mask": mask}):
        with pytest.raises(RuntimeError, match=r"(gate|row_mask) is given without"):
            op(*as_op(made(16, pack=True), x, **kwargs))


@pytest.mark.parametrize("record", [False, True])
def test_a_weight_without_values_gives_none(device, record):
    """torch multiplies by a weight on the meta device, and gives memory as it lay."""
    blocks = torch.empty(16, 68, dtype=torch.uint8, device="meta")
    weight = QuantizedTensor.from_blocks(blocks, "q8_0")
    x, ids = torch.randn(3, 64, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with torch.set_grad_enabled(record):
        for call in (
            lambda: quantized_linear(x, weight),
            lambda: mllama_kernels.linear(x, weight),
            lambda: mllama_kernels.linear(x, torch.empty(16, 64, device="meta")),
            lambda: reference.quantized_linear(x, weight),
            lambda: mllama_kernels.quantized_rows(ids, weight, torch.float32),
        ):
            with pytest.raises(
                RuntimeError, match=r"all tensors must be on one device, got c.*, meta"
            ):
                call()
        assert quantized_linear(x.to("meta"), weight).shape == (3, 16)
