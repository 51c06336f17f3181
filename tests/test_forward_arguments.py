"""Every argument that a forward of `transformers` takes has its meaning here, or is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_helpers import BACKENDS, Prompt, Shape, assert_close, batch_of, hf_model, our_model, to
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

import mllama
from mllama.arguments import REFUSED

SHAPE = Shape(tile_side=28, layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)
CLASSES = [
    "MllamaForConditionalGeneration",
    "MllamaForCausalLM",
    "MllamaModel",
    "MllamaTextModel",
    "MllamaVisionModel",
]
# What decorators and the loss take out of **kwargs without a signature that says so.
UNNAMED = {"output_attentions", "output_hidden_states", "return_dict", "cache_position"}
OF_THE_LOSS = {"num_items_in_batch", "shift_labels"}


@pytest.fixture(scope="module")
def hf() -> transformers.MllamaForConditionalGeneration:
    return hf_model(SHAPE)


@pytest.fixture(scope="module")
def model(hf: Any) -> mllama.MllamaForConditionalGeneration:
    return our_model(SHAPE, hf, ("auto", "cpu"))


@pytest.fixture
def batch() -> dict[str, Any]:
    return batch_of(SHAPE, [Prompt(9, (2,), (2,)), Prompt(9, (1,), (6,))])


def part(model: Any, name: str) -> Any:
    return {
        "MllamaForConditionalGeneration": model,
        "MllamaModel": model.model,
        "MllamaTextModel": model.model.language_model,
        "MllamaVisionModel": model.model.vision_model,
    }[name]


def names_of(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}


@pytest.mark.parametrize("name", CLASSES)
def test_no_argument_of_transformers_is_unknown(name: str) -> None:
    theirs = names_of(inspect.unwrap(getattr(transformers, name).forward)) | UNNAMED
    theirs |= set(TransformersKwargs.__annotations__) | set(FlashAttentionKwargs.__annotations__)
    ours = names_of(getattr(mllama, name).forward)
    if "For" in name:
        assert "num_items_in_batch" in ours
    elif name == "MllamaVisionModel":
        theirs -= {"position_ids"}  # patches have none, and theirs ignores them
    assert theirs - OF_THE_LOSS <= ours | set(REFUSED)
    assert not ours & set(REFUSED) - {"output_hidden_states"}


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "MllamaForCausalLM"])
@pytest.mark.parametrize("argument", sorted(REFUSED))
def test_refused_by_name_unless_it_asks_for_nothing(
    name: str, argument: str, model: Any, batch: dict[str, Any]
) -> None:
    module, neutral = part(model, name), REFUSED[argument][0]
    taken = names_of(module.forward)
    if argument in taken:
        return
    inputs = {k: v for k, v in batch.items() if k in taken and "Text" not in name}
    inputs = inputs or {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        expected = module(**inputs)[0]
        for value in {None, neutral}:
            assert module(**inputs, **{argument: value})[0].equal(expected)
        value = torch.ones(2, 3) if neutral is None else not neutral
        with pytest.raises(ValueError, match=f"^{argument} is not supported, got"):
            module(**inputs, **{argument: value})
        with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
            module(**inputs, no_such=None)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "MllamaForCausalLM"])
def test_a_tuple_of_every_part(name: str, model: Any, batch: dict[str, Any]) -> None:
    module = part(model, name)
    inputs = {k: v for k, v in batch.items() if k in names_of(module.forward)}
    if "Text" in name:
        inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        found = module(**inputs, return_dict=False)
        assert type(found) is tuple and found[0].equal(module(**inputs)[0])


@pytest.mark.parametrize(
    "kept",
    [0, 1, 3, -2, torch.tensor([1, 4]), torch.tensor([8]), torch.arange(9) > 5, [2, 3]],
    ids=str,
)
def test_kept_logits(kept: Any, hf: Any, model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = hf(**batch, logits_to_keep=kept).logits
        assert_close(model(**batch, logits_to_keep=kept).logits, expected)
    with pytest.raises(ValueError, match=r"logits_to_keep must be .* shape \(1, 2\)"):
        model(**batch, logits_to_keep=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"logits_to_keep must be .* got None"):
        model(**batch, logits_to_keep=None)


def test_a_number_of_numpy_keeps_so_many_logits(model: Any, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        kept = model(**batch, logits_to_keep=np.int64(2)).logits
        assert kept.equal(model(**batch, logits_to_keep=2).logits)
        loss = model(**batch, labels=labels_of(batch), logits_to_keep=np.int64(0)).loss
        assert loss.equal(model(**batch, labels=labels_of(batch)).loss)


def labels_of(batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == SHAPE.vocab, -100)
    labels[1, :5] = -100
    return labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("items", [None, 5, torch.tensor(23)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("return_logits", [False, True])
def test_the_loss_of_transformers(
    backend: tuple[str, str],
    items: Any,
    shifted: bool,
    return_logits: bool,
    hf: Any,
    batch: dict[str, Any],
) -> None:
    model = our_model(SHAPE, hf, backend).train()
    options: dict[str, Any] = {"labels": labels_of(batch), "num_items_in_batch": items}
    if shifted:  # what a collator makes that has moved the labels before it cut the text
        options["shift_labels"] = options["labels"].roll(-1, dims=1)
    expected = hf(**batch, **options, use_cache=False).loss
    inputs = to(batch | options, backend[1])
    loss = model(**inputs, return_logits=return_logits).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, got = torch.autograd.grad(expected, hf.lm_head.weight), None
    got = torch.autograd.grad(loss, model.lm_head.weight)
    assert_close(got[0], wanted[0])


def test_shifted_labels_of_another_size(model: Any, batch: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"shift_labels must be \(2, 9\), like labels, got \(2, 8\)"
    ):
        model(**batch, labels=labels_of(batch), shift_labels=labels_of(batch)[:, 1:])


def test_a_loss_has_a_graph_or_is_refused(model: Any, batch: dict[str, Any]) -> None:
    labels = labels_of(batch)
    assert model(**batch, labels=labels).loss.requires_grad
    with torch.no_grad():
        expected = model(**batch, labels=labels, use_cache=True)
        assert expected.past_key_values.columns == 9
    cache = model(**batch, use_cache=True).past_key_values
    for given, name in (
        ({"use_cache": True}, "use_cache=True"),
        ({"past_key_values": cache}, "past_key_values"),
    ):
        for mode in (True, False):
            with pytest.raises(ValueError, match=f"labels with {name}: .* no gradient"):
                model.train(mode)(**batch, labels=labels, **given)
    assert cache.columns == 9
    frozen = our_model(SHAPE, model).requires_grad_(False)
    assert frozen(**batch, labels=labels, use_cache=True).past_key_values.columns == 9
    embeds = frozen.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # a learned prompt
    prompt = {name: value for name, value in batch.items() if name != "input_ids"}
    with pytest.raises(ValueError, match=r"labels with use_cache=True: .* no gradient"):
        frozen(**prompt, inputs_embeds=embeds, labels=labels, use_cache=True)
    frozen(**prompt, inputs_embeds=embeds, labels=labels).loss.backward()
    assert embeds.grad.abs().sum() > 0
