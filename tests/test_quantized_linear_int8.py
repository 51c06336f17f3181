"""quantized_linear with activations in 8 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import SIMULATED
from numerics import assert_compiles, compare, opcheck, strided
from quantized_calls import as_op, every_dtype, make
from quantized_weights import KINDS, kind_name
from torch import Tensor

import mllama_kernels
from mllama_kernels import QuantizedTensor, quantized_linear, reference
from mllama_kernels.quantized_linear import MAX_ROWS

INTEGERS = [kind for kind in KINDS if kind[0] not in ("fp8", "nf4", "fp4")]
INTEGERS_FIRST = [
    pytest.param(kind, id=kind_name(kind), marks=[pytest.mark.full] * (kind[0] in ("q4_0", "int4")))
    for kind in INTEGERS
]


def in_eight_bits(h: Tensor) -> Tensor:
    """In float64 what the integers of h stand for; every step in float32, as kernels take it."""
    columns = h.shape[-1]
    groups = F.pad(h.float(), (0, -columns % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # `127 / largest` rounds twice
    codes = (groups * inverse).round().where(largest != 0, 0)
    return (codes.double() * (largest / 127).double()).flatten(-2)[..., :columns]


@every_dtype
@pytest.mark.parametrize("kind", INTEGERS, ids=kind_name)
def test_activations_in_eight_bits(device, dtype, kind):
    """As far from float64 as rounding them makes it."""
    for rows in (1, 3, 20):
        (x, weight), kwargs = make(kind, rows, 33, 1024, "norm", dtype, device)
        x[0, 3] = 50
        with torch.no_grad():
            out = quantized_linear(x, weight, **kwargs, activations="int8")
            exact_kwargs = kwargs | {"norm_weight": kwargs["norm_weight"].double()}
            exact = reference.quantized_linear(x.double(), weight, **exact_kwargs)
            h = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"]).double()
            rounded = reference.quantized_linear(h, weight, activations="int8")
            assert not torch.equal(out, quantized_linear(x, weight, **kwargs))
        error, plain = ((t.double() - exact).norm() for t in (out, rounded))
        assert error <= 1.05 * plain + exact.norm() * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("kind", INTEGERS, ids=kind_name)
def test_eight_bits_are_multiplied_exactly(device, dtype, kind):
    """No worse than plain PyTorch from the product with these integers: also of more rows than one launch
    takes, of columns that are no whole blocks of anything, and of rows that begin anywhere."""
    for rows, n, about in [(1, 5, 32), (9, 33, 300), (3, 40, 1100), (MAX_ROWS + 1, 24, 520)]:
        (x, weight), kwargs = make(kind, rows, n, about, "bias", dtype, device)
        x[0, 3], x[-1, :32] = 50, 0
        h, bias = in_eight_bits(x), kwargs["bias"]
        exact = reference.quantized_linear(h, weight, bias.double())
        plain = reference.quantized_linear(h.to(dtype), weight, bias)
        shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)
        for given in (x, strided(x, 3), shifted):
            with torch.no_grad():
                compare(quantized_linear(given, weight, bias, activations="int8"), exact, plain)


@every_dtype
@pytest.mark.parametrize("kind", INTEGERS_FIRST)
def test_a_row_in_eight_bits_has_the_same_bits_in_any_batch(device, dtype, kind):
    (x, weight), kwargs = make(kind, 40, 24, 520, "all", dtype, device)
    kwargs["activations"] = "int8"
    with torch.no_grad():
        whole = quantized_linear(x, weight, **kwargs)
        for rows in (1, 7, 8, 9, 17):
            for first in (0, 40 - rows):
                part = slice(first, first + rows)
                some = kwargs | {name: kwargs[name][part] for name in ("residual", "row_mask")}
                out = quantized_linear(x[part], weight, **some)
                assert torch.equal(out, whole[part]), f"rows {first} to {first + rows - 1}"


@every_dtype
@pytest.mark.parametrize("n", [48, 37])
@pytest.mark.parametrize("kind", INTEGERS_FIRST)
def test_fusions_around_eight_bits_are_the_ops_in_order(device, dtype, kind, n):
    for rows in (5, 12):
        (x, weight), kwargs = make(kind, rows, n, 512, "all", dtype, device)
        with torch.no_grad():
            h = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"])
            y = quantized_linear(h, weight, kwargs["bias"], activations="int8")
            tail = (kwargs["residual"], kwargs["gate"], kwargs["row_mask"])
            expected = mllama_kernels.gated_residual(mllama_kernels.swiglu(y), *tail)
            out = quantized_linear(x, weight, **kwargs, activations="int8")
        assert torch.equal(out, expected)
        assert torch.equal(quantized_linear(x, weight, **kwargs, activations="int8"), expected)


@every_dtype
@pytest.mark.parametrize("rows", [1, 7, 20, MAX_ROWS + 1])
@pytest.mark.parametrize("kind", INTEGERS_FIRST)
def test_eight_bits_of_rows_that_are_not_finite(device, dtype, kind, rows):
    """On a CPU they are not rounded, on CUDA they are NaN; whatever an earlier call has left in memory."""
    (x, weight), _ = make(kind, rows, 33, 512, "product", dtype, device)
    with torch.no_grad():
        quantized_linear(x * 1000 ** torch.randn_like(x), weight)
        for value in (float("inf"), -float("inf"), float("nan")):
            x[-1, 30] = value
            out = quantized_linear(x, weight, activations="int8")
            plain = quantized_linear(x, weight)
            others = quantized_linear(x[:-1], weight, activations="int8")
            if device.type == "cpu" and not SIMULATED:
                assert torch.equal(out[-1].nan_to_num(1.5), plain[-1].nan_to_num(1.5))
            else:
                assert out[-1].isnan().all()
            if rows <= MAX_ROWS:
                assert torch.equal(out[:-1], others)
            assert out[:-1].isfinite().all()


@pytest.mark.parametrize("rows", [3, MAX_ROWS + 1])
@pytest.mark.parametrize("kind", INTEGERS_FIRST)
@pytest.mark.parametrize("scale", [1e-31, 1e30, 1e36])
def test_eight_bits_of_small_and_large_activations(device, kind, rows, scale):
    """Neither zeros nor infinities."""
    (x, weight), _ = make(kind, rows, 24, 512, "product", torch.bfloat16, device)
    x = (x.double() * scale).bfloat16()
    exact = reference.quantized_linear(x.double(), weight)
    with torch.no_grad():
        out = quantized_linear(x, weight, activations="int8").double()
    assert (out - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("kind", INTEGERS_FIRST)
def test_torch_machinery_of_eight_bits(device, kind):
    (x, weight), kwargs = make(kind, 3, 16, 300, "all", torch.bfloat16, device)
    opcheck("quantized_linear", as_op(weight, x, **kwargs, activations="int8"))
    with torch.no_grad():
        assert_compiles(quantized_linear, x, weight, **kwargs, activations="int8")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in INTEGERS], ids=kind_name)
def test_eight_bits_of_what_is_no_integer(device, kind):
    for rows in (1, MAX_ROWS + 1):
        (x, weight), _ = make(kind, rows, 8, 64, "product", torch.bfloat16, device)
        unpacked = QuantizedTensor.from_parts(kind[0], weight.parts(), pack=False)
        for function in (quantized_linear, reference.quantized_linear):
            for given in (weight, unpacked):
                with pytest.raises(RuntimeError, match=f'"int8" has no kernel for {kind[0]}$'):
                    function(x, given, activations="int8")


@pytest.mark.parametrize("pack", [True, False])
def test_eight_bits_have_no_gradient(device, pack):
    (x, weight), kwargs = make(("q8_0", 0, ()), 3, 16, 64, "all", torch.float32, device)
    if not pack:
        weight = QuantizedTensor.from_parts("q8_0", weight.parts(), pack=False)
    given = {"x": x, "norm_weight": kwargs["norm_weight"], "bias": kwargs["bias"]}
    for name, tensor in given.items():
        tensor.requires_grad_()
        for function in (quantized_linear, reference.quantized_linear):
            with pytest.raises(
                RuntimeError, match=f'activations="int8" has no gradient, which {name}'
            ):
                function(x, weight, **kwargs, activations="int8")
        tensor.requires_grad_(False)
