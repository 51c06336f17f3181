"""Training an accelerated model: gradients, checkpointing, adapters, Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import nn
from transformers_helpers import (
    assert_same,
    assert_same_gradients,
    build,
    count_ops,
    gradients,
    llama_config,
    llava_config,
    mllama_config,
    needs_backward,
    text_batch,
)

from mllama_kernels.transformers import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


def llama() -> transformers.LlamaForCausalLM:
    return build(transformers.LlamaForCausalLM, llama_config())


def _case(kind: str):
    if kind == "llama":
        return llama(), text_batch(padding="around")
    if kind == "mllama":
        shape = Shape()
        model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
        return model, batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(20, (2, 9), (2, 1))])
    model, batch = build(transformers.LlavaForConditionalGeneration, llava_config()), text_batch()
    batch["input_ids"][:, 4:13] = 95
    return model, batch | {"pixel_values": torch.randn(2, 3, 42, 42)}


def _step(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vocabulary = model.get_output_embeddings().out_features
    # What stands at padding is nobody's business, so nothing is predicted from there.
    tokens = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~tokens, -100)
    labels[:, 1:].masked_fill_(~tokens[:, :-1], -100)
    labels = labels.masked_fill(labels >= vocabulary, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.detach(), gradients(model)


@needs_backward
@pytest.mark.parametrize("kind", ["llama", "mllama", "llava"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(kind, checkpointing, monkeypatch):
    model, batch = _case(kind)
    model.train()
    loss, expected = _step(model, batch)
    assert len(expected) == len([*model.parameters()]) - (kind == "llava") * _unused(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    accelerate(model)
    calls = count_ops(monkeypatch)
    again, actual = _step(model, batch)
    assert_same(again, loss)
    assert_same_gradients(actual, expected)
    assert calls["rotary_attention"] >= (2 if kind == "mllama" else 3)


@needs_backward
@pytest.mark.parametrize("kind", ["llama", "mllama", "mllama text", "llava"])
def test_a_loss_without_logits(kind, monkeypatch):
    if kind == "mllama text":
        config = mllama_config(Shape()).text_config
        model, batch = build(transformers.MllamaForCausalLM, config), text_batch(padding="right")
    else:
        model, batch = _case(kind)
    tokens = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~tokens | (batch["input_ids"] > 95), -100)
    labels[:, 1:].masked_fill_(~tokens[:, :-1], -100)
    batch |= {"labels": labels}
    shifted = torch.roll(labels, -1, 1)
    shifted[:, -1] = -100
    variants = [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(9)}]
    others = shifted.roll(3, 1).masked_fill(~tokens, -100)
    variants += [{"shift_labels": others}, {"return_dict": False}]
    model.train()
    expected = []
    for variant in variants:
        loss = model(**batch, **variant)[0]
        loss.backward()
        expected.append((loss.detach(), gradients(model)))
    report = accelerate(model, loss=True)
    assert report.replaced["loss"] == [type(model).__name__]
    calls = count_ops(monkeypatch)
    for number, (variant, (loss, grads)) in enumerate(zip(variants, expected)):
        out = model(**batch, **variant)
        if "return_dict" not in variant:
            assert out.logits is None
        assert_same(out[0].detach(), loss)
        out[0].backward()
        assert_same_gradients(gradients(model), grads)
        assert calls["linear_cross_entropy"] == number + 1
    with torch.no_grad():
        assert model(**batch).logits is not None
    model.eval()
    assert_same(model(**batch).loss.detach(), expected[0][0])
    assert model(**batch).logits is not None


def test_losses_that_are_not_fused(monkeypatch):
    model, batch = llama().train(), text_batch()
    batch["labels"] = batch["input_ids"]
    report = accelerate(model, loss=True)
    calls = count_ops(monkeypatch)
    assert model(**batch, logits_to_keep=20).logits is not None
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert model(**batch).loss == model(**batch).logits.sum()
    assert calls["linear_cross_entropy"] == 0
    report.revert()
    head = accelerate(llama().model, loss=True)
    assert head.left == {"loss": "a LlamaModel has no language-modelling loss"}


def _unused(model: nn.Module) -> int:
    """Llava takes the stream before the last layer of its tower."""
    last = [
        n for n, _ in model.named_parameters() if "encoder.layers.2" in n or "post_layernorm" in n
    ]
    return len(last)


def test_mixed_precision_as_trainers_do_it(monkeypatch):
    """bfloat16 autocast over float32 weights: as far from float32 as transformers."""
    model, batch = llama(), text_batch(padding="right")
    where = batch["attention_mask"].bool()
    errors = []
    with torch.no_grad():
        exact = model(**batch).logits[where]
        for step in range(2):
            if step:
                accelerate(model)
                calls = count_ops(monkeypatch)
            with torch.autocast("cpu", torch.bfloat16):
                errors.append((model(**batch).logits[where].float() - exact).norm())
    assert calls["rotary_attention"] == 3 and calls["swiglu"] == 3
    assert 0 < errors[1] <= 1.5 * errors[0]


@needs_backward
@pytest.mark.parametrize("order", ["adapters first", "kernels first"])
def test_lora(order, monkeypatch, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = llama(), text_batch()
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    if order == "kernels first":
        accelerate(model)
    adapted = peft.get_peft_model(model, config)
    report = accelerate(adapted)
    assert report.model == "LlamaForCausalLM"
    calls = count_ops(monkeypatch)
    _, actual = _step(adapted, batch)
    with torch.no_grad():
        logits = adapted(**batch).logits
    assert calls["rotary_attention"] == 6 and calls["swiglu"] == 6
    report.revert()
    _, expected = _step(adapted, batch)
    assert len(expected) == 3 * len(targets) * 2
    assert_same_gradients(actual, expected)
    with torch.no_grad():
        assert_same(logits, adapted(**batch).logits)
    accelerate(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path)
    with torch.no_grad():
        assert_same(loaded(**batch).logits, logits)
        merged = loaded.merge_and_unload()
        assert_same(merged(**batch).logits, logits)


@needs_backward
@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer(tmp_path, accumulation):
    """Accumulated batches of unequal numbers of labels count each label once."""
    pytest.importorskip("accelerate")
    tokens = torch.randint(3, 95, (12, 12))
    labels = tokens.masked_fill(torch.arange(12) < torch.arange(12).unsqueeze(1) % 9, -100)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]
    losses = []
    start = llama().state_dict()
    for kernels in (None, {}, {"loss": True}):
        model = llama()
        model.load_state_dict(start)
        if kernels is not None:
            accelerate(model, **kernels)
        options = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-3,
        )
        trainer = transformers.Trainer(model, options, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    for fast in losses[1:]:
        assert fast == pytest.approx(losses[0], rel=1e-4)
