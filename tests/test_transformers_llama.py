"""An accelerated Llama against the same model without: masks, caches, packing, fallbacks."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers_helpers import (
    assert_same,
    build,
    cast,
    count_ops,
    llama_config,
    text_batch,
)

from mllama_kernels.transformers import accelerate

IMPLEMENTATIONS = ["sdpa", "eager", "mllama_kernels"]


def llama(attention: str = "sdpa", **changes) -> transformers.LlamaForCausalLM:
    return build(transformers.LlamaForCausalLM, llama_config(attention, **changes))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["absent", "none", "left", "right", "around", "between"])
def test_logits(attention, padding, monkeypatch):
    model, batch = llama(attention), text_batch(padding=padding)
    tokens = batch["attention_mask"]
    if padding == "absent":
        del batch["attention_mask"]
    sdpa = copy.deepcopy(model)
    sdpa.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = sdpa(**batch).logits
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected, tokens)
    layers = model.config.num_hidden_layers
    assert calls["rms_norm"] == layers + 1 and calls["add_rms_norm"] == layers
    assert calls["swiglu"] == layers
    assert calls["rotary_attention"] == (0 if padding == "between" else layers)


def test_a_mask_is_resolved_once_per_call(monkeypatch):
    from mllama_kernels.transformers import text

    resolved = []
    real = text.sequences_from_padding
    monkeypatch.setattr(
        text, "sequences_from_padding", lambda mask: resolved.append(1) or real(mask)
    )
    model = llama()
    accelerate(model)
    model(**text_batch(padding="left"))
    assert len(resolved) == 1
    model(**text_batch(padding="none"))
    assert len(resolved) == 1, "without padding transformers has looked already"


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_a_mask_of_four_dimensions_is_used_as_it_is(attention, monkeypatch):
    model, batch = llama(attention), text_batch()
    bias = torch.zeros(2, 1, 20, 20).masked_fill(torch.rand(2, 1, 20, 20) < 0.3, -3e38)
    bias.diagonal(dim1=-2, dim2=-1).zero_()
    batch["attention_mask"] = bias
    sdpa = copy.deepcopy(model)
    sdpa.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = sdpa(**batch).logits
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected)
    assert calls["rotary_attention"] == 0


PACKED = torch.tensor([[*range(7), *range(1), *range(12)], [*range(20)]])


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences(attention, use_cache, monkeypatch):
    """Without a cache, positions that start again separate sequences; with one they do not."""
    model = llama(attention)
    batch = {"input_ids": text_batch()["input_ids"], "position_ids": PACKED, "use_cache": use_cache}
    sdpa = copy.deepcopy(model)
    sdpa.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = sdpa(**batch).logits
        alone = sdpa(batch["input_ids"][:1, 8:], use_cache=False).logits
        accelerate(model)
        calls = count_ops(monkeypatch)
        actual = model(**batch).logits
    assert_same(actual, expected)
    separate = (actual[0, 8:] - alone[0]).abs().max() < 1e-4 * alone.abs().max()
    assert separate == (not use_cache)
    assert calls["rotary_attention"] == (0 if attention == "eager" else 3)


def _steps(model, ids: Tensor, sizes: list[int], cache, mask: Tensor | None = None) -> Tensor:
    """Logits of one call after the other over a cache."""
    logits, begin = [], 0
    for size in sizes:
        end = begin + size
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        out = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given)
        logits.append(out.logits)
        begin = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["absent", "none", "left"])
def test_a_growing_cache(attention, padding, monkeypatch):
    """Prompt, several tokens at once, then single ones; the cache holds what transformers put there."""
    model, batch = llama(attention), text_batch(padding=padding)
    ids, tokens = batch["input_ids"], batch["attention_mask"]
    mask = None if padding == "absent" else tokens
    caches = [transformers.DynamicCache() for _ in range(2)]
    sizes = [11, 4, 1, 1, 1, 1, 1]
    with torch.no_grad():
        expected = _steps(model, ids, sizes, caches[0], mask)
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(_steps(model, ids, sizes, caches[1], mask), expected, tokens)
    for ours, theirs in zip(caches[1].layers, caches[0].layers):
        seen = tokens[:, None, :, None].expand_as(ours.keys)
        assert_same(ours.keys, theirs.keys, seen)
        assert_same(ours.values, theirs.values, seen)
    assert calls["rotary_attention"] == 3
    kernel_steps = 0 if padding == "left" else 5
    if attention == "mllama_kernels":  # its own forward over several tokens is the interface's
        assert calls["cross_attention"] >= 3 * kernel_steps
    else:
        assert calls["cross_attention"] == 3 * kernel_steps


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens(cache, padding, rows):
    model, batch = llama(), text_batch(rows, padding=padding)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True}
    expected = model.generate(**batch, **options)
    report = accelerate(model)
    assert model.generate(**batch, **options).equal(expected)
    report.revert()
    assert model.generate(**batch, **options).equal(expected)


def test_beams_reorder_the_cache():
    model, batch = llama(), text_batch(2)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    expected = model.generate(**batch, **options)
    accelerate(model)
    assert model.generate(**batch, **options).equal(expected)


def test_attention_weights_are_still_given(monkeypatch):
    model, batch = llama("eager"), text_batch()
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        accelerate(model)
        actual = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == 3 and len(actual.hidden_states) == 4
    for ours, theirs in zip(actual.attentions, expected.attentions):
        assert_same(ours, theirs)
    with torch.no_grad():
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected.logits)
    assert calls["rotary_attention"] == 3, "asking once does not undo the patches"


def test_dropout_is_left_to_the_module():
    model, batch = llama(attention_dropout=0.5), text_batch()
    model.train()
    torch.manual_seed(0)
    expected = model(**batch).logits
    accelerate(model, rms_norm=False, swiglu=False)
    torch.manual_seed(0)
    assert model(**batch).logits.equal(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_bias": True, "attention_bias": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"num_key_value_heads": 1, "head_dim": 80},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    ],
    ids=str,
)
def test_other_configurations(changes):
    model, batch = llama(**changes), text_batch(padding="left")
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        assert not report.left
        assert_same(model(**batch).logits, expected, batch["attention_mask"])


def test_what_the_kernels_do_not_take_is_left():
    model, batch = llama(hidden_act="gelu", head_dim=20), text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        assert_same(model(**batch).logits, expected)
    assert report.left == {
        "swiglu": "the activation is GELUActivation",
        "rotary_attention": "head dimension 20, the kernels take a multiple of 8",
    }
    assert set(report.replaced) == {"rms_norm"}


def test_norms_in_float32_over_a_bfloat16_model():
    """As PEFT prepares models: such a norm gives float32, whatever it is given."""
    model = llama().bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float()
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    expected = norm(x)
    accelerate(model)
    assert norm(x).equal(expected) and expected.dtype == torch.float32


def test_bfloat16_is_as_close_to_float64_as_transformers():
    ours = theirs = 0.0
    for _ in range(3):
        model, batch = llama(num_hidden_layers=4), text_batch(length=60, padding="left")
        where = batch["attention_mask"].bool()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        with torch.no_grad():
            exact = cast(copy.deepcopy(model), torch.float64)(**batch).logits[where]
            cast(model, torch.bfloat16)
            theirs += (model(**batch).logits[where].double() - exact).square().mean().item()
            accelerate(model)
            ours += (model(**batch).logits[where].double() - exact).square().mean().item()
    assert ours**0.5 <= 1.5 * theirs**0.5


def test_other_heads():
    config = llama_config(num_labels=3)
    model, batch = build(transformers.LlamaForSequenceClassification, config), text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate(model)
        assert_same(model(**batch).logits, expected)
