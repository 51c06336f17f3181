"""Training batches: images, and rows of questions and answers about them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mllama.demo.questions import Question, sample_questions
from mllama.demo.shapes import Scene, draw, sample_scene
from mllama.loss import IGNORED
from mllama.processing.processor import MllamaProcessor
from tools.demo_model.seeing import patch_targets
from tools.demo_model.tokenizer import EOT, IMAGE_TOKEN, PAD

_EASY = ("describe", "shape")  # learned long before the other kinds
Texts = Literal["none", "questions", "dialogues", "practice"]
_ROUGH_SHARE = 0.15  # of the questions, written in lower case without the question mark


@dataclass(frozen=True)
class Rows:
    """R rows of text over M images, padded on the right to L tokens.

    Nothing masks the padding: no token before it sees it, and rows of one length are computed at once.

    Attributes:
        kinds: per row, the kinds of its questions.
        image: (R,) int64, the image of a row.
        input_ids, labels: (R, L) int64; labels are IGNORED but on answers.
        cross_attention_mask: (R, L, 1, 4) int64, 1 from the image token on for the image's tiles.
    """

    kinds: list[list[str]]
    image: Tensor
    input_ids: Tensor
    labels: Tensor
    cross_attention_mask: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        images: pixel_values, aspect_ratio_ids and aspect_ratio_mask, as the image processor makes them.
        targets: of `patch_targets`, stacked.
        rows: texts of similar length together, so that little is padding.
    """

    images: dict[str, Tensor]
    targets: Tensor
    rows: list[Rows]


class Batches:
    """Draws batches without end, the same ones for the same seed.

    Args:
        processor: of the demo model; the images and prompts are made as they are for its users.
        tokenizer: the demo tokenizer.
        seed: of the images and questions.
    """

    def __init__(self, processor: MllamaProcessor, tokenizer: Tokenizer, seed: int) -> None:
        self._processor, self._tokenizer = processor, tokenizer
        self._rng = random.Random(seed)
        self._end = tokenizer.token_to_id(EOT)
        self._pad = tokenizer.token_to_id(PAD)
        self._image = tokenizer.token_to_id(IMAGE_TOKEN)
        self._first: dict[str, list[int]] = {}
        self._next: dict[str, list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def draw(self, images: int, texts: Texts) -> Batch:
        """A batch over this many images.

        Args:
            texts: "none"; "questions", each in a row of its own; "dialogues", all questions about an
                image as the turns of one row; "practice", questions of the harder kinds, twice.
        """
        scenes = [sample_scene(self._rng) for _ in range(images)]
        asked = [self._questions(scene) for scene in scenes] if texts != "none" else []
        if texts == "practice":
            asked = [
                [q for q in (*questions, *self._questions(scene)) if q.kind not in _EASY]
                for scene, questions in zip(scenes, asked, strict=True)
            ]
        if texts == "none":
            groups: list[list[tuple[int, list[Question]]]] = []
        elif texts == "dialogues":
            for questions in asked:
                self._rng.shuffle(questions)
            groups = [[(i, questions) for i, questions in enumerate(asked)]]
        else:
            rows = [(i, [q]) for i, questions in enumerate(asked) for q in questions]
            groups = [
                group
                for long in (False, True)
                if (group := [row for row in rows if (row[1][0].kind == "describe") == long])
            ]
        made = self._processor.image_processor(
            [[draw(scene)] for scene in scenes], return_tensors="pt"
        )
        del made["num_tiles"]
        tiles = made["aspect_ratio_mask"][:, 0]
        targets = torch.stack([patch_targets(scene, tiles.shape[1]) for scene in scenes])
        return Batch(dict(made), targets, [self._rows(group, tiles) for group in groups])

    def _questions(self, scene: Scene) -> list[Question]:
        questions = sample_questions(scene, self._rng)
        return [self._rough(q) if self._rng.random() < _ROUGH_SHARE else q for q in questions]

    @staticmethod
    def _rough(question: Question) -> Question:
        return Question(question.kind, question.text.lower().rstrip("?."), question.answer)

    def _rows(self, rows: list[tuple[int, list[Question]]], tiles: Tensor) -> Rows:
        encoded = [self._encode(questions) for _, questions in rows]
        length = max(len(ids) for ids, _ in encoded)
        image = torch.tensor([i for i, _ in rows])
        input_ids = torch.full((len(rows), length), self._pad)
        labels = torch.full((len(rows), length), IGNORED)
        for row, (ids, targets) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
        sees = (input_ids == self._image).cumsum(-1).clamp(max=1)
        mask = sees[:, :, None, None] * tiles[image][:, None, None, :]
        kinds = [[q.kind for q in questions] for _, questions in rows]
        return Rows(kinds, image, input_ids, labels, mask)

    def _encode(self, questions: list[Question]) -> tuple[list[int], list[int]]:
        """Ids and labels of a dialogue that begins with the image."""
        ids: list[int] = []
        labels: list[int] = []
        for question in questions:
            prompt = self._prompt(question.text, first=not ids)
            answer = self._answer(question.answer)
            labels += [IGNORED] * len(prompt) + answer
            ids += prompt + answer
        return ids, labels

    def _prompt(self, text: str, first: bool) -> list[int]:
        known = self._first if first else self._next
        if text not in known:
            content = [{"type": "text", "text": text}]
            image = [{"type": "image"}] if first else []
            prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": image + content}], add_generation_prompt=True
            )
            known[text] = self._ids(prompt)[
                0 if first else 1 :
            ]  # a later turn has no begin_of_text
        return known[text]

    def _answer(self, text: str) -> list[int]:
        if text not in self._answers:
            self._answers[text] = [*self._ids(text), self._end]
        return self._answers[text]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids
