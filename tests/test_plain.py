"""What may be bypassed: each thing that a call could do besides its class's forward, one at a time."""

from __future__ import annotations

import copy
import functools
import itertools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mllama_kernels.plain import StandIn, is_plain


def noop(*_: object) -> None:
    """A hook that changes nothing: that it is called is enough."""


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class OtherNorm(Norm):
    pass


KINDS = {
    nn.Linear: lambda: nn.Linear(3, 3),
    nn.LayerNorm: lambda: nn.LayerNorm(3),
    nn.Conv2d: lambda: nn.Conv2d(1, 3, 2),
    nn.Embedding: lambda: nn.Embedding(3, 3),
    nn.SiLU: nn.SiLU,
    Norm: Norm,
}


def _wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Scaled(torch.Tensor):
    """Any kind of tensor that dispatches its operations itself."""


def _another_parameter(module: nn.Module) -> None:
    values = torch.ones(3).as_subclass(Scaled)
    module.register_parameter("extra", nn.Parameter(values))
    assert type(module.extra) is not nn.Parameter


def _subclass(module: nn.Module) -> None:
    module.__class__ = type("Adapted", (type(module),), {})


def _with_kwargs(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None, with_kwargs=True)


def _bound_elsewhere(module: nn.Module) -> None:
    module.forward = types.MethodType(type(module).forward, copy.deepcopy(module))


CHANGES = {
    "a subclass": _subclass,
    "forward hook": lambda m: m.register_forward_hook(noop),
    "forward hook with kwargs": _with_kwargs,
    "forward hook always called": lambda m: m.register_forward_hook(noop, always_call=True),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(noop),
    "pre-hook with kwargs": lambda m: m.register_forward_pre_hook(
        lambda *_: None, with_kwargs=True
    ),
    "backward hook": lambda m: m.register_full_backward_hook(noop),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(noop),
    "old backward hook": lambda m: m.register_backward_hook(noop),
    "forward of the instance": lambda m: setattr(m, "forward", lambda x: x),
    "decorated forward": lambda m: setattr(m, "forward", _wrapped(m.forward)),
    "bound function": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: x, m)),
    "partial forward": lambda m: setattr(m, "forward", functools.partial(m.forward)),
    "forward of another module": _bound_elsewhere,
    "call of the instance": lambda m: setattr(m, "_call_impl", lambda x: x),
    "compiled by itself": lambda m: m.compile(backend="eager"),
    "another kind of tensor": _another_parameter,
}


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_the_plain_thing(cls):
    module = KINDS[cls]()
    assert is_plain(module, cls) and is_plain(copy.deepcopy(module), cls)
    assert is_plain(module, OtherNorm, cls) and not is_plain(module, OtherNorm)
    assert not is_plain(module)
    module.requires_grad_(False).half().train()
    assert is_plain(module, cls)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [nn.Linear, nn.SiLU, Norm], ids=lambda cls: cls.__name__)
def test_what_has_to_be_called(cls, change):
    module = KINDS[cls]()
    CHANGES[change](module)
    assert not is_plain(module, cls)
    assert is_plain(KINDS[cls](), cls), "another module is none the worse"


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules(register):
    handle = register(noop)
    try:
        assert not is_plain(nn.Linear(3, 3), nn.Linear)
    finally:
        handle.remove()
    assert is_plain(nn.Linear(3, 3), nn.Linear)


def test_a_hook_that_is_gone():
    module = nn.Linear(3, 3)
    module.register_forward_hook(noop).remove()
    module.register_full_backward_hook(noop).remove()
    assert is_plain(module, nn.Linear)


def test_parametrizations_and_pruning():
    linear = parametrizations.weight_norm(nn.Linear(3, 3))
    assert not is_plain(linear, nn.Linear)
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)
    assert not is_plain(pruned, nn.Linear), "its hook makes the weight"


def test_the_class_is_patched(monkeypatch):
    """Whether before the first question or after it."""
    module = nn.Linear(3, 3)
    names = ("__call__", "_call_impl", "_wrapped_call_impl")
    for cls, name in ((nn.Linear, "forward"), *itertools.product((nn.Module, nn.Linear), names)):
        if (cls, name) == (nn.Linear, "_wrapped_call_impl"):
            continue  # which nothing looks up there
        for replacement in (lambda self, x: x, _wrapped(getattr(cls, name))):
            with monkeypatch.context() as patch:
                patch.setattr(cls, name, replacement, raising=False)
                assert not is_plain(module, nn.Linear)
            assert is_plain(module, nn.Linear)


def test_what_takes_a_patch_out_may_leave_the_method():
    module = nn.Linear(3, 3)
    module.forward = module.forward
    assert "forward" in vars(module) and is_plain(module, nn.Linear)


def test_a_stand_in_of_ours():
    class Patch(StandIn):
        pass

    module = nn.Linear(3, 3)
    module.forward = Patch()
    assert is_plain(module, nn.Linear)


def test_parameters_swapped_for_a_call():
    """As `torch.func.functional_call` does, with tensors."""
    seen = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(is_plain(self.inner, nn.Linear))
            return self.inner(x)

    outer = Outer()
    for weight in (torch.ones(3, 3), torch.ones(3, 3).as_subclass(Scaled)):
        torch.func.functional_call(outer, {"inner.weight": weight}, torch.ones(1, 3))
    assert seen == [True, False]


@pytest.mark.parametrize("hooked", [False, True])
def test_in_a_graph(hooked):
    """The question is answered while the graph is made; PyTorch does not ask again for hooks added later."""
    module = nn.Linear(3, 3)
    if hooked:
        module.register_forward_hook(noop)

    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_plain(module, nn.Linear) else x - 1

    torch.compiler.reset()
    assert torch.compile(asks, fullgraph=True, backend="eager")(torch.zeros(2))[0] == 1 - 2 * hooked
    torch.compiler.reset()
