"""quantized_linear: its values."""

from __future__ import annotations

import pytest
import torch
from conftest import SIMULATED
from numerics import (
    assert_no_worse,
    assert_same_bits_on_any_threads,
    compare,
    grid,
    simulated_share,
    strided,
)
from quantized_calls import FEW, FUSED, ROUNDINGS, every_dtype, every_kind, make
from quantized_weights import KINDS, columns_of, kind_name, random_weight
from torch import Tensor

import mllama_kernels
from mllama_kernels import QuantizedTensor, quantized_linear, reference
from mllama_kernels.quantized_linear import MAX_ROWS

ROWS = [*range(10), 15, 16, 17, 31, 32, 33, 40]


@simulated_share(3)
@every_dtype
@pytest.mark.parametrize(("fusion", "kind"), FUSED)
def test_matches_float64(device, dtype, kind, fusion):
    # 61: of a few sums all may cancel, and then nothing says how large an error may be.
    sizes = grid([(1, 61, 7), (3, 33, 700)], [(16, 40, 300), (2, 24, 2200)])
    for rows, n, about in sizes[1:3] if SIMULATED else sizes:
        args, kwargs = make(kind, rows, n, about, fusion, dtype, device)
        with torch.no_grad():
            out = quantized_linear(*args, **kwargs)
        roundings = ROUNDINGS[fusion]
        assert_no_worse(out, reference.quantized_linear, *args, roundings=roundings, **kwargs)


@every_dtype
@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_every_number_of_rows(device, dtype, kind):
    for rows in [0, 1, 9, MAX_ROWS + 1] if SIMULATED else grid([0, 1, 7, 17, MAX_ROWS + 1], ROWS):
        args, kwargs = make(kind, rows, 21, 512, "all", dtype, device)
        with torch.no_grad():
            out = quantized_linear(*args, **kwargs)
        assert out.shape == (rows, 21) and out.dtype == dtype
        if rows:
            roundings = ROUNDINGS["all"]
            assert_no_worse(out, reference.quantized_linear, *args, roundings=roundings, **kwargs)


@simulated_share(3)
@every_dtype
@every_kind
def test_a_row_has_the_same_bits_in_any_batch(device, dtype, kind):
    (x, weight), kwargs = make(kind, 40, 24, 520, "all", dtype, device)
    with torch.no_grad():
        whole = quantized_linear(x, weight, **kwargs)
        for rows in (1, 2, 5, 8, 16, 17):
            for first in (0, 40 - rows):
                part = slice(first, first + rows)
                some = kwargs | {name: kwargs[name][part] for name in ("residual", "row_mask")}
                out = quantized_linear(x[part], weight, **some)
                assert torch.equal(out, whole[part]), f"rows {first} to {first + rows - 1}"


@pytest.mark.skipif(
    SIMULATED, reason="there the CUDA kernels run, whose long prompts the library takes"
)
@every_dtype
@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_rows_of_a_long_prompt_have_the_bits_of_their_own(dtype, kind):
    """A CPU takes 256 rows at a time: each finds its own x, residual, mask and place."""
    (x, weight), kwargs = make(kind, 519, 20, 256, "all", dtype, torch.device("cpu"))
    x, kwargs["residual"] = strided(x), strided(kwargs["residual"])
    with torch.no_grad():
        whole = quantized_linear(x, weight, **kwargs)
        for first, rows in ((0, 3), (254, 4), (510, 9)):
            part = slice(first, first + rows)
            some = kwargs | {name: kwargs[name][part] for name in ("residual", "row_mask")}
            out = quantized_linear(x[part], weight, **some)
            assert torch.equal(out, whole[part]), f"rows {first} to {first + rows - 1}"


@pytest.mark.parametrize("kind", FEW if SIMULATED else KINDS, ids=kind_name)
def test_any_number_of_threads_gives_the_same_bits(device, kind):
    calls = [make(kind, rows, 70, 600, "all", torch.bfloat16, device) for rows in (1, 5, 40)]

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(quantized_linear(*args, **kwargs) for args, kwargs in calls)

    assert_same_bits_on_any_threads(run)


@every_dtype
@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_fusions_are_the_ops_in_order(device, dtype, kind):
    """The bits of the separate ops around the product, which is how it runs where gradients are recorded."""
    (x, weight), kwargs = make(kind, 5, 48, 512, "all", dtype, device)
    with torch.no_grad():
        h = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"])
        y = mllama_kernels.swiglu(quantized_linear(h, weight, kwargs["bias"]))
        tail = (kwargs["residual"], kwargs["gate"], kwargs["row_mask"])
        expected = mllama_kernels.gated_residual(y, *tail)
        assert torch.equal(quantized_linear(x, weight, **kwargs), expected)
    assert torch.equal(quantized_linear(x, weight, **kwargs), expected)


@every_dtype
def test_leading_dimensions(device, dtype):
    kind = ("q8_0", 0, ())
    (x, weight), kwargs = make(kind, 6, 10, 64, "all", dtype, device)
    expected = quantized_linear(x, weight, **kwargs)
    folded = {**kwargs, "residual": kwargs["residual"].view(2, 3, 10)}
    folded["row_mask"] = kwargs["row_mask"].view(2, 3)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            out = quantized_linear(x.view(2, 3, -1), weight, **folded)
        assert out.shape == (2, 3, 10) and torch.equal(out.flatten(0, 1), expected)
    product = quantized_linear(x, weight)
    with torch.no_grad():
        assert torch.equal(quantized_linear(x[0], weight), product[0])
        with pytest.raises(
            RuntimeError, match=r"residual must be \(2, 3, N\), got shape \(6, 10\)"
        ):
            quantized_linear(x.view(2, 3, -1), weight, **folded | {"residual": kwargs["residual"]})


@every_dtype
@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_strides_and_borders(device, dtype, kind):
    """Rows cut out of wider tensors of NaN: what lies beside a row is not read."""
    (x, weight), kwargs = make(kind, 3, 37, 300, "all", dtype, device)
    with torch.no_grad():
        expected = quantized_linear(x, weight, **kwargs)
        for extra in (8, 3):
            for name in ("residual", "norm_weight", "bias"):
                kwargs[name] = strided(kwargs[name], extra)
            assert torch.equal(quantized_linear(strided(x, extra), weight, **kwargs), expected)
        assert torch.equal(quantized_linear(x.T.contiguous().T, weight, **kwargs), expected)
        shifted = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)
        assert torch.equal(quantized_linear(shifted, weight, **kwargs), expected)
        kwargs["row_mask"] = torch.stack([kwargs["row_mask"]] * 2, 1)[:, 0]
        assert torch.equal(quantized_linear(x, weight, **kwargs), expected)


@simulated_share(3)
@every_dtype
@every_kind
def test_one_hot_rows_read_the_weight(device, dtype, kind):
    """A row of the identity picks a column of the decoded weight; a dropped or doubled element shows."""
    weight = random_weight(kind, 19, columns_of(kind, 300), device)
    k = weight.shape[1]
    identity = torch.eye(k, dtype=dtype, device=device)
    exact = weight.dequantize().T
    for first in range(0, k, 40):
        with torch.no_grad():
            out = quantized_linear(identity[first : first + 40], weight)
        expected = exact[first : first + 40]
        torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("kind", FEW, ids=kind_name)
def test_hidden_rows_and_closed_gate(device, dtype, kind):
    (x, weight), kwargs = make(kind, 4, 24, 300, "mask", dtype, device)
    hidden = ~kwargs["row_mask"]
    x[hidden] = float("nan")
    with torch.no_grad():
        out = quantized_linear(x, weight, **kwargs)
        assert torch.equal(out[hidden], kwargs["residual"][hidden])
        assert out.isfinite().all()
        x[hidden] = 1
        kwargs["gate"] = torch.zeros_like(kwargs["gate"])
        assert torch.equal(quantized_linear(x, weight, **kwargs), kwargs["residual"])


@simulated_share(3)
@every_dtype
@every_kind
def test_not_finite_values_stay_in_their_row(device, dtype, kind):
    (x, weight), _ = make(kind, 5, 21, 300, "product", dtype, device)
    x[1, 30], x[3, 0] = float("inf"), float("nan")
    with torch.no_grad():
        out = quantized_linear(x, weight)
    finite = torch.ones(5, dtype=torch.bool, device=device)
    finite[1], finite[3] = False, False
    assert torch.equal(out.isfinite().all(1), finite)
    assert out[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_outliers_beside_small_columns(device, dtype, kind):
    """Where an activation 1000 times the others meets weights near zero, the others decide the result."""
    (x, weight), _ = make(kind, 4, 33, 512, "product", dtype, device)
    parts = weight.parts()
    first = next(iter(parts.values()))
    outliers = slice(0, None, 32)
    x[:, outliers] *= 1000
    if kind[0] in ("int8", "fp8"):
        first.view(torch.uint8)[:, outliers] = 0
    weight = QuantizedTensor.from_parts(kind[0], parts)
    with torch.no_grad():
        out = quantized_linear(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)


@simulated_share(2)
@every_kind
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e36])
def test_large_and_small_activations(device, kind, scale):
    dtype = torch.bfloat16
    (x, weight), _ = make(kind, 3, 24, 512, "product", dtype, device)
    x = (x.double() * scale).to(dtype)
    with torch.no_grad():
        out = quantized_linear(x, weight)
    exact = reference.quantized_linear(x.double(), weight)
    compare(out, exact, reference.quantized_linear(x.float(), weight).to(dtype))


def test_a_promise_changes_no_bits(device):
    (x, weight), kwargs = make(("q6_k", 0, ()), 2, 48, 256, "all", torch.bfloat16, device)
    with torch.no_grad():
        out = quantized_linear(x, weight, **kwargs)
        early = quantized_linear(x, weight, **kwargs, weight_is_constant=True)
    assert torch.equal(early, out)


@every_kind
def test_empty(device, kind):
    (x, weight), kwargs = make(kind, 0, 12, 24, "all", torch.float32, device)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert quantized_linear(x, weight, **kwargs).shape == (0, 12)
            x = torch.ones(2, weight.shape[1], device=device)
            assert quantized_linear(x, weight.rows(0, 0)).shape == (2, 0)
            x = x[:0]


@pytest.mark.full
@every_dtype
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("rows", [1, 4, 16, 128])
@every_kind
def test_checkpoint_shapes(device, dtype, n, k, rows, kind):
    args, kwargs = make(kind, rows, n, k, "norm", dtype, device)
    with torch.no_grad():
        out = quantized_linear(*args, **kwargs)
    assert_no_worse(out, reference.quantized_linear, *args, **kwargs)
