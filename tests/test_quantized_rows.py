"""quantized_rows."""

from __future__ import annotations

import pytest
import torch
from conftest import SIMULATED
from numerics import FLOATS, assert_compiles, opcheck, simulated_share
from quantized_weights import EVERY, columns_of, kind_name, random_weight, same_bits

import mllama_kernels
from mllama_kernels import QuantizedTensor, quantized_rows, reference

every_kind = pytest.mark.parametrize("kind", EVERY, ids=kind_name)


@simulated_share(2)
@every_kind
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_those_of_the_decoded_weight(device, kind, dtype):
    weight = random_weight(kind, 37, columns_of(kind, 600), device)
    decoded = weight.decoded().to(dtype)
    for ids in ([0, 36, 5, 5, 17], [[1, 2], [30, 0]], [], [[], []], 4):
        ids = torch.tensor(ids, dtype=torch.int64, device=device)
        out = quantized_rows(ids, weight, dtype)
        assert out.shape == (*ids.shape, weight.shape[1]) and out.is_contiguous()
        assert same_bits(out, decoded[ids])
        assert same_bits(reference.quantized_rows(ids, weight, dtype), out)
    apart = torch.arange(12, device=device).view(3, 4)[:, ::2].T
    assert same_bits(quantized_rows(apart, weight, dtype), decoded[apart])


def test_without_kernels(device, monkeypatch):
    from mllama_kernels import _dispatch

    weight = random_weight(("q4_k", 0, ()), 9, 256, device)
    ids = torch.tensor([8, 1], device=device)
    expected = quantized_rows(ids, weight, torch.bfloat16)
    monkeypatch.setattr(_dispatch, "BACKEND", "reference")
    plain = QuantizedTensor.from_parts("q4_k", weight.parts())
    assert same_bits(quantized_rows(ids, plain, torch.bfloat16), expected)
    assert same_bits(quantized_rows(ids, weight, torch.bfloat16), expected)
    with pytest.raises(RuntimeError, match=r"got float64; mllama_kernels\.reference"):
        quantized_rows(ids, weight, torch.float64)
    monkeypatch.undo()
    assert same_bits(quantized_rows(ids, plain, torch.bfloat16), expected)  # not packed


@pytest.mark.parametrize("kind", [("q6_k", 0, ()), ("fp8", 0, ()), ("fp4", 0, ())], ids=kind_name)
def test_torch_machinery(device, kind):
    weight = random_weight(kind, 9, columns_of(kind, 256), device)
    ids = torch.tensor([[8, 1, 0]], device=device)
    form = (*weight.packed_and_table, *weight.form, torch.bfloat16)
    opcheck("quantized_rows", (ids, *form))
    assert_compiles(quantized_rows, ids, weight, torch.bfloat16)
    with torch.autocast(device.type, torch.float16):
        assert quantized_rows(ids, weight, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("pack", [True, False])
def test_errors(device, pack):
    parts = random_weight(("int8", 0, ()), 9, 20, device).parts()
    weight = QuantizedTensor.from_parts("int8", parts, pack=pack)
    ids = torch.tensor([8, 1], device=device)
    with pytest.raises(RuntimeError, match="ids must be int64, got int32"):
        quantized_rows(ids.int(), weight, torch.float32)
    with pytest.raises(
        RuntimeError, match="dtype must be float32, float16 or bfloat16, got float64"
    ):
        quantized_rows(ids, weight, torch.float64)
    with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16, got int32"):
        quantized_rows(ids, weight, torch.int32)
    with pytest.raises(TypeError, match="weight must be a QuantizedTensor, got a Tensor"):
        quantized_rows(ids, weight.data, torch.float32)
    with pytest.raises(TypeError, match="missing a required argument: 'dtype'"):
        mllama_kernels.quantized_rows(ids, weight)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("wrong", [9, -1, 2**63 - 1, -(2**63)])
def test_ids_that_are_no_rows(device, wrong, pack):
    """Refused where the host can look; not a number, and nothing else, where it would have to wait."""
    parts = random_weight(("q4_0", 0, ()), 9, 64, device).parts()
    weight = QuantizedTensor.from_parts("q4_0", parts, pack=pack)
    ids = torch.tensor([3, wrong, 8], device=device)
    if device.type == "cpu" and not (SIMULATED and pack):
        with pytest.raises(RuntimeError, match=rf"ids must be within 0\.\.8, got {wrong}"):
            quantized_rows(ids, weight, torch.float32)
    else:
        out = quantized_rows(ids, weight, torch.float32)
        assert out[1].isnan().all() and same_bits(out[::2], weight.dequantize()[[3, 8]])
