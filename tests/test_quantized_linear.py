"""quantized_linear, and what `linear` makes of a quantised weight."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import SIMULATED
from numerics import (
    FLOATS,
    assert_compiles,
    assert_no_worse,
    assert_same_bits_on_any_threads,
    compare,
    compare_sum,
    grid,
    opcheck,
    randn,
    strided,
)
from quantized_weights import KINDS, Kind, columns_of, kind_name, random_weight
from torch import Tensor

import mllama_kernels
from mllama_kernels import QuantizedTensor, quantized_linear, reference
from mllama_kernels.quantized_linear import MAX_ROWS
from mllama_kernels.testing import to_double

# Fusions, and how many roundings to the dtype a result has had: each of the separate ops stores one, and
# swiglu multiplies two columns of the product.
ROUNDINGS = {"product": 1, "bias": 1, "norm": 2, "swiglu": 3}
ROUNDINGS |= {"residual": 2, "gate": 2, "mask": 2, "all": 5}
ROWS = [*range(10), 15, 16, 17, 31, 32, 33, 40]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_name)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)
FEW: list[Kind] = [kind for kind in KINDS if kind[0] in ("q4_k", "int8", "nf4")]
# The others only in the full run: of what is the same code whatever the encoding.
FEW_FIRST = [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
# Fusions, of the kinds that have them: what stands around the product does not know the encoding.
FUSED = [
    pytest.param(
        fusion,
        kind,
        id=f"{fusion}-{kind_name(kind)}",
        marks=[pytest.mark.full] * (kind not in FEW and fusion not in ("product", "all")),
    )
    for fusion in ROUNDINGS
    for kind in KINDS
]
few_first = pytest.mark.parametrize("kind", FEW_FIRST, ids=map(kind_name, KINDS))


def make(
    kind: Kind, rows: int, n: int, about: int, fusion: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, QuantizedTensor], dict[str, Any]]:
    """(x, weight) and the keyword arguments that ask for a fusion, for about so many columns."""
    everything, k = fusion == "all", columns_of(kind, about)
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
    stored = n * (2 if "swiglu" in kwargs else 1)
    if fusion == "bias" or everything:
        kwargs["bias"] = randn(stored, dtype=dtype, device=device)
    x = randn(rows, k, dtype=dtype, device=device)
    return (x, random_weight(kind, stored, k, device)), kwargs


def as_op(weight: QuantizedTensor, x: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    """The arguments of the compiled op."""
    code, n, _, *types = weight.form
    given = {"eps": 1e-5, "swiglu": False, "weight_is_constant": False} | kwargs
    given["int8_activations"] = given.pop("activations", None) is not None
    names = ("bias", "norm_weight", "eps", "residual", "gate", "row_mask", "swiglu")
    names += ("weight_is_constant", "int8_activations")
    return (x, *weight.packed_and_table, code, n, *types, *(given.get(name) for name in names))


@every_dtype
@pytest.mark.parametrize(("fusion", "kind"), FUSED)
def test_matches_float64(device, dtype, kind, fusion):
    sizes = grid([(1, 5, 7), (3, 33, 700)], [(16, 40, 300), (2, 24, 2200)])
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


# ---------------------------------------------------------------- gradients, and torch's machinery


def _added(x: Tensor, weight: QuantizedTensor, **kwargs: Any) -> Tensor:
    """The derivative of each element of the result by the gate, in float64."""
    kwargs = {name: to_double(value) for name, value in kwargs.items()}
    gate, row_mask, _ = (kwargs.pop(name) for name in ("gate", "row_mask", "residual"))
    y = reference.quantized_linear(x.double(), weight, **kwargs)
    return y.masked_fill(~row_mask.unsqueeze(-1), 0) * (1 - gate.tanh().square())


@every_dtype
@pytest.mark.parametrize(
    ("fusion", "kind"), [case for case in FUSED if case.values[0] in ("product", "all")]
)
def test_gradients(device, dtype, kind, fusion):
    (x, weight), kwargs = make(kind, 5, 24, 300, fusion, dtype, device)
    named = {"x": x} | {n: v for n, v in kwargs.items() if torch.is_tensor(v) and n != "row_mask"}
    options = {name: value for name, value in kwargs.items() if name not in named}
    grad = randn(5, 24, dtype=dtype, device=device)

    def gradients(function: Any, to: torch.dtype) -> list[Tensor]:
        leaves = {name: t.detach().to(to).requires_grad_() for name, t in named.items()}
        out = function(
            leaves["x"], weight, **{n: t for n, t in leaves.items() if n != "x"}, **options
        )
        return list(torch.autograd.grad(out, list(leaves.values()), grad.to(to)))

    actual = gradients(quantized_linear, dtype)
    plain = gradients(reference.quantized_linear, dtype)
    exact = gradients(reference.quantized_linear, torch.float64)
    # Each op's gradient is stored; what they are made of has been, by the norm and for gate and up.
    roundings = 4 + 3 if fusion == "all" else 1
    for name, a, e, p in zip(named, actual, exact, plain, strict=True):
        if name == "gate":
            terms = grad * _added(x, weight, **kwargs)
            compare_sum(a, e, p, terms, roundings)
        else:
            compare(a.contiguous(), e, p, roundings=roundings)
    through_linear = gradients(mllama_kernels.linear, dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, through_linear, strict=True))


@every_dtype
def test_the_gradient_in_slabs(device, dtype, monkeypatch):
    module = sys.modules["mllama_kernels.quantized_linear"]  # the function has its name
    (x, weight), _ = make(("q4_k", 0, ()), 5, 300, 512, "product", dtype, device)
    x.requires_grad_()
    grad = randn(5, 300, dtype=dtype, device=device)
    (whole,) = torch.autograd.grad(quantized_linear(x, weight), x, grad)
    monkeypatch.setattr(module, "_SLAB_BYTES", 512 * 4 * 90)
    (slabs,) = torch.autograd.grad(quantized_linear(x, weight), x, grad)
    exact = grad.double() @ weight.dequantize(torch.float64)
    compare(slabs, exact, whole)


def test_gradients_that_do_not_exist(device):
    (x, weight), kwargs = make(("nf4", 0, ()), 3, 16, 64, "all", torch.float32, device)
    x.requires_grad_()
    op = torch.ops.mllama_kernels.quantized_linear
    with pytest.raises(NotImplementedError, match="has a gradient as a product alone"):
        op(*as_op(weight, x, **kwargs)).sum().backward()
    with pytest.raises(RuntimeError, match='activations="int8" has no gradient'):
        quantized_linear(x, weight, activations="int8")
    weight.planes[1].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient for its weight"):
        quantized_linear(x, weight).sum().backward()


def test_a_second_derivative(device):
    """Of what is done to the product behind it; the product is linear."""
    (x, weight), _ = make(("q8_0", 0, ()), 3, 16, 64, "product", torch.float32, device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(quantized_linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    decoded = weight.dequantize()
    expected = (torch.ones_like(x) @ decoded.T @ decoded) * 2
    torch.testing.assert_close(second, expected)


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


@every_dtype
def test_a_compiled_product_trains(device, dtype):
    (x, weight), kwargs = make(("q4_k", 0, ()), 5, 24, 300, "all", dtype, device)

    def gradient(function: Any) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        function(leaf, weight, **kwargs).sum().backward()
        return leaf.grad

    torch.compiler.reset()
    compiled = torch.compile(quantized_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), gradient(quantized_linear))


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


# ---------------------------------------------------------------- linear, switches, errors


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
    from mllama_kernels import _dispatch

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


@every_dtype
@every_kind
def test_activations_in_eight_bits(device, dtype, kind):
    """As far from float64 as rounding them makes it; or refused by name."""
    for rows in (1, 3, 20):
        (x, weight), kwargs = make(kind, rows, 33, 1024, "norm", dtype, device)
        x[0, 3] = 50
        with torch.no_grad():
            try:
                out = quantized_linear(x, weight, **kwargs, activations="int8")
            except RuntimeError as error:
                where = "this CPU" if device.type == "cpu" and not SIMULATED else "CUDA"
                message = f'activations="int8" has no kernel for {kind[0]} on {where}'
                assert str(error) == f"mllama_kernels.quantized_linear: {message}"
                return
            exact_kwargs = kwargs | {"norm_weight": kwargs["norm_weight"].double()}
            exact = reference.quantized_linear(x.double(), weight, **exact_kwargs)
            h = mllama_kernels.rms_norm(x, kwargs["norm_weight"], kwargs["eps"]).double()
            rounded = reference.quantized_linear(h, weight, activations="int8")
            assert not torch.equal(out, quantized_linear(x, weight, **kwargs))
        error, plain = ((t.double() - exact).norm() for t in (out, rounded))
        assert error <= 1.05 * plain + exact.norm() * torch.finfo(dtype).eps


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
