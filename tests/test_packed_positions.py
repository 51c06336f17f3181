"""Texts packed into a row, told apart by positions that begin again: computed as `transformers` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import BACKENDS, Prompt, Shape, assert_close, batch_of, hf_model, our_model, to

SHAPE = Shape(tile_side=28, layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)
LENGTH = 40  # with 20 columns or fewer per row, products of few rows would be meant too


@pytest.fixture(scope="module")
def hf() -> Any:
    return hf_model(SHAPE)


def packed(*lengths: int, first: int = 0) -> list[int]:
    return [first + i for length in lengths for i in range(length)]


POSITIONS = {
    "one text": [packed(LENGTH)],
    "two texts": [packed(15, 25)],
    "of every size": [packed(1, 2, 1, 36)],
    "from another position": [packed(15, 25, first=7)],
    "a gap": [packed(15) + packed(25, first=30)],
    "standing still": [[0] * 5 + packed(35)],
    "backwards": [list(range(LENGTH, 0, -1))],
    "for all rows": [packed(10, 30), packed(10, 30)],
    "another in each row": [packed(10, 30), packed(5, 5, 30)],
    "in one row": [packed(LENGTH), packed(20, 20)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("images", [0, 1])
def test_values_are_those_of_transformers(
    backend: tuple[str, str], name: str, images: int, hf: Any
) -> None:
    model, positions = our_model(SHAPE, hf, backend), torch.tensor(POSITIONS[name])
    prompts = [Prompt(LENGTH, (2,) * images, (6,) * images)] * len(positions)
    batch = batch_of(SHAPE, prompts)
    mask = batch.pop("attention_mask")
    ways: list[dict[str, Any]] = [
        {"use_cache": False},
        {"use_cache": False, "attention_mask": mask},  # one text: the mask says that all is real
        {"use_cache": True},  # a cache too makes it one text
    ]
    for options in ways:
        inputs = batch | options | {"position_ids": positions}
        with torch.no_grad():
            expected = hf(**inputs).logits
            assert_close(model(**to(inputs, backend[1])).logits, expected)


def test_one_row_of_positions_for_a_batch(hf: Any) -> None:
    model = our_model(SHAPE, hf, ("auto", "cpu"))
    ids, positions = torch.randint(3, 90, (3, LENGTH)), torch.tensor([packed(7, 33)])
    with torch.no_grad():
        expected = hf(ids, position_ids=positions, use_cache=False).logits
        assert_close(model(ids, position_ids=positions, use_cache=False).logits, expected)
        each = model(ids, position_ids=positions.expand(3, -1), use_cache=False).logits
        assert_close(each, expected)
        text = model.model.language_model
        assert_close(model.lm_head(text(ids, position_ids=positions, use_cache=False)[0]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_packed_texts_is_training_on_each(backend: tuple[str, str], hf: Any) -> None:
    model, lengths = our_model(SHAPE, hf, backend).train(), (15, 25)
    ids = torch.randint(3, 90, (1, LENGTH), device=backend[1])
    labels, positions = ids.clone(), torch.tensor([packed(*lengths)], device=backend[1])
    labels[0, [0, lengths[0]]] = -100  # a first token is no target of the text before
    wanted = sum(
        model(text, labels=text, num_items_in_batch=LENGTH - 2).loss
        for text in ids.split(lengths, dim=1)
    )
    found = model(ids, labels=labels, position_ids=positions).loss
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    weights = [
        p for n, p in model.named_parameters() if "self_attn.k_proj" in n and "language" in n
    ]
    for got, expected in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True
    ):
        assert_close(got, expected)
