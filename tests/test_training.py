"""Training the models: every parameter has a gradient, the one `transformers` gives it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_helpers import (
    BACKENDS,
    Counting,
    Prompt,
    Shape,
    assert_close,
    batch_of,
    hf_model,
    our_model,
    to,
    with_gates_as_one,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import mllama
from mllama.layers import ResidualStream
from mllama.varlen import VarlenBatch

SHAPE = Shape(layers=3, cross=(1,), local_layers=2, global_layers=1, taps=(0, 1), tile_side=28)
Batch = dict[str, Tensor]


@pytest.fixture
def hf() -> nn.Module:
    return hf_model(SHAPE).train()


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest, hf: nn.Module) -> Any:
    return our_model(SHAPE, hf, request.param).train()


@pytest.fixture
def batch(model: Any) -> Batch:
    """Two rows, one with two images, padded on the left; on the model's device."""
    batch = batch_of(SHAPE, [Prompt(12, (0, 3), (6, 2)), Prompt(9, (0,), (1,))])
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == SHAPE.vocab)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    return to(batch | {"labels": labels}, model.device)


def gradients(
    model: nn.Module, batch: Batch, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        loss = model(**to(batch, model.device)).loss
    loss.backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def test_every_parameter_has_the_gradient_of_transformers(
    hf: nn.Module, model: Any, batch: Batch
) -> None:
    expected, found = gradients(hf, batch), gradients(model, batch)
    assert found.keys() == expected.keys()
    gates = [name for name in found if "gate" in name.rpartition(".")[2]]
    assert len(gates) == 3 + 2 * SHAPE.global_layers + 2 * len(SHAPE.cross)
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
    expected = with_gates_as_one(expected)
    for name, gradient in with_gates_as_one(found).items():
        assert_close(gradient, expected[name], rtol=1e-3)


def test_a_closed_gate_learns(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                parameter.zero_()
    found = gradients(model, batch)
    assert found["model.language_model.layers.1.cross_attn_attn_gate"].abs().max() > 0
    assert found["model.language_model.layers.1.cross_attn_mlp_gate"].abs().max() > 0


def test_only_what_is_trained_has_gradients(model: Any, batch: Batch) -> None:
    """As when the vision tower is frozen: nothing of it is kept for a backward pass."""
    model.model.vision_model.requires_grad_(False)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == ("vision_model" in name), name


def test_images_given_as_states_have_gradients(model: Any, batch: Batch) -> None:
    images = {n: batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    states = model.model.encode_images(**images).states.detach().requires_grad_()
    rest = {name: value for name, value in batch.items() if name not in images}
    model(**rest, cross_attention_states=states).loss.backward()
    assert states.grad.abs().max() > 0


def test_checkpointing_computes_again_and_changes_nothing(model: Any, batch: Batch) -> None:
    assert model.supports_gradient_checkpointing and not model.is_gradient_checkpointing
    plain, once = counted_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    again, twice = counted_gradients(model, batch)
    for op in ("vision_attention", "cross_attention", "rotary_attention", "swiglu"):
        assert twice[op] == 2 * once[op] > 0, op
    assert_same(again, plain)
    model.gradient_checkpointing_enable(every_n_layers=2)
    again, some = counted_gradients(model, batch)
    assert once["swiglu"] < some["swiglu"] < twice["swiglu"]
    assert_same(again, plain)
    model.gradient_checkpointing_disable()
    assert counted_gradients(model, batch)[1] == once


def assert_same(again: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Bits, but for the gates: the sum after one is taken with the next norm or, where a layer ends
    with its own sum, alone, in another order."""
    again = with_gates_as_one(again)
    for name, gradient in with_gates_as_one(plain).items():
        if name == "gates":
            assert_close(again[name], gradient, rtol=1e-5)
        else:
            assert again[name].equal(gradient), name


def counted_gradients(model: Any, batch: Batch) -> tuple[dict[str, Tensor], Counter[str]]:
    counts: Counter[str] = Counter()
    with model.ops.replaced(lambda ops: Counting(ops, counts)):
        return gradients(model, batch), counts


def test_checkpointing_keeps_one_tensor_per_text_layer(model: Any, batch: Batch) -> None:
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel() if not isinstance(x, nn.Parameter) else 0)
        return x

    kept = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**batch)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


def test_checkpointing_is_for_training_only(model: Any, batch: Batch) -> None:
    model.gradient_checkpointing_enable()
    model.eval()
    with torch.no_grad():
        assert model(**batch, use_cache=True).past_key_values.columns == 12
    counts = counted_gradients(model, batch)[1]
    assert counts["swiglu"] == SHAPE.layers
    with pytest.raises(ValueError, match=r"use_reentrant': False} or nothing, got .*True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="offload False, got 1 and True"):
        model.gradient_checkpointing_enable(offload=True)


def test_the_stream_settles_to_what_the_norm_reads(model: Any) -> None:
    """Between checkpointed layers nothing is pending; the values are those of the fused way."""
    layer = model.model.language_model.layers[0]
    x, delta = torch.randn(20, SHAPE.heads * SHAPE.head_dim), torch.randn(20, SHAPE.intermediate)
    read, varlen = [], VarlenBatch.dense(1, 20, x.device)
    for settle in (False, True):
        stream = ResidualStream(model.ops, x, varlen)
        stream.add(layer.mlp.down, delta)
        if settle:
            stream = ResidualStream(model.ops, stream.value(), varlen)
        read.append(stream.norm(layer.input_layernorm))
    assert read[0].equal(read[1])


def test_autocast_is_no_worse_than_that_of_transformers(
    hf: nn.Module, model: Any, batch: Batch
) -> None:
    exact = with_gates_as_one(gradients(hf, batch))

    def errors(model: Any) -> Tensor:
        found = with_gates_as_one(gradients(model, batch, torch.bfloat16))
        norm = torch.linalg.vector_norm
        return torch.stack([norm(found[n] - exact[n]) / norm(exact[n]) for n in exact])

    theirs, ours = errors(hf), errors(model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert ours.mean() <= 1.5 * theirs.mean()
    # The gates are a handful of numbers, each a sum that cancels: one draw of their error says nothing.
    many = torch.tensor([name != "gates" for name in exact])
    assert ours[many].max() <= 2 * theirs.max()


def test_text_alone_trains() -> None:
    text = mllama.MllamaConfig(**SHAPE.configs()).text_config
    model = mllama.MllamaForCausalLM(text, backend="reference").train()
    ids = torch.randint(3, 90, (2, 7))
    first = model(ids, labels=ids).loss
    first.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model(ids, labels=ids).loss < first


def test_embeddings_are_found(model: Any) -> None:
    text = model.model.language_model
    for part in (model, model.model, text):
        assert part.get_input_embeddings() is text.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert text.get_output_embeddings() is None
    vision = model.model.vision_model
    assert vision.get_input_embeddings() is vision.patch_embedding


def test_outputs_on_request(model: Any, batch: Batch) -> None:
    loss, logits = model(**batch, return_dict=False)
    assert loss.dim() == 0 and logits.shape[:2] == batch["input_ids"].shape
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(**batch, output_attentions=True)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "hooked"])
def test_the_loss_without_logits(model: Any, batch: Batch, plain: bool) -> None:
    """The same loss and gradients when only the rows with a target reach the head."""
    whole = model(**batch)
    expected = with_gates_as_one(gradients(model, batch))
    rows: list[int] = []
    if not plain:
        model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    alone = model(**batch, return_logits=False)
    assert alone.logits is None
    assert plain or rows == [(batch["labels"][:, 1:] != -100).sum()]
    torch.testing.assert_close(alone.loss, whole.loss)
    model.zero_grad()
    alone.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in with_gates_as_one(found).items():
        assert_close(gradient, expected[name], rtol=1e-4)
    del batch["labels"]
    with pytest.raises(ValueError, match="return_logits=False leaves nothing without labels"):
        model(**batch, return_logits=False)


def test_the_trainer_of_transformers_takes_it(tmp_path: Path) -> None:
    model = our_model(SHAPE, hf_model(SHAPE))
    batch = batch_of(SHAPE, [Prompt(9, (0,), (1,)), Prompt(9, (2,), (3,))])
    batch["labels"] = batch["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    after = model.state_dict()
    assert saved.keys() == after.keys() and all(saved[name].equal(after[name]) for name in saved)
    assert not any(before[name].equal(after[name]) for name in saved)
