"""Projections: linears of one input computed as one product, ordinary parameters and one matrix in memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from model_helpers import Shape, hf_model, our_model
from torch import Tensor, nn

import mllama_kernels
from mllama.kinds import Asked
from mllama.linear import Block, Projection

SIZES = {"q_proj": 5, "k_proj": 3, "v_proj": 2}


class Owner(Block):
    def __init__(self, sizes: Mapping[str, int] = SIZES) -> None:
        super().__init__()
        self.qkv, self.sizes = Projection(self, 4, sizes), sizes

    def product(self, x: Tensor) -> Tensor:
        return self.qkv(mllama_kernels, x)

    def matrix(self) -> Tensor:
        weight = self.qkv.kernel_weight(Asked)
        assert weight is not None and weight.bias is None
        return weight.matrix

    def separate(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.sizes], dim=-1)


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
        return owner.matrix().data_ptr() == begin


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
    for module, product in ((owner, owner.product), (twin, twin.separate)):
        out = product(x)
        torch.testing.assert_close(out, x @ owner.matrix().T)
        (out * y).sum().backward()
        module.dx, x.grad = x.grad, None
    torch.testing.assert_close(owner.dx, twin.dx)
    for mine, theirs in zip(owner.parameters(), twin.parameters()):
        assert (mine.grad is None) == (not mine.requires_grad)
        torch.testing.assert_close(mine.grad, theirs.grad)
    if not frozen:
        assert torch.autograd.gradcheck(owner.product, x)


def moved_by_hand(owner: Owner) -> Owner:
    owner.k_proj.weight.data = owner.k_proj.weight.data.clone()
    return owner


@pytest.mark.parametrize(
    "change",
    [
        lambda owner: owner.bfloat16(),
        lambda owner: owner.double(),
        copy.deepcopy,
        lambda owner: pickle.loads(pickle.dumps(owner)),
        moved_by_hand,
    ],
    ids=["cast", "double", "deepcopy", "pickle", "assigned"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_it_stays_or_becomes_one_matrix(owner: Owner, change: Any, grad: bool) -> None:
    parameters = list(owner.parameters())
    x = torch.randn(7, 4)
    changed = change(owner)
    with torch.set_grad_enabled(grad):
        x = x.to(changed.q_proj.weight.dtype)
        torch.testing.assert_close(changed.product(x), changed.separate(x))
    assert is_one_matrix(changed)
    if changed is owner:
        assert all(a is b for a, b in zip(owner.parameters(), parameters)), "an optimiser has them"


def _shared_with_processes(owner: Owner) -> Any:
    owner.share_memory()
    return [m.weight for m in (owner.q_proj, owner.k_proj, owner.v_proj)]


def _in_a_buffer(owner: Owner) -> Any:
    """As optimisers keep them that have weights as parts of a flat buffer, which they step or send."""
    flat = nn.utils.parameters_to_vector(owner.parameters()).detach()
    nn.utils.vector_to_parameters(flat, owner.parameters())
    return list(flat.split([p.numel() for p in owner.parameters()]))


def _in_one_place(owner: Owner) -> Any:
    owner.v_proj.weight = nn.Parameter(torch.randn(2, 4))
    owner.k_proj.weight.data = torch.empty(5, 4)[:3].copy_(owner.k_proj.weight.detach())
    return [owner.q_proj.weight, owner.k_proj.weight, owner.v_proj.weight]


@pytest.mark.parametrize("share", [_shared_with_processes, _in_a_buffer, _in_one_place])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_weights_stay_where_others_know_them(owner: Owner, share: Any, grad: bool) -> None:
    known, x = share(owner), torch.randn(7, 4)
    places = [weight.data_ptr() for weight in owner.parameters()]
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(owner.product(x), owner.separate(x))
        owner.float()
    assert [weight.data_ptr() for weight in owner.parameters()] == places
    with torch.no_grad():
        for part in known:
            part.add_(1)
        torch.testing.assert_close(owner.product(x), owner.separate(x))
    assert all(p.is_shared() for p in owner.parameters()) == (share is _shared_with_processes)


@pytest.mark.parametrize("parameter", [True, False])
def test_tied_weights(owner: Owner, parameter: bool) -> None:
    """Two linears with the same weight, as where keys are values, or one in both places."""
    owner = Owner({"q_proj": 5, "k_proj": 3, "v_proj": 3})
    if parameter:
        owner.v_proj.weight = owner.k_proj.weight
    else:
        owner.v_proj = owner.k_proj
    x = torch.randn(7, 4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(owner.product(x), owner.separate(x))
    assert owner.v_proj.weight is owner.k_proj.weight


def test_weights_that_are_no_parameters(owner: Owner) -> None:
    """A bias or weight that was taken out of the parameters, as a buffer, or tensors for one call."""
    x, twin = torch.randn(7, 4), copy.deepcopy(owner)
    bias = torch.randn(3)
    for module in (owner, twin):
        del module.k_proj.bias
        module.k_proj.register_buffer("bias", bias)
    torch.testing.assert_close(owner.product(x), twin.separate(x))
    given = {f"{n}.weight": torch.randn(s, 4, requires_grad=True) for n, s in SIZES.items()}
    places = [weight.data_ptr() for weight in given.values()]

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = Owner()

        def forward(self, x: Tensor) -> Tensor:
            return self.owner.product(x)

    weights = {f"owner.{name}": weight for name, weight in given.items()}
    product = Product()
    y = torch.func.functional_call(product, weights, x)
    torch.testing.assert_close(y, x @ torch.cat(list(given.values())).T)
    assert [weight.data_ptr() for weight in given.values()] == places, "they are the caller's"
    loss = lambda weights: torch.func.functional_call(product, weights, x).sum()  # noqa: E731
    for gradient in torch.func.grad(loss)(weights).values():
        torch.testing.assert_close(gradient, x.sum(0).expand_as(gradient))


def test_files_of_others_have_all_weights(owner: Owner, tmp_path: Path) -> None:
    """What saves models drops tensors that share a storage with another."""
    owner.product(torch.zeros(1, 4))
    safetensors.torch.save_file(owner.state_dict(), tmp_path / "model")
    assert safetensors.torch.load_file(tmp_path / "model").keys() == owner.state_dict().keys()
    one, whole = io.BytesIO(), io.BytesIO()
    torch.save(owner.v_proj.weight, one)
    torch.save(owner.state_dict(), whole)
    assert len(one.getvalue()) < len(whole.getvalue())
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(owner, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == owner.state_dict().keys()


def test_a_linear_of_another_size_is_refused(owner: Owner) -> None:
    owner.k_proj = nn.Linear(4, 4, bias=False)
    owner.v_proj = nn.Linear(4, 1, bias=False)
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(ValueError, match=r"\[5, 3, 2\] .* got \[5, 4, 1\]"),
        ):
            owner.product(torch.zeros(2, 4))


def test_linears_that_shrink_alike(owner: Owner) -> None:
    """As pruning leaves the MLPs."""
    owner = Owner({"gate_proj": 6, "up_proj": 6})
    owner.gate_proj, owner.up_proj = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(owner.product(x), owner.separate(x))


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        owner, x = Owner(), torch.randn(2, 4)
        expected = owner.separate(x)
        torch.testing.assert_close(owner.product(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(owner.product(x), expected)


def test_one_weight_made_in_inference_mode(owner: Owner) -> None:
    with torch.inference_mode():
        owner.k_proj.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    x = torch.randn(2, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(owner.product(x), owner.separate(x))


def test_loading_by_assignment(owner: Owner) -> None:
    weights = {f"{name}.weight": torch.randn(size, 4) for name, size in SIZES.items()}
    owner.load_state_dict(weights, assign=True)
    x = torch.randn(2, 4)
    torch.testing.assert_close(owner.product(x), x @ torch.cat(list(weights.values())).T)
    assert is_one_matrix(owner)


def test_a_step_of_an_optimiser_reaches_the_product(owner: Owner) -> None:
    optimizer = torch.optim.SGD(owner.parameters(), lr=1.0)
    before, x = owner.matrix().detach().clone(), torch.ones(1, 4)
    owner.product(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(owner.matrix(), before - 1)


def test_a_replaced_linear_is_called(owner: Owner) -> None:
    class Plus(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    x = torch.randn(2, 4)
    before = owner.product(x)
    plus = Plus(4, 3, bias=False)
    plus.weight = owner.k_proj.weight
    owner.k_proj = plus
    q, k, v = owner.qkv.split(owner.product(x) - before)
    torch.testing.assert_close(k, torch.ones_like(k))
    assert q.abs().max() < 1e-6 and v.abs().max() < 1e-6


def test_under_autocast_and_compiled(owner: Owner) -> None:
    x = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = owner.product(x)
        torch.testing.assert_close(out, owner.separate(x))
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in owner.parameters())
    compiled = torch.compile(owner.product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), owner.separate(x))


def test_saving_a_state_saves_every_weight_once(tmp_path: Path) -> None:
    """The first of several weights holds the memory of all; its entry in a state dict does not."""
    shape = Shape(layers=3, cross=(1,), local_layers=1, global_layers=1, taps=(0,), tile_side=28)
    model = our_model(shape, hf_model(shape))
    state = model.state_dict()
    torch.save(state, tmp_path / "state.pt")
    size = sum(t.nbytes for t in state.values())
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * size + 200_000
    for name, parameter in model.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr()
        assert state[name].untyped_storage().nbytes() == parameter.nbytes
