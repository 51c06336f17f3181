"""Batches whose rows get images in different turns: a cached answer is that of the whole text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from generation_helpers import IMAGE_INPUTS, SHAPE
from model_helpers import BACKENDS, FIRST_TEXT_TOKEN, PAD_TOKEN, RATIOS, hf_model, our_model, to
from torch import Tensor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")

IMAGE, SIDE = SHAPE.vocab, SHAPE.tile_side


@dataclass
class Talk:
    """One row: its tokens, and the images of its image tokens."""

    tokens: list[int] = field(default_factory=list)
    images: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, rng: random.Random, images: int, first: bool = False) -> None:
        """A turn of a few tokens with images anywhere among them."""
        text = [rng.randrange(FIRST_TEXT_TOKEN, SHAPE.vocab) for _ in range(rng.randint(1, 5))]
        for _ in range(images):
            text.insert(0 if first else rng.randint(0, len(text)), IMAGE)
            ratio_id = rng.randint(1, len(RATIOS))
            pixels = torch.zeros(4, 3, SIDE, SIDE)
            tiles = RATIOS[ratio_id - 1][0] * RATIOS[ratio_id - 1][1]
            pixels[:tiles] = torch.randn(tiles, 3, SIDE, SIDE)
            self.images.append((ratio_id, pixels))
        self.tokens += text


def batch_of(talks: list[Talk], skip: list[int] | None = None) -> dict[str, Tensor]:
    """The inputs of whole conversations, without the first ``skip`` images of each row."""
    longest = max(len(talk.tokens) for talk in talks)
    ids = torch.full((len(talks), longest), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for row, talk in enumerate(talks):
        ids[row, longest - len(talk.tokens) :] = torch.tensor(talk.tokens)
        mask[row, longest - len(talk.tokens) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if not any(talk.images for talk in talks):
        return batch
    tiles = [[RATIOS[i - 1][0] * RATIOS[i - 1][1] for i, _ in talk.images] for talk in talks]
    ranges = [get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()]
    dense = convert_sparse_cross_attention_mask_to_dense(ranges, tiles, 4, longest)
    batch["cross_attention_mask"] = torch.from_numpy(dense)
    given = [talk.images[n:] for talk, n in zip(talks, skip or [0] * len(talks))]
    if most := max(map(len, given)):
        batch["pixel_values"] = torch.zeros(len(talks), most, 4, 3, SIDE, SIDE)
        batch["aspect_ratio_ids"] = torch.zeros(len(talks), most, dtype=torch.int64)
        batch["aspect_ratio_mask"] = torch.zeros(len(talks), most, 4, dtype=torch.int64)
        batch["aspect_ratio_mask"][:, :, 0] = 1
        for row, images in enumerate(given):
            for place, (ratio_id, pixels) in enumerate(images):
                batch["pixel_values"][row, place] = pixels
                batch["aspect_ratio_ids"][row, place] = ratio_id
                count = RATIOS[ratio_id - 1][0] * RATIOS[ratio_id - 1][1]
                batch["aspect_ratio_mask"][row, place, :count] = 1
    return batch


def as_states(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The images as what the projector makes of them."""
    if "pixel_values" not in batch:
        return batch
    batch = dict(batch)
    images = [batch.pop(name) for name in IMAGE_INPUTS]
    with torch.no_grad():
        states = model.model.vision_model.encode(*(t.flatten(0, 1) for t in images)).flatten(0, 1)
        return batch | {"cross_attention_states": model.model.multi_modal_projector(states)}


class Answers:
    """Asks a model: fresh, on a cache, and row by row."""

    def __init__(self, model: Any, device: str, tokens: int = 3) -> None:
        self.model, self.device = model, device
        self.options = {"max_new_tokens": tokens, "eos_token_id": [], "pad_token_id": PAD_TOKEN}

    def fresh(self, batch: dict[str, Tensor]) -> Tensor:
        """The answers to whole texts, which the next ones are compared with."""
        kept = {"return_dict_in_generate": True, "output_logits": True}
        output = self.model.generate(**to(batch, self.device), **self.options, **kept)
        self._logits = torch.stack(output.logits, 1)
        self._expected = output.sequences[:, batch["input_ids"].shape[1] :]
        return self._expected

    def agree(self, answers: Tensor) -> bool:
        """Whether answers are the expected ones, up to where the two best logits are a rounding apart."""
        for answer, expected, logits in zip(answers, self._expected, self._logits):
            if len(differing := (answer != expected).nonzero()):
                best, second = logits[differing[0, 0]].topk(2).values.tolist()
                if best - second > 1e-5 * logits.abs().max():
                    return False
        return True

    def __call__(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        length = batch["input_ids"].shape[1]
        return self.model.generate(**to(batch, self.device), **self.options, **options)[:, length:]

    def alone(self, talks: list[Talk]) -> Tensor:
        return torch.cat([self(batch_of([talk])) for talk in talks])


@pytest.fixture(params=BACKENDS)
def answers(request: pytest.FixtureRequest) -> Answers:
    model = our_model(SHAPE, hf_model(SHAPE), request.param, semantics="meta")
    return Answers(model, request.param[1])


@pytest.mark.parametrize(
    "draw", [*range(6), *(pytest.param(i, marks=pytest.mark.full) for i in range(6, 100))]
)
def test_a_cached_turn_is_answered_as_the_whole_text(
    draw: int, seed: int, answers: Answers
) -> None:
    """Also after going back to an earlier turn and on from there with something else."""
    rng = random.Random(1000 * seed + draw)
    talks = [Talk() for _ in range(rng.randint(1, 4))]
    cache = answers.model.new_cache(len(talks))
    earlier: list[tuple[list[Talk], list[int]]] = []
    for turn in range(rng.randint(1, 5)):
        if earlier and rng.random() < 0.4:
            back = rng.randrange(len(earlier))
            del earlier[back + 1 :]
            talks = [Talk([*talk.tokens], [*talk.images]) for talk in earlier[back][0]]
            cache.truncate(earlier[back][1])
        old = [len(talk.images) for talk in talks]
        for talk in talks:
            talk.add(rng, rng.randint(0, 2))
        whole = batch_of(talks)
        expected = answers.fresh(whole)
        given = whole if rng.random() < 0.5 else batch_of(talks, skip=old)
        if rng.random() < 0.3 and old == [0] * len(old):
            given = as_states(answers.model, to(given, answers.device))
        assert answers.agree(answers(given, past_key_values=cache)), f"turn {turn}"
        assert answers.agree(answers.alone(talks)), f"turn {turn}"
        for talk, answer in zip(talks, expected.tolist()):
            talk.tokens += answer
        earlier.append((talks, cache.lengths.tolist()))
        talks = [Talk([*talk.tokens], [*talk.images]) for talk in talks]


@pytest.mark.parametrize("draw", range(3))
def test_rows_that_always_see_an_image_do_so_with_the_semantics_of_transformers(
    draw: int, seed: int
) -> None:
    """There a token that sees no image attends to whatever tiles are around, also to padding."""
    rng = random.Random(1000 * seed + draw)
    answers = Answers(our_model(SHAPE, hf_model(SHAPE), semantics="transformers"), "cpu")
    talks, cache = [Talk(), Talk(), Talk()], answers.model.new_cache(3)
    for turn in range(4):
        for row, talk in enumerate(talks):
            talk.add(rng, 1 if not turn else int(turn == row + 1), first=not turn)
        expected = answers.fresh(batch_of(talks))
        assert answers.agree(answers(batch_of(talks), past_key_values=cache)), f"turn {turn}"
        for talk, answer in zip(talks, expected.tolist()):
            talk.tokens += answer


def test_images_of_different_rows_as_states(answers: Answers) -> None:
    """Row 1 gets its image in the first turn, row 0 in the second; the third has none."""
    rng = random.Random(3)
    talks, cache = [Talk(), Talk()], answers.model.new_cache(2)
    for images in ((0, 1), (1, 0), (0, 0)):
        for talk, count in zip(talks, images):
            talk.add(rng, count)
        whole = batch_of(talks)
        expected = answers.fresh(whole)
        states = as_states(answers.model, to(whole, answers.device))
        assert answers.agree(answers(states))
        assert answers.agree(answers(states, past_key_values=cache))
        for talk, answer in zip(talks, expected.tolist()):
            talk.tokens += answer


def test_states_that_may_be_old_or_new_are_refused() -> None:
    model = our_model(SHAPE, hf_model(SHAPE), semantics="meta")
    answers, rng = Answers(model, "cpu"), random.Random(5)
    talks, cache = [Talk(), Talk()], model.new_cache(2)
    for talk, count in zip(talks, (1, 0)):
        talk.add(rng, count)
    answers(as_states(model, batch_of(talks)), past_key_values=cache)
    for talk, count in zip(talks, (1, 2)):
        talk.add(rng, count)
    with pytest.raises(ValueError, match=r"2 images per row.*not clear which"):
        answers(as_states(model, batch_of(talks)), past_key_values=cache)
    batch = batch_of(talks)
    for name in IMAGE_INPUTS:
        del batch[name]
    with pytest.raises(ValueError, match=r"\[1, 2\] new image tokens per row, but no images"):
        answers(batch, past_key_values=cache)


def test_states_without_image_tokens_stay_in_sight(answers: Answers) -> None:
    """Nothing in the text tells of them, so the mask does."""
    torch.manual_seed(4)
    ids = torch.randint(FIRST_TEXT_TOKEN, SHAPE.vocab, (2, 12))
    states = torch.randn(2 * 2 * 4, (SIDE // 14) ** 2 + 1, SHAPE.heads * SHAPE.head_dim)
    mask = torch.ones(2, 12, 2, 4, dtype=torch.int64)
    mask[0, :, 1], mask[1, 5:, 0] = 0, 0
    whole = {"input_ids": ids, "cross_attention_states": states, "cross_attention_mask": mask}
    first = whole | {"input_ids": ids[:, :7], "cross_attention_mask": mask[:, :7]}
    answers.fresh(whole)
    for again in (True, False):
        cache = answers.model.new_cache(2)
        answers(first, past_key_values=cache)
        turn = whole if again else {k: v for k, v in whole.items() if k != "cross_attention_states"}
        assert answers.agree(answers(turn, past_key_values=cache))
    with pytest.raises(
        ValueError, match="1 images per row and past_key_values 2, and no image tok"
    ):
        answers(
            whole | {"cross_attention_states": states[:8], "cross_attention_mask": mask[:, :, :1]},
            past_key_values=cache,
        )


def test_without_a_mask_the_next_token_sees_what_the_last_kept_one_saw(answers: Answers) -> None:
    """Back in an earlier turn that is its image, not the one of the turn that is forgotten."""
    rng = random.Random(7)
    talks, cache = [Talk(), Talk()], answers.model.new_cache(2)
    for talk, count in zip(talks, (0, 1)):
        talk.add(rng, count)
    answers(batch_of(talks), past_key_values=cache)
    kept = cache.lengths.tolist()
    texts = [[*text] for text in cache.texts]
    for talk, text in zip(talks, texts):
        talk.tokens = [*text]
        talk.add(rng, 1)
    answers(batch_of(talks), past_key_values=cache)
    assert cache.num_tiles == 2 * 4
    cache.truncate(kept)
    talks = [Talk([*text, 9, 8], talk.images[:n]) for text, talk, n in zip(texts, talks, (0, 1))]
    whole = batch_of(talks)
    answers.fresh(whole)
    text_alone = {name: whole[name] for name in ("input_ids", "attention_mask")}
    assert answers.agree(answers(text_alone, past_key_values=cache))
    assert cache.num_tiles == 4, "the image of the forgotten turn is forgotten"


def test_the_beginning_of_the_text_is_answered_again(answers: Answers) -> None:
    """Also where it ends with an image, which is read again, and where the rest has others."""
    rng = random.Random(13)
    talks, cache, texts = [Talk(), Talk()], answers.model.new_cache(2), []
    for images in ((1, 1), (0, 2), (1, 0)):
        for talk, count in zip(talks, images):
            talk.tokens.append(rng.randrange(FIRST_TEXT_TOKEN, SHAPE.vocab))
            talk.add(rng, count)
        talks[0].tokens.append(IMAGE)
        talks[0].images.append(
            (1, torch.randn(4, 3, SIDE, SIDE) * torch.eye(4)[0].view(4, 1, 1, 1))
        )
        texts.append(batch_of(talks))
        expected = answers.fresh(texts[-1])
        assert answers.agree(answers(texts[-1], past_key_values=cache))
        for talk, answer in zip(talks, expected.tolist()):
            talk.tokens += answer
    for turn in (2, 2, 1, 0, 1, 2):
        batch = texts[turn]
        answers.fresh(batch)
        assert answers.agree(answers(batch, past_key_values=cache)), f"turn {turn}"


def test_forward_on_a_cache_sees_the_images_at_their_places(answers: Answers) -> None:
    """Places are per forward there: the mask covers those of all rows, old ones first."""
    rng = random.Random(11)
    talks, cache = [Talk(), Talk()], answers.model.new_cache(2)
    given, logits, past = [0, 0], [], [0, 0]
    for images in ((0, 1), (1, 0), (0, 0)):
        for talk, count in zip(talks, images):
            talk.tokens += [rng.randrange(FIRST_TEXT_TOKEN, SHAPE.vocab) for _ in range(2)]
            talk.add(rng, count)
            talk.tokens += [5] * (9 - (len(talk.tokens) - past[0]))
        past = [len(talk.tokens) for talk in talks]
        whole, new = batch_of(talks), batch_of(talks, skip=given)
        mask = whole["cross_attention_mask"][:, -9:]
        places = torch.zeros(2, 9, cache.num_tiles // 4 + max(images), 4, dtype=torch.int64)
        for row, place in ((1, 0), (0, 1)):
            if talks[row].images:
                places[row, :, place] = mask[row, :, 0]
        inputs = {name: new[name] for name in IMAGE_INPUTS if name in new}
        inputs |= {"input_ids": whole["input_ids"][:, -9:], "cross_attention_mask": places}
        with torch.no_grad():
            out = answers.model(**to(inputs, answers.device), past_key_values=cache)
        logits.append(out.logits)
        given = [len(talk.images) for talk in talks]
    with torch.no_grad():
        expected = answers.model(**to(whole, answers.device)).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
