"""Products of many rows: by oneDNN or in float32 where that is quicker, else by the module's own call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mllama_kernels
from mllama.kinds import Asked
from mllama.linear import Block, Projection
from mllama_kernels import _product as products
from mllama_kernels._product import _ONEDNN_LINEAR

pytestmark = pytest.mark.skipif(_ONEDNN_LINEAR is None, reason="PyTorch was built without oneDNN")
CPU = torch.device("cpu")


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    """What a projection makes of x, but for few rows, which have an op of their own."""
    owner = Block()
    projection = Projection(owner, 1, {"linear": 1})
    owner.linear = module
    weight = projection.kernel_weight(Asked)
    return module(x) if weight is None else products.product(x, weight.matrix, weight.bias)


class Calls(TorchDispatchMode):
    """Counts the products that oneDNN was asked for by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is _ONEDNN_LINEAR.default
        return func(*args, **(kwargs or {}))


def make(bias: bool = False, width: int = 256, out: int = 256) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias)
    linear.weight.data = randn(out, width, dtype=torch.float32, device=CPU)
    return linear


def assert_close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """The error is at most that of one chain of sums for each element.

    The i-th of K sums of products of variance 1 has a variance of i, and each rounds by up to u = eps / 2
    of itself, evenly spread: an error of variance u^2 / 3 * K^2 / 2 beside a result of variance K.
    """
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    allowed = torch.finfo(torch.float32).eps / 2 * (x.shape[-1] / 6) ** 0.5 * exact.norm()
    assert y.shape == exact.shape and y.is_contiguous()
    assert (y - exact).norm() <= allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (2, 77, 256), (1, 131, 256), (17, 4096)])
@torch.no_grad()
def test_large_float32_products_are_those_of_onednn(bias, shape):
    linear, x = make(bias, shape[-1]), randn(*shape, dtype=torch.float32, device=CPU)
    with Calls() as calls:
        y = multiply(linear, x)
    assert calls.count == 1
    assert_close(y, x, linear.weight, linear.bias)
    strided = x.mT.contiguous().mT
    assert_close(multiply(linear, strided), x, linear.weight, linear.bias)
    with torch.inference_mode():
        assert torch.equal(multiply(linear, x), y)


@torch.no_grad()
def test_of_a_projection_too():
    owner = Block()
    fused = Projection(owner, 256, {"k_proj": 96, "v_proj": 160})
    x = randn(128, 256, dtype=torch.float32, device=CPU)
    with Calls() as calls:
        y = fused(mllama_kernels, x)
    assert calls.count == 1
    assert_close(y, x, torch.cat([owner.k_proj.weight, owner.v_proj.weight]))


def test_all_else_is_the_modules_own_call(monkeypatch):
    linear, x = make(bias=True), randn(128, 256, dtype=torch.float32, device=CPU)
    monkeypatch.setattr(products, "multiplies", lambda dtype: True)

    def is_own_call(module: nn.Module, x: Tensor) -> bool:
        with Calls() as calls:
            y = multiply(module, x)
        return calls.count == 0 and torch.equal(y, module(x))

    assert is_own_call(linear, x)
    multiply(linear, x).sum().backward()
    assert linear.weight.grad is not None
    hooked = copy.deepcopy(linear)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    with torch.no_grad():
        assert is_own_call(linear, x[:127])  # too small
        assert is_own_call(linear, x[:0])
        assert is_own_call(hooked, x)
        assert is_own_call(nn.Sequential(linear), x)
        assert is_own_call(copy.deepcopy(linear).double(), x.double())
        assert is_own_call(copy.deepcopy(linear).bfloat16(), x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert is_own_call(linear, x)
        with pytest.raises(RuntimeError, match="same dtype"):
            multiply(linear, x.double())
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            multiply(linear, x[:, :255])
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert is_own_call(linear, x)


def test_compiled():
    linear, x = make(), randn(128, 256, dtype=torch.float32, device=CPU)
    compiled = torch.compile(products.product, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, linear.weight, None), linear(x))


@pytest.fixture
def lacks_16_bits(monkeypatch):
    """A CPU without instructions for 16-bit products, and panels of few rows."""
    monkeypatch.setattr(products, "multiplies", lambda dtype: False)
    monkeypatch.setattr(products, "_WORTH_DECODING", 0)
    monkeypatch.setattr(products, "_PANEL_BYTES", 4 * 100 * 130)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 130), (2, 33, 130), (1, 130), (0, 130), (19, 1)])
@pytest.mark.parametrize("out", [1, 100, 257])
def test_without_16_bit_instructions(lacks_16_bits, dtype, bias, shape, out):
    """Result and gradients are the exact ones but for one rounding, and sums in float32 before it."""
    width = shape[-1]
    linear = nn.Linear(width, out, bias=bias).to(dtype)
    for parameter in linear.parameters():
        parameter.data = randn(*parameter.shape, dtype=dtype, device=CPU)
    x = randn(*shape, dtype=dtype, device=CPU).requires_grad_()
    wide = copy.deepcopy(linear).double()
    wide_x = x.detach().double().requires_grad_()
    y, want = multiply(linear, x), wide(wide_x)
    assert y.grad_fn is not None and "Decoded" in type(y.grad_fn).__name__
    grad = randn(*y.shape, dtype=dtype, device=CPU)
    y.backward(grad)
    want.backward(grad.double())
    pairs = [(y, want, width), (x.grad, wide_x.grad, out)]
    pairs += [
        (p.grad, q.grad, x.numel() // width) for p, q in zip(linear.parameters(), wide.parameters())
    ]
    for got, exact, terms in pairs:
        assert got.dtype == dtype and got.shape == exact.shape
        half_ulp = torch.finfo(dtype).eps / 2 + terms * torch.finfo(torch.float32).eps / 2
        assert (got - exact).norm() <= half_ulp * exact.norm()
    with torch.inference_mode():
        assert torch.equal(multiply(linear, x.detach()), y)
    strided = x.detach().repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(multiply(linear, strided), y)


def test_frozen_parts_without_16_bit_instructions(lacks_16_bits):
    linear = nn.Linear(130, 100).bfloat16()
    x = randn(64, 130, dtype=torch.bfloat16, device=CPU).requires_grad_()
    linear.requires_grad_(False)
    multiply(linear, x).sum().backward()
    assert x.grad is not None and linear.weight.grad is None
    linear.requires_grad_(True)
    multiply(linear, x.detach()).sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad is not None


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_without_16_bit_instructions(lacks_16_bits, dtype, inside):
    """Rows and weights of any mixture: the product of the cast ones, with gradients in their own dtypes."""
    for x_dtype, weight_dtype in ((torch.float32, torch.float32), (dtype, torch.float32)):
        linear = nn.Linear(130, 100).to(weight_dtype)
        x = randn(64, 130, dtype=x_dtype, device=CPU).requires_grad_()
        cast, cast_x = copy.deepcopy(linear).to(dtype), x.detach().to(dtype).requires_grad_()
        grad, want = randn(64, 100, dtype=dtype, device=CPU), multiply(cast, cast_x)
        want.backward(grad)
        with torch.autocast("cpu", dtype):
            y = multiply(linear, x)
            if inside:
                y.backward(grad)
        if not inside:
            y.backward(grad)
        assert "Decoded" in type(y.grad_fn).__name__ and torch.equal(y, want)
        pairs = zip((x, *linear.parameters()), (cast_x, *cast.parameters()))
        for leaf, cast_leaf in pairs:
            assert leaf.grad.dtype == leaf.dtype and torch.equal(
                leaf.grad.to(dtype), cast_leaf.grad
            )
    with torch.autocast("cpu", dtype):
        assert multiply(linear.double(), x.detach().double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="same dtype"):
        multiply(nn.Linear(130, 100), x.detach().to(dtype))


def test_default_dtype_is_not_that_of_the_panels(lacks_16_bits):
    linear, x = nn.Linear(130, 100).bfloat16(), randn(64, 130, dtype=torch.bfloat16, device=CPU)
    want = multiply(linear, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(multiply(linear, x), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_this_cpu_multiplies(monkeypatch):
    """As PyTorch decides it, which gives oneDNN nothing when that is switched off."""
    assert products.multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert products.multiplies(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products.multiplies(torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_its_place(bias, device):
    """Into columns of wider rows, and nowhere else."""
    x, weight = (randn(n, 24, dtype=torch.float32, device=device) for n in (5, 16))
    shift = randn(16, dtype=torch.float32, device=device) if bias else None
    wide = torch.full((5, 30), torch.nan, device=device)
    with torch.no_grad():
        products.product_into(wide[:, 7:23], x, weight, shift)
    torch.testing.assert_close(wide[:, 7:23], F.linear(x, weight, shift))
    assert wide[:, :7].isnan().all() and wide[:, 23:].isnan().all()
