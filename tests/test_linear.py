"""linear: a projection of any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    FLOATS,
    assert_compiles,
    assert_no_worse,
    compare,
    gradients,
    grid,
    randn,
    strided,
    to_double,
)
from test_skinny_linear import FUSIONS, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mllama_kernels
from mllama_kernels import reference
from mllama_kernels._product import product
from mllama_kernels.linear import linear_by
from mllama_kernels.skinny_linear import MAX_ROWS

ROWS = grid([0, 1, MAX_ROWS, MAX_ROWS + 1], [2, 7, 40, 131])


class Ops(TorchDispatchMode):
    """Within it, the names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mllama_kernels":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def with_bias(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    x, weight = args
    return kwargs | {"bias": randn(weight.shape[0], dtype=x.dtype, device=x.device)}


def tensors(options: dict[str, Any]) -> list[Tensor]:
    return [value for value in options.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_matches_float64(device, dtype, rows, fusion):
    args, kwargs = make((rows, 33, 136), fusion, dtype, device)
    for options in (kwargs, with_bias(args, kwargs)):
        out = mllama_kernels.linear(*args, **options)
        assert_no_worse(out, reference.linear, *args, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1, 40])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients(device, dtype, rows, fusion):
    """Of few rows as of many: none of them takes the op without a backward.

    Up to four steps round before the store. The error of the gate's gradient, one number, is a matter of
    chance: test_gated_residual.py has it.
    """
    args, kwargs = make((rows, 21, 70), fusion, dtype, device)
    for options in (kwargs, with_bias(args, kwargs)):
        doubles = {name: to_double(value) for name, value in options.items()}
        grads = [randn(rows, 21, dtype=dtype, device=device)]
        found = gradients(mllama_kernels.linear, args, grads, **options)
        plain = gradients(reference.linear, args, grads, **options)
        exact = gradients(reference.linear, tuple(map(to_double, args)), grads, **doubles)
        assert len(found) == sum(map(torch.is_floating_point, (*args, *tensors(options))))
        for mine, theirs, right in zip(found, plain, exact, strict=True):
            assert mine.dtype == dtype and mine.isfinite().all()
            if mine.numel() > 1:
                compare(mine, right, theirs, largest=3.0, roundings=4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (1, 1), (0, 4), (3, 2, 5)])
@pytest.mark.parametrize("fusion", ["product", "all"])
@torch.no_grad()
def test_any_leading_dimensions(device, dtype, leading, fusion):
    rows = torch.Size(leading).numel()
    (x, weight), kwargs = make((rows, 20, 64), fusion, dtype, device)
    expected = mllama_kernels.linear(x, weight, **kwargs)
    by_row = {name: kwargs[name] for name in ("residual", "row_mask") if name in kwargs}
    shaped = kwargs | {n: t.reshape((*leading, *t.shape[1:])) for n, t in by_row.items()}
    out = mllama_kernels.linear(x.reshape(*leading, 64), weight, **shaped)
    assert out.shape == (*leading, 20) and out.is_contiguous()
    assert torch.equal(out.reshape(rows, 20), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [3, 19])
@torch.no_grad()
def test_strides(device, dtype, rows):
    """What lies beside a row is not read; nor does the order of a weight's dimensions matter."""
    (x, weight), kwargs = make((rows, 37, 130), "all", dtype, device)
    expected = mllama_kernels.linear(x, weight, **kwargs)
    cut = kwargs | {name: strided(kwargs[name]) for name in ("residual", "norm_weight")}
    assert torch.equal(mllama_kernels.linear(strided(x), strided(weight), **cut), expected)
    columns = x.T.contiguous().T
    assert torch.equal(mllama_kernels.linear(columns, weight, **kwargs), expected)
    turned = mllama_kernels.linear(x, weight.T.contiguous().T, **kwargs)
    # Stored by the norm, for gate and up, by swiglu and at the end.
    assert_no_worse(turned, reference.linear, x, weight, roundings=5, **kwargs)


@torch.no_grad()
def test_empty(device):
    x = torch.ones(2, 24, device=device)
    for rows in (2, 20):
        wide = x[:1].expand(rows, 24)
        assert mllama_kernels.linear(wide, x[:0]).shape == (rows, 0)
        assert mllama_kernels.linear(wide[:, :0], x[:, :0]).equal(wide.new_zeros(rows, 2))
    assert mllama_kernels.linear(x[:0], x).shape == (0, 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1, 64])
def test_it_is_the_ops_in_order(device, dtype, rows):
    """Bit for bit: the op of few rows where it is meant, and else the steps around the library's product."""
    (x, weight), kwargs = make((rows, 48, 320), "all", dtype, device)
    normed = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"])
    y = mllama_kernels.swiglu(product(normed, weight, None))
    rest = (kwargs["residual"], kwargs["gate"], kwargs["row_mask"])
    steps = mllama_kernels.gated_residual(y, *rest)
    with Ops() as ops:
        recorded = mllama_kernels.linear(x, weight, **kwargs)
    assert torch.equal(recorded, steps) and "skinny_linear" not in ops.names
    with torch.no_grad(), Ops() as ops:
        out = mllama_kernels.linear(x, weight, **kwargs)
    assert ("skinny_linear" in ops.names) == (rows <= MAX_ROWS)
    few = mllama_kernels.skinny_linear(x, weight, **kwargs) if rows <= MAX_ROWS else steps
    assert torch.equal(out, few)


@torch.no_grad()
def test_by_the_ops_of_a_backend(device):
    for rows in (3, 30):
        args, kwargs = make((rows, 21, 70), "all", torch.float32, device)
        with Ops() as ops:
            out = linear_by(reference, *args, **kwargs)
        assert not ops.names
        assert_no_worse(out, reference.linear, *args, **kwargs)


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("fusion", ["product", "norm", "swiglu", "residual", "gate"])
def test_autocast(device, rows, fusion):
    """The product in the region's dtype; a residual stream in float32 is not narrowed with gradients."""
    (x, weight), kwargs = make((rows, 16, 48), fusion, torch.float32, device)
    expected = reference.linear(x, weight, **kwargs)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast(device.type, torch.bfloat16):
            out = mllama_kernels.linear(x, weight, **kwargs)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("rows", [4, 40])
def test_compiled_and_exported(device, rows):
    (x, weight), kwargs = make((rows, 16, 24), "all", torch.float32, device)
    with torch.no_grad():
        assert_compiles(mllama_kernels.linear, x, weight, **kwargs)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mllama_kernels.linear(x, weight)

    rows_of = {0: torch.export.Dim("rows", min=2, max=4096)}
    with torch.no_grad():
        program = torch.export.export(Module(), (x,), dynamic_shapes=(rows_of,)).module()
        for count in (2, 16, 17, 100):
            other = randn(count, 24, dtype=torch.float32, device=device)
            torch.testing.assert_close(program(other), F.linear(other, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (24,)}, r"weight must be \(out, in\), got shape \(24,\)"),
        ({"gate": (1,)}, "gate goes with residual"),
        ({"residual": (8, 16), "gate": None, "row_mask": (8,)}, "row_mask with gate"),
        ({"residual": (16,)}, r"residual must .*\(16,\)"),
        ({"residual": (1, 16)}, r"residual must .*\(1, 16\)"),
        ({"residual": (8, 16), "gate": (2,)}, r"gate must have one element, got shape \(2,\)"),
        ({"residual": (8, 16), "gate": (1,), "row_mask": (7,)}, r"row_mask must .*\((7|39),\)"),
        ({"norm_weight": (8,)}, r"\(24,\), got \(8,\)"),
        ({"weight": (16, 23)}, r"x must be \(..., 23\), got"),
        ({"x": ()}, r"x must be \(..., 24\), got shape \(\)"),
        ({"bias": (1,)}, r"bias must be \(16,\), got shape \(1,\)"),
        ({"bias": ()}, r"bias must be \(16,\), got shape \(\)"),
        ({"bias": (8, 16)}, r"bias must be \(16,\), got shape \(8, 16\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("batched", [False, True])
@torch.no_grad()
def test_what_does_not_fit_is_refused_at_any_number_of_rows(device, change, message, rows, batched):
    sizes = {"x": (8, 24), "weight": (16, 24)} | change
    kwargs = {}
    for name, size in sizes.items():
        if name in ("x", "residual", "row_mask") and size and size[0] in (7, 8):
            size = (size[0] - 8 + rows, *size[1:])
            if batched and size[0] % 2 == 0:
                size = (2, size[0] // 2, *size[1:])
        is_mask = name == "row_mask"
        kwargs[name] = None if size is None else torch.randn(size, device=device)
        kwargs[name] = kwargs[name] > 0 if is_mask else kwargs[name]
    with pytest.raises(RuntimeError, match=message):
        mllama_kernels.linear(kwargs.pop("x"), kwargs.pop("weight"), **kwargs)


def test_dtypes_that_differ_are_refused(device):
    x, weight = torch.randn(3, 24, device=device), torch.randn(16, 24, device=device)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            with pytest.raises(RuntimeError, match="dtype"):
                mllama_kernels.linear(x, weight.bfloat16())
            with pytest.raises(RuntimeError, match="residual must"):
                mllama_kernels.linear(x, weight, residual=x.new_zeros(3, 16).double())
            for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
                with pytest.raises(
                    RuntimeError, match="x must be float32, float16, bfloat16 or float64"
                ):
                    mllama_kernels.linear(x.to(dtype), weight.to(dtype))
    with pytest.raises(RuntimeError, match=r"x must be \(..., 23\), got shape \(3, 24\)"):
        mllama_kernels.linear(x.to("meta"), weight[:, :23].to("meta"))
    with pytest.raises(TypeError, match="linear: x must be a tensor, got a list"):
        mllama_kernels.linear([1.0], weight)
    with pytest.raises(ValueError, match="gate goes with residual, row_mask with gate"):
        reference.linear(x, weight, gate=x)
