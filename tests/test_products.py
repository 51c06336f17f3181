"""Products of many rows: by oneDNN where that is the faster library, else by the module's own call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mllama.layers import _ONEDNN_LINEAR, FusedLinear, multiply

pytestmark = pytest.mark.skipif(_ONEDNN_LINEAR is None, reason="PyTorch was built without oneDNN")
CPU = torch.device("cpu")


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
def test_of_a_fused_linear_too():
    owner = nn.Module()
    fused = FusedLinear(owner, 256, {"k_proj": 96, "v_proj": 160})
    x = randn(128, 256, dtype=torch.float32, device=CPU)
    with Calls() as calls:
        y = multiply(fused, x)
    assert calls.count == 1
    assert_close(y, x, torch.cat([owner.k_proj.weight, owner.v_proj.weight]))


def test_all_else_is_the_modules_own_call(monkeypatch):
    linear, x = make(bias=True), randn(128, 256, dtype=torch.float32, device=CPU)

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
    compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(linear, x), linear(x))
