"""Several turns on one cache: text and images are used again, also after an interrupt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_helpers import (
    IMAGE_INPUTS,
    SHAPE,
    Recorder,
    Script,
    count_vision_calls,
    endless_model,
    second_turn,
)
from model_helpers import Prompt, batch_of, hf_model, our_model

from mllama.generation.generate import GenerateOutput

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")

IMAGE = SHAPE.vocab


@pytest.fixture
def model() -> Any:
    return endless_model()


@pytest.fixture
def vision_calls(model: Any) -> list[int]:
    return count_vision_calls(model)


@pytest.mark.parametrize("semantics", ["meta", "transformers"])
@pytest.mark.parametrize("passed_again", [True, False])
def test_a_second_question_runs_no_vision_tower(passed_again: bool, semantics: str) -> None:
    hf = hf_model(SHAPE)
    fresh, reused = (our_model(SHAPE, hf, semantics=semantics) for _ in range(2))
    vision_calls = count_vision_calls(reused)
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,)), Prompt(6, (0,), (3,))])
    first = reused.generate(
        **batch, max_new_tokens=5, eos_token_id=[], return_dict_in_generate=True
    )
    assert isinstance(first, GenerateOutput) and len(vision_calls) == 1
    question = torch.randint(3, 90, (2, 4))
    turn = second_turn(batch, first.sequences, question)
    expected = fresh.generate(**turn, max_new_tokens=6, eos_token_id=[])
    if not passed_again:
        for name in IMAGE_INPUTS:
            del turn[name]
    actual = reused.generate(
        **turn, max_new_tokens=6, eos_token_id=[], past_key_values=first.past_key_values
    )
    assert actual.equal(expected)
    assert len(vision_calls) == 1, "the image was encoded again"


def test_without_a_mask_a_second_question_sees_what_the_first_saw(
    model: Any, vision_calls: list[int]
) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,))])
    cache = model.new_cache()
    sequences = model.generate(**batch, max_new_tokens=5, past_key_values=cache)
    turn = second_turn(batch, sequences, torch.tensor([[7, 8, 9]]))
    expected = model.generate(**turn, max_new_tokens=6)
    actual = model.generate(turn["input_ids"], max_new_tokens=6, past_key_values=cache)
    assert actual.equal(expected) and vision_calls == [1, 1]


@pytest.mark.parametrize("all_passed", [True, False])
def test_new_images_join_those_in_the_cache(
    model: Any, vision_calls: list[int], all_passed: bool
) -> None:
    """Rows that had different numbers of images get different numbers of new ones."""
    prompts = [Prompt(20, (1, 3, 15), (2, 6, 4)), Prompt(18, (2, 10, 14), (1, 7, 3))]
    whole = batch_of(SHAPE, prompts, padding="right")
    split = torch.tensor([9, 12])  # two and one image
    images = [2, 2]
    expected = model.generate(**whole, max_new_tokens=8)
    cache = model.new_cache(2)
    vision_calls.clear()
    columns = torch.arange(12)
    first = {
        "input_ids": whole["input_ids"][:, :12],
        "attention_mask": (columns < split[:, None]).long(),
        "cross_attention_mask": whole["cross_attention_mask"][:, :12, :2],
        **{n: whole[n][:, :2] for n in IMAGE_INPUTS},
    }
    first["cross_attention_mask"] = (
        first["cross_attention_mask"] * first["attention_mask"][..., None, None]
    )
    assert [(row[:n] == IMAGE).sum().item() for row, n in zip(first["input_ids"], split)] == images
    model.generate(**first, max_new_tokens=3, past_key_values=cache)
    turn = dict(whole)
    if not all_passed:
        for name in IMAGE_INPUTS:
            turn[name] = whole[name][:, 2:]
    assert model.generate(**turn, max_new_tokens=8, past_key_values=cache).equal(expected)
    assert vision_calls == [4, 2]


def test_rows_with_different_image_counts_across_turns(model: Any, vision_calls: list[int]) -> None:
    whole = batch_of(
        SHAPE, [Prompt(14, (0, 2, 9), (2, 6, 4)), Prompt(14, (1, 10), (1, 7))], "right"
    )
    expected = model.generate(**whole, max_new_tokens=8)
    vision_calls.clear()
    cache = model.new_cache(2)
    first = {name: whole[name][:, :6] for name in ("input_ids", "attention_mask")}
    first["cross_attention_mask"] = whole["cross_attention_mask"][:, :6, :2].clone()
    first["cross_attention_mask"][1, :, 1] = 0  # the second row has one image so far
    for name in IMAGE_INPUTS:
        first[name] = whole[name][:, :2].clone()
        first[name][1, 1] = 0
    first["aspect_ratio_mask"][1, 1, 0] = 1
    model.generate(**first, max_new_tokens=2, past_key_values=cache)
    assert model.generate(**whole, max_new_tokens=8, past_key_values=cache).equal(expected)
    assert vision_calls == [4, 2], "one new image per row"


def test_an_answer_that_is_tokenised_differently_is_computed_again(
    model: Any, vision_calls: list[int]
) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,))])
    cache = model.new_cache()
    sequences = model.generate(**batch, max_new_tokens=6, past_key_values=cache)
    sequences[0, 11] = (sequences[0, 11] + 1) % 90
    turn = second_turn(batch, sequences, torch.tensor([[7, 8]]))
    expected = model.generate(**turn, max_new_tokens=6)
    vision_calls.clear()
    assert model.generate(**turn, max_new_tokens=6, past_key_values=cache).equal(expected)
    assert vision_calls == []
    again = model.generate(**turn, max_new_tokens=6, past_key_values=cache)
    assert again.equal(expected), "the very same prompt once more"
    cut = {**turn, "input_ids": turn["input_ids"].clone()}
    cut["input_ids"][0, 1] = (cut["input_ids"][0, 1] + 1) % 90
    with pytest.raises(ValueError, match=r"row 0 of input_ids leaves the text .* at token 1"):
        model.generate(**cut, past_key_values=cache)


def test_a_cache_filled_by_forward_is_continued(model: Any, vision_calls: list[int]) -> None:
    """Also where forward has counted padding columns as positions."""
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,)), Prompt(7, (1,), (2,))])
    expected = model.generate(**batch, max_new_tokens=6)
    cache = model.new_cache(2)
    vision_calls.clear()
    part = {n: v[:, :8] if n in ("input_ids", "attention_mask") else v for n, v in batch.items()}
    with torch.no_grad():
        model(**part, past_key_values=cache)
    assert model.generate(**batch, max_new_tokens=6, past_key_values=cache).equal(expected)
    assert vision_calls == [2]


@pytest.mark.parametrize("at", [2, 3, 6])
def test_after_an_interrupt_the_cache_is_used_on(
    model: Any, vision_calls: list[int], at: int
) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,)), Prompt(4, (0,), (1,))])
    whole = model.generate(**batch, max_new_tokens=12)
    cache, recorder = model.new_cache(2), Recorder(interrupt_at=at)
    vision_calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.generate(**batch, max_new_tokens=12, past_key_values=cache, streamer=recorder)
    assert recorder.ends == 1, "whoever waits for the streamer must be told"
    said = torch.tensor(recorder.puts[1:]).T
    assert said.equal(whole[:, 9 : 8 + at])
    assert [len(text) for text in cache.texts] == cache.lengths.tolist() == [7 + at, 2 + at]
    turn = second_turn(batch, torch.cat([batch["input_ids"], said], 1), said[:, :0])
    rest = model.generate(**turn, max_new_tokens=13 - at, past_key_values=cache)
    assert rest.equal(whole) and vision_calls == [2]


def test_an_interrupted_prefill_leaves_the_cache_as_it_was(
    model: Any, vision_calls: list[int]
) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,))])
    expected = model.generate(**batch, max_new_tokens=6)
    cache, layer = model.new_cache(), model.model.language_model.layers[-1]
    original = layer.forward

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    layer.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        model.generate(**batch, max_new_tokens=6, past_key_values=cache)
    assert cache.lengths.tolist() == [0] and cache.num_tiles == 0
    layer.forward = original
    assert model.generate(**batch, max_new_tokens=6, past_key_values=cache).equal(expected)
    turn = second_turn(batch, expected, torch.tensor([[7, 8]]))
    layer.forward = interrupt
    blind = {**turn, "cross_attention_mask": 0 * turn["cross_attention_mask"]}
    with pytest.raises(KeyboardInterrupt):
        model.generate(**blind, max_new_tokens=6, past_key_values=cache)
    assert cache.lengths.tolist() == [14] and cache.num_tiles == 4
    layer.forward = original
    vision_calls.clear()
    # Without a mask the cache tells what the new text sees: what it told before the interrupts.
    actual = model.generate(turn["input_ids"], max_new_tokens=6, past_key_values=cache)
    assert vision_calls == []
    assert actual.equal(model.generate(**turn, max_new_tokens=6))


def test_a_closed_stream_leaves_a_usable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch)
    cache = script.model.new_cache()
    inputs = script.say("a long story")
    stream = script.model.stream(**inputs, past_key_values=cache)
    assert cache.texts is None, "nothing runs before the first piece is asked for"
    assert [next(stream) for _ in range(3)] == ["a", " ", "l"]
    stream.close()
    assert cache.texts == [inputs["input_ids"][0].tolist() + script.rows[0][:2]]
    assert cache.lengths.tolist() == [6]


def test_wrong_image_counts_across_turns(model: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (6,))])
    cache = model.new_cache()
    sequences = model.generate(**batch, max_new_tokens=2, past_key_values=cache)
    turn = second_turn(batch, sequences, torch.tensor([[7, IMAGE, 8]]))
    two = dict(turn)
    for name in IMAGE_INPUTS:
        two[name] = torch.cat([batch[name]] * 3, 1)
    with pytest.raises(
        ValueError, match=r"have \[3\] images .* expected the \[1\] .* and the \[1\]"
    ):
        model.generate(**two, past_key_values=cache)
    with pytest.raises(ValueError, match="cross_attention_mask covers 1 images, input_ids has 2"):
        model.generate(**turn, past_key_values=cache)
