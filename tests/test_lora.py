"""Adapters of PEFT on our models: the same files, outputs and gradients as on those of `transformers`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model
from safetensors.torch import load_file
from torch import nn

SHAPE = Shape(layers=3, cross=(1,), local_layers=2, global_layers=1, taps=(0, 1), tile_side=28)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def hf() -> nn.Module:
    return hf_model(SHAPE)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    batch = batch_of(SHAPE, [Prompt(12, (3,), (6,)), Prompt(9, (0,), (1,))])
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == SHAPE.vocab)
    return batch | {"labels": batch["input_ids"].masked_fill(hidden, -100)}


def adapted(model: nn.Module, **options: Any) -> peft.PeftModel:
    """With adapters that change something, the same ones for the same seed."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1, generator=generator)
    return wrapped


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """At the real tokens, (n, V)."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[real]


@pytest.mark.parametrize("options", [{}, {"task_type": "CAUSAL_LM"}, {"use_dora": True}])
def test_adapters_give_what_they_give_on_transformers(
    hf: nn.Module, batch: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    model = our_model(SHAPE, hf)
    plain = logits(model, batch)
    ours, theirs = adapted(model, **options).train(), adapted(hf, **options).train()
    assert_close(logits(ours, batch), logits(theirs, batch))
    assert (logits(ours, batch) - plain).abs().max() > 0.01 * plain.abs().max()
    ours(**batch).loss.backward()
    theirs(**batch).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) >= 2 * len(TARGETS) * SHAPE.layers
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        assert_close(gradient, expected[name], rtol=1e-3)
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_adapter_files_go_both_ways(
    hf: nn.Module, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = our_model(SHAPE, hf)
    twin = copy.deepcopy(hf)
    ours, theirs = adapted(model), adapted(hf)
    expected = logits(ours, batch)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs")
    )
    assert mine.keys() == other.keys() and all(mine[n].equal(other[n]) for n in mine)
    loaded = peft.PeftModel.from_pretrained(our_model(SHAPE, twin), tmp_path / "theirs")
    assert logits(loaded, batch).equal(expected)
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "ours")
    assert_close(logits(loaded, batch), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_leaves_the_plain_model(
    hf: nn.Module, batch: dict[str, torch.Tensor], safe_merge: bool
) -> None:
    model = our_model(SHAPE, hf)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    wrapped = adapted(model)
    expected = logits(wrapped, batch)
    merged = wrapped.merge_and_unload(safe_merge=safe_merge)
    assert merged is model
    assert list(model.state_dict()) == names and [type(m) for m in model.modules()] == kinds
    assert_close(logits(model, batch), expected)
    step = {"input_ids": torch.randint(3, 90, (1, 5))}  # few rows: through the fused product
    theirs = adapted(hf).merge_and_unload()
    assert_close(logits(model, step), logits(theirs, step))


def test_disabled_and_unloaded_adapters_are_gone(
    hf: nn.Module, batch: dict[str, torch.Tensor]
) -> None:
    model = our_model(SHAPE, hf)
    before = logits(model, batch)
    wrapped = adapted(model)
    with wrapped.disable_adapter():
        assert_close(logits(wrapped, batch), before)
    assert logits(wrapped.unload(), batch).equal(before)


@pytest.mark.parametrize("options", [{}, {"task_type": "CAUSAL_LM"}])
def test_generation_with_an_adapter(
    hf: nn.Module, batch: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    model = our_model(SHAPE, hf)
    wrapped = adapted(model, **options).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    tokens = wrapped.generate(**inputs, **arguments)
    with wrapped.disable_adapter():
        assert not tokens.equal(model.generate(**inputs, **arguments))
    assert tokens.equal(wrapped.merge_and_unload().generate(**inputs, **arguments))


def test_the_vision_tower_can_be_adapted(hf: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    targets = r".*vision_model.*\.(q_proj|v_proj|fc1|fc2)"
    ours = adapted(our_model(SHAPE, hf), target_modules=targets)
    theirs = adapted(hf, target_modules=targets)
    assert_close(logits(ours, batch), logits(theirs, batch))


def test_checkpointing_gives_the_same_gradients(
    hf: nn.Module, batch: dict[str, torch.Tensor]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = our_model(SHAPE, hf)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        wrapped = adapted(model, lora_dropout=0.3).train()
        wrapped(**batch).loss.backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert all(a.equal(b) for a, b in zip(*gradients))
