"""Which examples a step learns from, and their batches as the model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from mllama.loss import IGNORED
from mllama.processing.image_spans import cross_attention_mask
from mllama.processing.processor import MllamaProcessor

from .encoding import Example

_AHEAD = 2  # batches whose images are decoded while the model computes


class Order:
    """Every epoch all examples once, in an order that the seed decides.

    It is a function of the step only, so a resumed run continues where the earlier one stopped.
    """

    def __init__(self, examples: int, per_step: int, seed: int) -> None:
        self._examples, self._per_step, self._seed = examples, per_step, seed
        self.steps_per_epoch = -(-examples // per_step)

    def indices(self, step: int) -> list[int]:
        """The examples of a step, counted from 0; the last step of an epoch may have fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(self._examples, generator=generator)
        return order[place * self._per_step : (place + 1) * self._per_step].tolist()


def collate(processor: MllamaProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples of one file as the inputs of a model, padded on the right, with labels.

    Raises: ImageOpenError for an image that is damaged after its header.
    """
    length = max(len(example.input_ids) for example in examples)
    pad = processor.tokenizer.pad_token_id or 0
    input_ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        input_ids[row, :count] = torch.tensor(example.input_ids)
        labels[row, :count] = torch.tensor(example.labels)
        attention_mask[row, :count] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if not any(example.images for example in examples):
        return batch
    images = processor.image_processor(
        [example.images for example in examples],
        return_tensors="pt",
        allow_paths=examples[0].folder,
    )
    num_tiles = images.pop("num_tiles")
    tiles = images["pixel_values"].shape[2]
    mask = cross_attention_mask(input_ids.tolist(), num_tiles, processor.image_token_id, tiles)
    return {**batch, **images, "cross_attention_mask": torch.from_numpy(mask)}


def batches(
    processor: MllamaProcessor, groups: Iterator[list[Example]]
) -> Iterator[dict[str, Tensor]]:
    """A batch per group, made in a thread while those before it are used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[dict[str, Tensor]]] = []
        for group in groups:
            waiting.append(pool.submit(collate, processor, group))
            if len(waiting) > _AHEAD:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def grouped(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """The examples in groups of ``size``; the last may be smaller."""
    rest = iter(examples)
    while group := list(islice(rest, size)):
        yield group
