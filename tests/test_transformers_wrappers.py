"""What stands around the forward of a class - checkpointing, recording, defaults - stays around ours."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import Tensor, nn
from transformers_helpers import (
    V4,
    assert_same,
    build,
    count_ops,
    llama_config,
    llava_config,
    mllama_config,
    needs_backward,
    text_batch,
)

from mllama_kernels.transformers import accelerate
from mllama_kernels.transformers.patch import installed
from mllama_kernels.transformers.wrappers import has_own_forward, redecorated

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated")
FAMILIES = ["llama", "mllama", "mllama text", "llava"]


def _case(family: str, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    if family == "llama":
        return build(transformers.LlamaForCausalLM, llama_config(attention)), text_batch()
    if family.startswith("mllama"):
        shape = Shape()
        config = mllama_config(shape, attention)
        if family == "mllama text":
            return build(transformers.MllamaForCausalLM, config.text_config), text_batch()
        model = build(transformers.MllamaForConditionalGeneration, config)
        return model, batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(20, (2, 9), (2, 1))])
    model = build(transformers.LlavaForConditionalGeneration, llava_config(attention))
    batch = text_batch()
    batch["input_ids"][:, 4:13] = 95
    return model, batch | {"pixel_values": torch.randn(2, 3, 42, 42)}


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that checkpointing is for, and those of the towers without it."""
    return [module for module in model.modules() if type(module).__name__.endswith("Layer")]


class Training:
    """How many layers a training step checkpoints, and the bytes their forwards save, per class."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.checkpointed: Counter[str] = Counter()
        self.saved: Counter[str] = Counter()
        stack, seen = ["elsewhere"], set()

        def counted(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
            self.checkpointed[name] += 1
            return function(*args, **kwargs)

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                self.saved[stack[-1]] += tensor.nbytes
            return tensor

        handles, functions = [], []
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None:
                functions.append((module, function))
                name = type(module).__name__
                module._gradient_checkpointing_func = functools.partial(counted, name, function)
        for layer in _layers(model):
            handles.append(
                layer.register_forward_pre_hook(lambda m, _: stack.append(type(m).__name__))
            )
            handles.append(layer.register_forward_hook(lambda *_: stack.pop() and None))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(**batch).logits
        # What stands at padding is nobody's business.
        self.loss = logits[batch["attention_mask"].bool()].square().mean()
        for handle in handles:
            handle.remove()
        for module, function in functions:
            module._gradient_checkpointing_func = function
        self.kept = dict(self.saved)  # recomputing saves again
        self.loss.backward()
        model.zero_grad()


@needs_backward
@pytest.mark.parametrize(
    "family, reentrant",
    # A reentrant Mllama fails in transformers, too: its images are no positional argument.
    [*((family, False) for family in FAMILIES), ("llama", True), ("llava", True)],
)
def test_checkpointed_layers_save_nothing_else(family, reentrant, monkeypatch):
    model, batch = _case(family)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    plain = Training(model, batch)
    assert sum(plain.checkpointed.values()) >= 2
    accelerate(model)
    calls = count_ops(monkeypatch)
    fast = Training(model, batch)
    assert calls["rms_norm"] > 0
    assert fast.checkpointed == plain.checkpointed
    assert_same(fast.loss.detach(), plain.loss.detach())
    for name in {type(layer).__name__ for layer in _layers(model)}:
        # Layers that are not checkpointed save what their ops need: less than plain PyTorch.
        assert fast.kept.get(name, 0) <= plain.kept.get(name, 0), (name, fast.kept, plain.kept)
    model.gradient_checkpointing_disable()
    without = Training(model, batch)
    assert not without.checkpointed
    for name in plain.checkpointed:
        assert without.kept[name] > 10 * fast.kept.get(name, 0), (name, fast.kept)


@needs_backward
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_drops_a_cache(family):
    """Recomputing a layer would write its keys a second time."""
    model, batch = _case(family)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = model(**batch).logits
    accelerate(model)
    cache = transformers.DynamicCache(config=model.config)
    out = model(**batch, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    assert_same(out.logits.detach(), expected.detach(), batch["attention_mask"])
    out.logits.sum().backward()
    assert cache.get_seq_length() == 0
    # A layer by itself has no model above it that would have said so.
    layer = next(m for m in model.modules() if "DecoderLayer" in type(m).__name__)
    x = torch.randn(1, 6, 256, requires_grad=True)
    angles = (torch.ones(1, 6, 64), torch.zeros(1, 6, 64))
    layer(x, attention_mask=None, position_embeddings=angles, past_key_values=cache)
    assert cache.get_seq_length() == 0
    layer.eval()
    layer(x, attention_mask=None, position_embeddings=angles, past_key_values=cache)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asked", ["by the call", "by the configuration"])
def test_recording(family, asked):
    model, batch = _case(family, "eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    if asked == "by the configuration":
        for config in (model.config, model.config.get_text_config()):
            config.output_hidden_states = config.output_attentions = True
        options = {}
    with torch.no_grad():
        expected = model(**batch, **options)
        accelerate(model)
        actual = model(**batch, **options)
    assert list(actual.keys()) == list(expected.keys())
    for name in ("hidden_states", "attentions"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert theirs is None or len(theirs) >= 3 or "mllama" in family
        for one, other in zip(ours or (), theirs or (), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", [False, True])
def test_tuples(family, loss):
    model, batch = _case(family)
    model.train()
    tokens = batch["attention_mask"].bool() & (batch["input_ids"] < 95)
    batch["labels"] = batch["input_ids"].masked_fill(~tokens, -100)
    batch["labels"][:, 1:].masked_fill_(~batch["attention_mask"].bool()[:, :-1], -100)
    expected = model(**batch, return_dict=False)
    accelerate(model, loss=loss)
    actual = model(**batch, return_dict=False)
    assert isinstance(actual, tuple) and isinstance(expected, tuple)
    assert len(actual) == len(expected) - loss  # no logits
    assert_same(actual[0].detach(), expected[0].detach())


def test_tuples_by_the_configuration():
    model, batch = _case("llama")
    model = model.model
    model.config.return_dict = False
    with torch.no_grad():
        expected = model(**batch)
        accelerate(model)
        actual = model(**batch)
    assert isinstance(actual, tuple) and len(actual) == len(expected)
    assert_same(actual[0], expected[0])


@contextlib.contextmanager
def _decorated(classes: list[type], decorator: Any) -> Iterator[None]:
    methods = [(cls, vars(cls)["forward"]) for cls in classes]
    try:
        for cls, method in methods:
            cls.forward = decorator(method)
        yield
    finally:
        for cls, method in methods:
            cls.forward = method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["decorated first", "accelerated first"])
def test_every_decorator_of_every_class(family, order):
    """One that counts, around each class whose modules are replaced."""
    model, batch = _case(family)
    with torch.no_grad():
        expected = model(**batch).logits
    report = accelerate(model)
    names = [
        name
        for op in report.replaced.values()
        for name in op
        if name in dict(model.named_modules())
    ]
    classes = list({type(patch.module) for patch in installed(model)})
    assert len(classes) >= 5 and names
    if order == "decorated first":
        report.revert()
    calls: Counter[str] = Counter()

    def counting(method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls[type(self).__name__] += 1
            return method(self, *args, **kwargs)

        return wrapper

    with _decorated(classes, counting), torch.no_grad():
        if order == "decorated first":
            accelerate(model)
        assert {type(patch.module) for patch in installed(model)} == set(classes)
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
        counted = dict(calls)
        accelerate(model).revert()
        calls.clear()
        model(**batch)
    assert counted == dict(calls)
    if order == "accelerated first":
        accelerate(model)
    with torch.no_grad():  # and without them again
        calls.clear()
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
    assert not calls


def _held(method: Any, how: str) -> tuple[Any, list[Any]]:
    """What of a method stands in the closure of a wrapper, and what the wrapper calls."""
    if how == "in a list":
        return None, [method]
    if how == "through another function":
        return method, [lambda *args, **kwargs: method(*args, **kwargs)]
    return method, [functools.partial(method)]


@pytest.mark.parametrize("family", ["mllama", "llava"])
@pytest.mark.parametrize("how", ["in a list", "through another function", "in a partial"])
@pytest.mark.parametrize("order", ["decorated first", "accelerated first"])
def test_decorators_that_cannot_be_built_again(family, how, order):
    """Around one class at a time: its modules compute as before, and those that hand them masks or sums
    in a form of ours do not."""
    plain, batch = _case(family)
    calls: list[Any] = []

    def hiding(method: Any) -> Any:
        held, called = _held(method, how)

        @functools.wraps(method)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(self if held is None else held)
            return called[0](self, *args, **kwargs)

        return wrapper

    with torch.no_grad():
        expected = plain(**batch).logits
        model = copy.deepcopy(plain)
        accelerate(model)
        for cls in {type(patch.module) for patch in installed(model)}:
            model = copy.deepcopy(plain)
            if order == "accelerated first":
                accelerate(model)
            with _decorated([cls], hiding):
                plain(**batch)
                wanted = len(calls)
                calls.clear()
                if order == "decorated first":
                    accelerate(model)
                assert_same(model(**batch).logits, expected, batch["attention_mask"])
                assert len(calls) == wanted > 0, cls
                calls.clear()


def test_decorators_of_torch():
    model, batch = _case("llama")
    model.train()
    cls = type(model.model)
    accelerate(model)
    for decorator, has_graph in ((torch.no_grad(), False), (torch.enable_grad(), True)):
        with _decorated([cls], decorator), torch.set_grad_enabled(not has_graph):
            assert model.model(**batch).last_hidden_state.requires_grad == has_graph


def test_a_decorator_that_hides_what_it_decorates(monkeypatch):
    model, batch = _case("llama")
    cls = type(model.model.layers[0].mlp)

    def hiding(method: Any) -> Any:
        return lambda self, x: 2 * method(self, x)

    def held_elsewhere(method: Any) -> Any:
        methods = [method]

        @functools.wraps(method)
        def wrapper(self: nn.Module, x: Tensor) -> Tensor:
            return 2 * methods[0](self, x)

        return wrapper

    for decorator in (hiding, held_elsewhere):
        with _decorated([cls], decorator), torch.no_grad():
            expected = model(**batch).logits
            assert not has_own_forward(cls)
            report = accelerate(model)
            assert report.left == {"swiglu": "model.layers.0.mlp: its forward is replaced already"}
            assert_same(model(**batch).logits, expected)
    accelerate(model)
    for decorator in (hiding, held_elsewhere):  # after the model was accelerated
        with _decorated([cls], decorator), torch.no_grad():
            assert_same(model(**batch).logits, expected)


def test_names_and_defaults_of_a_rebuilt_decorator():
    def decorator(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, plus: int = 1, **kwargs: Any) -> Any:
            return function.__name__, function(self, *args, **kwargs), plus

        wrapper.mark = "kept"
        return wrapper

    def forward(self: Any, x: int) -> int:
        return x

    @functools.wraps(forward)
    def other(self: Any, x: int) -> int:
        return -x

    method = decorator(decorator(forward))
    again = redecorated(method, other)
    assert method(None, 3) == ("forward", ("forward", 3, 1), 1)
    assert again(None, 3, plus=2) == ("forward", ("forward", -3, 1), 2)
    assert again.mark == "kept" and again.__name__ == "forward"
    assert redecorated(forward, other) is other


def test_old_names_of_arguments():
    """`deprecate_kwarg` renames them, in whichever release has them."""
    model, _ = _case("llama")
    attention = model.model.layers[0].self_attn
    x, angles = torch.randn(1, 5, 256), (torch.ones(1, 5, 64), torch.zeros(1, 5, 64))
    name = "past_key_value" if V4 else "past_key_values"
    found = []
    for fast in (False, True):
        if fast:
            accelerate(model)
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            attention(x, position_embeddings=angles, attention_mask=None, **{name: cache})
        found.append(cache.get_seq_length())
    assert found == [5, 5]


def test_a_copy_has_decorators_of_its_own():
    model, batch = _case("llama")
    model.train()
    accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        expected = twin(**batch).logits
        twin_plain = copy.deepcopy(twin)
        accelerate(twin_plain).revert()
        assert_same(expected, twin_plain(**batch).logits)
        assert (model(**batch).logits - expected).abs().max() > 1e-2
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    assert sum(Training(twin, batch).checkpointed.values()) == 3
    assert not Training(model, batch).checkpointed
