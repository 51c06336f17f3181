"""Asks a checkpoint questions about images it has not seen and counts the right answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from mllama.demo.questions import QUESTION_KINDS, Question, is_right, sample_questions
from mllama.demo.shapes import sample_picture
from mllama.model import MllamaForConditionalGeneration
from mllama.processing.processor import MllamaProcessor

_ROWS = 96  # questions answered at once
_MAX_NEW_TOKENS = 40  # the longest answer describes four shapes in 20


@dataclass(frozen=True)
class Answered:
    """A question about the image of a seed, and what the model said."""

    seed: int
    question: Question
    said: str

    @property
    def right(self) -> bool:
        return is_right(self.said, self.question.answer)


@dataclass(frozen=True)
class Report:
    """All answers of an evaluation; printed as one line per kind of question."""

    answers: list[Answered]

    def accuracy(self, kind: str | None = None) -> float:
        """Share of right answers, of one kind or of all."""
        chosen = [a.right for a in self.answers if kind in (None, a.question.kind)]
        return sum(chosen) / len(chosen)

    def __str__(self) -> str:
        lines = [f"{kind:<10} {self.accuracy(kind):.3f}" for kind in QUESTION_KINDS]
        return "\n".join([*lines, f"{'all':<10} {self.accuracy():.3f} of {len(self.answers)}"])


def answer(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
) -> list[str]:
    """The model's answer to questions[i] about images[i], greedy and as one batch."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in questions
    ]
    inputs = processor(
        [[image] for image in images],
        prompts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    ids = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    folder: Path,
    seeds: Iterable[int],
    *,
    backend: str = "reference",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Report:
    """Examines the checkpoint of a folder, loaded so."""
    model = MllamaForConditionalGeneration.from_pretrained(
        folder, backend=backend, dtype=dtype, device=device
    )
    return examine(model, MllamaProcessor.from_pretrained(folder), seeds)


def examine(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, seeds: Iterable[int]
) -> Report:
    """Asks a question of every kind about the image of every seed.

    The same seed gives the same image and questions always.
    """
    asked = []
    for seed in seeds:
        image, scene = sample_picture(seed)
        asked += [(seed, image, q) for q in sample_questions(scene, random.Random(seed))]
    # A batch takes as long as its longest answer, so the long ones stay together.
    asked.sort(key=lambda row: row[2].kind == "describe")
    rows, answers = iter(asked), []
    while batch := list(islice(rows, _ROWS)):
        said = answer(model, processor, [p for _, p, _ in batch], [q.text for _, _, q in batch])
        answers += [Answered(seed, q, s) for (seed, _, q), s in zip(batch, said, strict=True)]
    return Report(answers)
