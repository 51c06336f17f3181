"""Linears of one input computed as one product: ordinary parameters, one matrix in memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mllama.layers import FusedLinear

SIZES = {"q_proj": 5, "k_proj": 3, "v_proj": 2}


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = FusedLinear(self, 4, SIZES)

    def separate(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in SIZES], dim=-1)


@pytest.fixture
def owner() -> Owner:
    return Owner()


def is_one_matrix(owner: Owner) -> bool:
    begin, rows = owner.q_proj.weight.data_ptr(), 0
    for name, size in SIZES.items():
        weight = getattr(owner, name).weight
        if weight.data_ptr() != begin + rows * 4 * weight.element_size():
            return False
        rows += size
    with torch.no_grad():
        return owner.qkv_proj.weight.data_ptr() == begin


def test_its_linears_are_the_owners_parameters(owner: Owner) -> None:
    assert [name for name, _ in owner.named_parameters()] == [f"{n}.weight" for n in SIZES]
    assert set(owner.state_dict()) == {f"{n}.weight" for n in SIZES}
    assert all(type(getattr(owner, name)) is nn.Linear for name in SIZES)
    assert is_one_matrix(owner)


@pytest.mark.parametrize("frozen", [(), ("k_proj",), tuple(SIZES)])
def test_product_and_gradients_are_those_of_the_linears(
    owner: Owner, frozen: tuple[str, ...]
) -> None:
    for name in frozen:
        getattr(owner, name).weight.requires_grad_(False)
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    owner.double()
    twin, y = copy.deepcopy(owner), torch.randn(3, 6, 10, dtype=torch.float64)
    for module, product in ((owner, owner.qkv_proj), (twin, twin.separate)):
        out = product(x)
        torch.testing.assert_close(out, x @ owner.qkv_proj.weight.T)
        (out * y).sum().backward()
        module.dx, x.grad = x.grad, None
    torch.testing.assert_close(owner.dx, twin.dx)
    for mine, theirs in zip(owner.parameters(), twin.parameters()):
        assert (mine.grad is None) == (not mine.requires_grad)
        torch.testing.assert_close(mine.grad, theirs.grad)
    if not frozen:
        assert torch.autograd.gradcheck(owner.qkv_proj, x)


def moved_by_hand(owner: Owner) -> Owner:
    owner.k_proj.weight.data = owner.k_proj.weight.data.clone()
    return owner


@pytest.mark.parametrize(
    "change",
    [
        lambda owner: owner.bfloat16(),
        lambda owner: owner.double().share_memory(),
        copy.deepcopy,
        lambda owner: pickle.loads(pickle.dumps(owner)),
        moved_by_hand,
    ],
    ids=["cast", "shared", "deepcopy", "pickle", "assigned"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_it_stays_or_becomes_one_matrix(owner: Owner, change: Any, grad: bool) -> None:
    parameters = list(owner.parameters())
    x = torch.randn(7, 4)
    changed = change(owner)
    with torch.set_grad_enabled(grad):
        x = x.to(changed.q_proj.weight.dtype)
        torch.testing.assert_close(changed.qkv_proj(x), changed.separate(x))
    assert is_one_matrix(changed)
    if changed is owner:
        assert all(a is b for a, b in zip(owner.parameters(), parameters)), "an optimiser has them"


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        owner, x = Owner(), torch.randn(2, 4)
        expected = owner.separate(x)
        torch.testing.assert_close(owner.qkv_proj(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(owner.qkv_proj(x), expected)


def test_loading_by_assignment(owner: Owner) -> None:
    weights = {f"{name}.weight": torch.randn(size, 4) for name, size in SIZES.items()}
    owner.load_state_dict(weights, assign=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(owner.qkv_proj(x), x @ torch.cat(list(weights.values())).T)
    assert is_one_matrix(owner)


def test_a_step_of_an_optimiser_reaches_the_product(owner: Owner) -> None:
    optimizer = torch.optim.SGD(owner.parameters(), lr=1.0)
    before, x = owner.qkv_proj.weight.detach().clone(), torch.ones(1, 4)
    owner.qkv_proj(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(owner.qkv_proj.weight, before - 1)


def test_a_replaced_linear_is_called(owner: Owner) -> None:
    class Plus(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    x = torch.randn(2, 4)
    before = owner.qkv_proj(x)
    plus = Plus(4, 3, bias=False)
    plus.weight = owner.k_proj.weight
    owner.k_proj = plus
    q, k, v = owner.qkv_proj.split(owner.qkv_proj(x) - before)
    torch.testing.assert_close(k, torch.ones_like(k))
    assert q.abs().max() < 1e-6 and v.abs().max() < 1e-6


def test_under_autocast_and_compiled(owner: Owner) -> None:
    x = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = owner.qkv_proj(x)
        torch.testing.assert_close(out, owner.separate(x))
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in owner.parameters())
    compiled = torch.compile(owner.qkv_proj, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), owner.separate(x))
