"""Accelerated models under device maps and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from transformers_helpers import (
    assert_same,
    build,
    count_ops,
    llama_config,
    mllama_config,
    text_batch,
)

from mllama_kernels.transformers import accelerate
from mllama_kernels.transformers.patch import installed

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


def llama(layers: int = 3) -> transformers.LlamaForCausalLM:
    return build(transformers.LlamaForCausalLM, llama_config(num_hidden_layers=layers))


def _mllama(shape: Shape):
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(20, (2, 9), (2, 1))])
    return build(transformers.MllamaForConditionalGeneration, mllama_config(shape)), batch


@pytest.mark.parametrize("order", ["hooks first", "kernels first"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mllama"])
def test_hooks_of_a_device_map(order, offload, kind, monkeypatch):
    """Hooks replace `forward` themselves. Offloaded weights are there only while a module runs."""
    hooks = pytest.importorskip("accelerate")
    model, batch = (llama(), text_batch(padding="left")) if kind == "llama" else _mllama(Shape())
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits

    def attach():
        if offload:
            hooks.cpu_offload(model, torch.device("cpu"))
        else:
            hooks.dispatch_model(model, {"": "cpu"}, force_hooks=True)

    steps = [attach, lambda: accelerate(model)]
    for step in steps if order == "hooks first" else steps[::-1]:
        step()
    report = accelerate(model)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            calls = count_ops(patch)
            assert_same(model(**batch).logits, expected, mask)
        assert calls["rms_norm"] >= 4 and calls["rotary_attention"] >= 2
        report.revert()
        assert not list(installed(model))
        if not (offload and kind == "mllama"):  # its own vision tower moves pixels to "meta"
            assert model(**batch).logits.equal(expected)
        accelerate(model)
        hooks.hooks.remove_hook_from_submodules(model)
        assert_same(model(**batch).logits, expected, mask)
        accelerate(model).revert()
        assert model(**batch).logits.equal(expected)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_in_one_graph(fresh_compiler):
    model, batch = llama(1), text_batch()
    ops = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target).removeprefix("mllama_kernels.") for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = model(batch["input_ids"], use_cache=False).logits
        accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend=record)
        assert_same(compiled(batch["input_ids"], use_cache=False).logits, expected)
    for op, times in (("rms_norm", 2), ("add_rms_norm", 1), ("swiglu", 1), ("rotary_attention", 1)):
        assert ops.count(op) == times
    assert accelerate(compiled).model == "LlamaForCausalLM"


def test_padding_in_a_compiled_model(fresh_compiler):
    """What a mask holds is not known to a graph: its layers use the mask of transformers."""
    model = llama(1)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    for padding in ("left", "none", "right"):
        batch = text_batch(padding=padding)
        with torch.no_grad():
            actual = compiled(**batch, use_cache=False).logits
            assert_same(actual, model(**batch, use_cache=False).logits, batch["attention_mask"])


def test_compiled_mllama(fresh_compiler):
    model, batch = _mllama(Shape(local_layers=1, global_layers=1, taps=(0,), layers=2, cross=(1,)))
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        accelerate(model)
        actual = torch.compile(model, backend="aot_eager")(**batch, use_cache=False).logits
    assert_same(actual, expected, batch["attention_mask"])


def test_a_static_cache_compiled(fresh_compiler):
    """The step that `generate` compiles."""
    model, batch = llama(1), text_batch(1, 8)
    tokens = []
    for fast in (False, True):
        if fast:
            accelerate(model)
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        step = torch.compile(model, backend="aot_eager")
        given = {"past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            position = torch.arange(8)
            logits = model(batch["input_ids"], cache_position=position, **given).logits[:, -1:]
            for number in range(8, 12):
                token = logits.argmax(-1)
                tokens.append(int(token))
                position = torch.tensor([number])
                logits = step(token, cache_position=position, **given).logits
    assert tokens[:4] == tokens[4:]
