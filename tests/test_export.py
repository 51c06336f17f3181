"""A prefill as an exported program, of fixed and of any length, and as a compiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import BACKENDS, Prompt, Shape, assert_close, batch_of, hf_model, our_model
from torch.export import Dim

SHAPE = Shape(tile_side=28, layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)
LENGTH = {1: Dim("length", min=2, max=512)}
TEXT = {"input_ids": LENGTH, "attention_mask": LENGTH}
IMAGES = dict.fromkeys(["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"])
ON_CPU = [backend for backend in BACKENDS if backend.id != "kernels-cuda"]


@pytest.fixture(scope="module")
def hf() -> Any:
    return hf_model(SHAPE)


def prompts(length: int) -> list[Prompt]:
    return [Prompt(length, (1,), (2,)), Prompt(length - 4, (0,), (6,))]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("semantics", ["transformers", "meta"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_with_images_and_padding_of_any_length(
    backend: tuple[str, str], semantics: str, grad: bool, hf: Any
) -> None:
    model = our_model(SHAPE, hf, backend, semantics)
    batch = batch_of(SHAPE, prompts(20))
    dynamic = TEXT | IMAGES | {"cross_attention_mask": LENGTH}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (), batch, dynamic_shapes=dynamic).module()
    for length in (20, 9, 37):
        batch = batch_of(SHAPE, prompts(length), padding="holes")
        found = program(**batch)
        with torch.no_grad():
            expected = model(**batch, use_cache=False)
        assert found.keys() == ["logits"]
        assert_close(found.logits, expected.logits, rtol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_text_alone_before_the_model_has_run(backend: tuple[str, str], hf: Any) -> None:
    """Nothing of the trace stays in the model."""
    model = our_model(SHAPE, hf, backend)
    ids, more = torch.randint(3, 90, (2, 8)), torch.randint(3, 90, (2, 30))
    with torch.no_grad():
        fixed = torch.export.export(model, (), {"input_ids": ids}).module()
        shapes = {"input_ids": LENGTH}
        dynamic = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes).module()
        for program, inputs in ((fixed, ids), (dynamic, ids), (dynamic, more)):
            expected = model(inputs, use_cache=False).logits
            assert_close(program(input_ids=inputs).logits, expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_positions(backend: tuple[str, str], hf: Any) -> None:
    model, ids = our_model(SHAPE, hf, backend), torch.randint(3, 90, (1, 20))
    inputs = {"input_ids": ids, "position_ids": torch.arange(20).unsqueeze(0)}
    shapes = {"input_ids": LENGTH, "position_ids": LENGTH}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        for lengths in ((20,), (5, 15), (1, 1, 30)):
            positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
            ids = torch.randint(3, 90, positions.shape)
            expected = model(ids, position_ids=positions, use_cache=False).logits
            found = program(input_ids=ids, position_ids=positions).logits
            assert_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("return_logits", [True, False])
def test_a_loss(backend: tuple[str, str], return_logits: bool, hf: Any) -> None:
    model, batch = our_model(SHAPE, hf, backend), batch_of(SHAPE, prompts(20))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    inputs = {**batch, "labels": labels, "return_logits": return_logits}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs).module()
        for given in (inputs, {**inputs, "labels": labels.masked_fill(labels % 3 == 0, -100)}):
            assert_close(program(**given).loss, model(**given).loss)
    with pytest.raises(RuntimeError, match=r"labels must be -100 or within 0\.\.95"):
        program(**{**inputs, "labels": labels.fill_(SHAPE.vocab + 1)})


def test_a_program_checks_its_input_and_keeps_no_cache(hf: Any) -> None:
    model, ids = our_model(SHAPE, hf), torch.randint(3, 90, (1, 8))
    program = torch.export.export(model, (), {"input_ids": ids}).module()
    with pytest.raises(RuntimeError, match=r"input_ids must lie within 0\.\.103"):
        program(input_ids=ids + 100)
    with pytest.raises(RuntimeError, match="no image tokens where no images are given"):
        program(input_ids=ids.fill_(SHAPE.vocab))
    with pytest.raises(
        ValueError, match="an exported program keeps no cache: give use_cache=False"
    ):
        torch.export.export(model, (), {"input_ids": ids, "use_cache": True})


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(*b.values, id=b.id, marks=[pytest.mark.full] * (b.id == "reference"))
        for b in ON_CPU
    ],
)
def test_compiled(backend: tuple[str, str], hf: Any) -> None:
    model, batch = our_model(SHAPE, hf, backend), batch_of(SHAPE, prompts(20))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_close(
            compiled(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
        )
    wanted = torch.autograd.grad(model(**batch, labels=labels).loss, model.lm_head.weight)
    found = torch.autograd.grad(compiled(**batch, labels=labels).loss, model.lm_head.weight)
    assert_close(found[0], wanted[0])
    torch.compiler.reset()
