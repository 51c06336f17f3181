"""skinny_linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SIMULATED
from numerics import (
    FLOATS,
    assert_compiles,
    assert_no_worse,
    grid,
    opcheck,
    randn,
    simulated_share,
    strided,
)
from torch import Tensor

import mllama_kernels
from mllama_kernels import reference

# rows, n, k
SHAPES = grid(
    [(1, 5, 7), (3, 33, 136), (16, 40, 129)],
    [(1, 1, 1), (2, 64, 2048), (4, 130, 1023), (7, 31, 520), (8, 300, 4096), (12, 17, 14336), (13, 9, 65)],
)  # fmt: skip
FUSIONS = ["product", "norm", "swiglu", "residual", "gate", "mask", "all"]


def make(
    shape: tuple[int, int, int], fusion: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """(x, weight) and the keyword arguments that ask for a fusion."""
    rows, n, k = shape
    everything = fusion == "all"
    kwargs: dict[str, Any] = {}
    if fusion == "norm" or everything:
        kwargs |= {"norm_weight": randn(k, dtype=dtype, device=device), "eps": 1e-3}
    if fusion == "swiglu" or everything:
        kwargs["swiglu"] = True
    if fusion in ("residual", "gate", "mask") or everything:
        kwargs["residual"] = randn(rows, n, dtype=dtype, device=device)
    if fusion in ("gate", "mask") or everything:
        kwargs["gate"] = randn(1, dtype=dtype, device=device)
    if fusion == "mask" or everything:
        kwargs["row_mask"] = (torch.arange(rows) % 3 != 1).to(device)
    x = randn(rows, k, dtype=dtype, device=device)
    weight = randn(n * (2 if "swiglu" in kwargs else 1), k, dtype=dtype, device=device)
    return (x, weight * k**-0.5), kwargs


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_matches_float64(device, dtype, shape, fusion):
    args, kwargs = make(shape, fusion, dtype, device)
    out = mllama_kernels.skinny_linear(*args, **kwargs)
    assert_no_worse(out, reference.skinny_linear, *args, **kwargs)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(device, dtype, rows):
    args, kwargs = make((rows, 21, 200), "all", dtype, device)
    out = mllama_kernels.skinny_linear(*args, **kwargs)
    assert_no_worse(out, reference.skinny_linear, *args, **kwargs)


@pytest.mark.skipif(SIMULATED, reason="float64 is for CPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_float64(shape, fusion):
    args, kwargs = make(shape, fusion, torch.float64, torch.device("cpu"))
    out = mllama_kernels.skinny_linear(*args, **kwargs)
    expected = reference.skinny_linear(*args, **kwargs)
    # Two sums of k products, and a handful of roundings of values of order one.
    tolerance = (shape[2] ** 0.5 + 16) * torch.finfo(torch.float64).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=8 * tolerance)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", grid([(16, 24, 264)], [(16, 70, 4096), (16, 40, 77)]))
@pytest.mark.parametrize("fusion", ["product", "all"])
def test_a_row_has_the_same_bits_in_any_batch(device, dtype, shape, fusion):
    (x, weight), kwargs = make(shape, fusion, dtype, device)
    whole = mllama_kernels.skinny_linear(x, weight, **kwargs)
    assert torch.equal(mllama_kernels.skinny_linear(x, weight, **kwargs), whole)
    for rows in grid([1, 2, 5, 9], [3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 15]):
        for first in (0, 16 - rows):
            part = slice(first, first + rows)
            by_row = {"residual", "row_mask"} & kwargs.keys()
            some = kwargs | {name: kwargs[name][part] for name in by_row}
            out = mllama_kernels.skinny_linear(x[part], weight, **some)
            assert torch.equal(out, whole[part]), f"rows {first} to {first + rows - 1}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_fusions_are_the_ops_in_order(device, dtype):
    """The bits of the separate ops around the product."""
    (x, weight), kwargs = make((5, 48, 320), "all", dtype, device)
    x_normed = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"])
    y = mllama_kernels.swiglu(mllama_kernels.skinny_linear(x_normed, weight))
    expected = mllama_kernels.gated_residual(
        y, kwargs["residual"], kwargs["gate"], kwargs["row_mask"]
    )
    out = mllama_kernels.skinny_linear(x, weight, **kwargs)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_and_borders(device, dtype):
    """Rows cut out of wider tensors of NaN: what lies beside a row is not read."""
    (x, weight), kwargs = make((3, 37, 130), "all", dtype, device)
    expected = mllama_kernels.skinny_linear(x, weight, **kwargs)
    for extra in (8, 3):
        kwargs["residual"] = strided(kwargs["residual"], extra)
        kwargs["norm_weight"] = strided(kwargs["norm_weight"], extra)
        out = mllama_kernels.skinny_linear(strided(x, extra), strided(weight, extra), **kwargs)
        assert torch.equal(out, expected)
    columns = x.T.contiguous().T
    kwargs["residual"] = kwargs["residual"].T.contiguous().T
    assert torch.equal(mllama_kernels.skinny_linear(columns, weight, **kwargs), expected)
    kwargs["row_mask"] = torch.stack([kwargs["row_mask"]] * 2, 1)[:, 0]
    assert torch.equal(mllama_kernels.skinny_linear(x, weight, **kwargs), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned(device, dtype):
    """Tensors that start one element after a 16-byte boundary."""
    (x, weight), kwargs = make((2, 20, 96), "norm", dtype, device)
    expected = mllama_kernels.skinny_linear(x, weight, **kwargs)

    def shifted(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        return room[1:].view(t.shape).copy_(t)

    kwargs["norm_weight"] = shifted(kwargs["norm_weight"])
    out = mllama_kernels.skinny_linear(shifted(x), shifted(weight), **kwargs)
    # An unaligned weight may take another kernel, which adds in another order.
    assert_no_worse(out, reference.skinny_linear, x, weight, **kwargs)
    if device.type == "cpu" and not SIMULATED:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_hot_rows_read_the_weight(device, dtype):
    """Exact: a row of the identity picks a column of the weight; a dropped or doubled element shows."""
    k = 70
    weight = randn(45, k, dtype=dtype, device=device)
    identity = torch.eye(k, dtype=dtype, device=device)
    for first in range(0, k, 16):
        out = mllama_kernels.skinny_linear(identity[first : first + 16], weight)
        assert torch.equal(out, weight.T[first : first + 16])


@pytest.mark.parametrize("dtype", FLOATS)
def test_hidden_rows_and_closed_gate(device, dtype):
    (x, weight), kwargs = make((4, 24, 64), "mask", dtype, device)
    hidden = ~kwargs["row_mask"]
    x[hidden] = float("nan")
    out = mllama_kernels.skinny_linear(x, weight, **kwargs)
    assert torch.equal(out[hidden], kwargs["residual"][hidden])
    assert out.isfinite().all()
    x[hidden] = 1
    kwargs["gate"] = torch.zeros_like(kwargs["gate"])
    assert torch.equal(mllama_kernels.skinny_linear(x, weight, **kwargs), kwargs["residual"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_finite_values_stay_in_their_row_and_column(device, dtype):
    (x, weight), _ = make((3, 21, 96), "product", dtype, device)
    x[1, 50], weight[4, 7] = float("inf"), float("nan")
    out = mllama_kernels.skinny_linear(x, weight)
    finite = torch.ones(3, 21, dtype=torch.bool, device=device)
    finite[1], finite[:, 4] = False, False
    assert torch.equal(out.isfinite(), finite)
    assert out[:, 4].isnan().all()


def test_a_promise_changes_no_bits(device):
    (x, weight), kwargs = make((2, 48, 256), "all", torch.bfloat16, device)
    out = mllama_kernels.skinny_linear(x, weight, **kwargs)
    early = mllama_kernels.skinny_linear(x, weight, **kwargs, weight_is_constant=True)
    assert torch.equal(early, out)


# qkv, o, gate_up, down and lm_head of the 11B model: n, k, fusion
LAYERS = [
    (6144, 4096, "norm"),
    (4096, 4096, "residual"),
    (14336, 4096, "all"),
    (4096, 14336, "gate"),
    (128256, 4096, "norm"),
]


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k", "fusion"), LAYERS)
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_checkpoint_shapes(device, dtype, n, k, fusion, rows):
    args, kwargs = make((rows, n, k), fusion, dtype, device)
    out = mllama_kernels.skinny_linear(*args, **kwargs)
    assert_no_worse(out, reference.skinny_linear, *args, **kwargs)


def test_empty(device):
    (x, weight), kwargs = make((0, 12, 24), "all", torch.float32, device)
    assert mllama_kernels.skinny_linear(x, weight, **kwargs).shape == (0, 12)
    assert mllama_kernels.skinny_linear(torch.ones(2, 24, device=device), weight[:0]).shape == (
        2,
        0,
    )


def test_torch_machinery(device):
    (x, weight), kwargs = make((3, 16, 24), "all", torch.float32, device)
    names = ("norm_weight", "eps", "residual", "gate", "row_mask", "swiglu")
    opcheck("skinny_linear", (x, weight, *(kwargs[name] for name in names), False))
    opcheck("skinny_linear", (x, weight, None, 1e-5, None, None, None, False, True))
    assert_compiles(mllama_kernels.skinny_linear, x, weight, **kwargs)
    assert_compiles(mllama_kernels.skinny_linear, x, weight)
    with pytest.raises(NotImplementedError, match="skinny_linear has no backward kernel"):
        mllama_kernels.skinny_linear(x, weight.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (24,)}, r"x must be \(rows, K\), got shape \(24,\)"),
        ({"x": (17, 24)}, "x must have at most 16 rows, got 17"),
        ({"x": (3, 0), "weight": (16, 0)}, r"x must have at least one column, got shape \(3, 0\)"),
        ({"weight": (16, 23)}, r"weight must be \(N, 24\), got shape \(16, 23\)"),
        ({"weight": (24,)}, r"weight must be \(N, 24\), got shape \(24,\)"),
        ({"weight": (16, 23), "swiglu": True}, r"weight must be \(2 N, 24\), got shape \(16, 23\)"),
        ({"weight": (15, 24), "swiglu": True}, "an even number of rows with swiglu, got 15"),
        ({"norm_weight": (8,)}, r"norm_weight must have shape \(24,\), got \(8,\)"),
        ({"residual": (3, 8)}, r"residual must have shape \(3, 16\), got \(3, 8\)"),
        ({"residual": (3, 16), "swiglu": True}, r"residual must have shape \(3, 8\), got \(3, 16\)"),
        ({"gate": (1,)}, "gate is given without residual"),
        ({"residual": (3, 16), "gate": (2,)}, r"gate must have one element, got shape \(2,\)"),
        ({"eps": -1.0}, "eps must not be negative or infinite, got -1"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(device, change, message):
    sizes = {"x": (3, 24), "weight": (16, 24)} | change
    kwargs = {
        name: torch.randn(size, device=device) if isinstance(size, tuple) else size
        for name, size in sizes.items()
    }
    with pytest.raises(RuntimeError, match=message):
        mllama_kernels.skinny_linear(kwargs.pop("x"), kwargs.pop("weight"), **kwargs)


def test_errors(device):
    x, weight = torch.randn(3, 24, device=device), torch.randn(16, 24, device=device)
    residual, gate = torch.randn(3, 16, device=device), torch.ones(1, device=device)
    mask = torch.ones(3, dtype=torch.bool, device=device)
    skinny_linear = mllama_kernels.skinny_linear
    with pytest.raises(RuntimeError, match="row_mask is given without gate"):
        skinny_linear(x, weight, residual=residual, row_mask=mask)
    with pytest.raises(RuntimeError, match=r"row_mask must have shape \(3,\), got \(2,\)"):
        skinny_linear(x, weight, residual=residual, gate=gate, row_mask=mask[:2])
    with pytest.raises(RuntimeError, match="row_mask must be bool, got int64"):
        skinny_linear(x, weight, residual=residual, gate=gate, row_mask=mask.long())
    for name, tensor in {"norm_weight": x[0], "residual": residual}.items():
        with pytest.raises(
            RuntimeError, match=f"{name} must have the dtype of x, float32, got float16"
        ):
            skinny_linear(x, weight, **{name: tensor.half()})
    with pytest.raises(
        RuntimeError, match="weight must have the dtype of x, float32, got bfloat16"
    ):
        skinny_linear(x, weight.bfloat16())
    with pytest.raises(
        RuntimeError, match="weight must be contiguous in its last dimension, got stride 16"
    ):
        skinny_linear(x, weight.T.contiguous().T)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        skinny_linear(x.int(), weight.int())
    with pytest.raises(ValueError, match="gate goes with residual, row_mask with gate"):
        reference.skinny_linear(x, weight, gate=gate)
