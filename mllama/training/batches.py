"""Which examples a step learns from, and their batches as the model's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from mllama.loss import IGNORED
from mllama.processing.image_spans import cross_attention_mask
from mllama.processing.processor import MllamaProcessor

from .encoding import Example

_BLANK = (8, 8)  # pixels of the picture that only keeps a rank busy


class Order:
    """Every epoch all examples once, in an order that the seed decides.

    It is a function of the step only, so a resumed run continues where the earlier one stopped, with any
    number of ranks.
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


class Share:
    """What one rank computes of the examples that all of them do together.

    All have the same number of batches, so that none waits for another in vain: a rank without an example
    gets a row that learns nothing. Where the weights are in pieces on all ranks, each has to ask for every
    layer when the others do: beside a batch with images none is without.

    Args:
        rows: examples that a rank computes at once.
        rank, size: which rank, of how many.
        alike: whether all ranks have images where one has.
    """

    def __init__(
        self, processor: MllamaProcessor, rows: int, rank: int, size: int, alike: bool
    ) -> None:
        self._rows, self._rank, self._size, self._alike = rows, rank, size, alike
        self._image_token = processor.image_token_id

    def batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The rows of this rank, batch by batch."""
        return [self._own(group) for group in grouped(examples, self._rows * self._size)]

    def count(self, examples: int) -> int:
        """How many batches so many examples are."""
        return -(-examples // (self._rows * self._size))

    def _own(self, group: list[Example]) -> list[Example]:
        own = group[self._rank * self._rows : (self._rank + 1) * self._rows]
        needs_image = self._alike and any(example.images for example in group)
        if needs_image and not any(example.images for example in own):
            return [*own, self._silent(group[0], with_image=True)]
        return own or [self._silent(group[0], with_image=False)]

    def _silent(self, like: Example, with_image: bool) -> Example:
        """A row without a target."""
        image = [self._image_token] if with_image else []
        ids = [*image, next(token for token in like.input_ids if token != self._image_token)]
        blank = [Image.new("RGB", _BLANK)] if with_image else []
        return dataclasses.replace(
            like, input_ids=ids, labels=[IGNORED] * len(ids), images=blank, texts=()
        )


class Ahead:
    """The batches of a step, made in a thread while the step before is computed.

    Args:
        order, share: see there.
        examples: all of them.
    """

    def __init__(
        self,
        processor: MllamaProcessor,
        examples: Sequence[Example],
        order: Order,
        share: Share,
        steps: int,
    ) -> None:
        self._processor, self._examples, self._order = processor, examples, order
        self._share, self._steps = share, steps
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[dict[str, Tensor]]]] | None = None

    def of(self, step: int) -> list[dict[str, Tensor]]:
        """The batches of a step, counted from 0. Raises: as :func:`collate`."""
        if self._next is None or self._next[0] != step:
            self._begin(step)
        assert self._next is not None
        made = self._next[1].result()
        self._next = None
        if step + 1 < self._steps:
            self._begin(step + 1)
        return made

    def targets(self, step: int) -> int:
        """How many tokens all ranks learn in a step."""
        return targets_of(self._of(step))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _of(self, step: int) -> list[Example]:
        return [self._examples[i] for i in self._order.indices(step)]

    def _begin(self, step: int) -> None:
        def made() -> list[dict[str, Tensor]]:
            return [collate(self._processor, b) for b in self._share.batches(self._of(step))]

        self._next = step, self._pool.submit(made)


def targets_of(examples: Sequence[Example]) -> int:
    """How many tokens are learned: of each example all labels but one at its beginning."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])


def collate(processor: MllamaProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples of one file as the inputs of a model, padded on the right, with labels.

    Where one has several texts, positions tell them apart, and padding is one more of them.

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
    if any(example.texts for example in examples):
        del batch["attention_mask"]
        batch["position_ids"] = torch.tensor([_positions(e, length) for e in examples])
    if not any(example.images for example in examples):
        return batch
    images = processor.image_processor(
        [example.images for example in examples],
        return_tensors="pt",
        allow_paths=examples[0].folder,
    )
    num_tiles = images.pop("num_tiles")
    tiles = images["pixel_values"].shape[2]
    mask = torch.from_numpy(
        cross_attention_mask(input_ids.tolist(), num_tiles, processor.image_token_id, tiles)
    )
    for row, example in enumerate(examples):
        _hide_from_later_texts(mask[row], example, processor.image_token_id)
    return {**batch, **images, "cross_attention_mask": mask}


def _positions(example: Example, length: int) -> list[int]:
    texts = example.texts or (len(example.input_ids),)
    padding = length - len(example.input_ids)
    return [place for count in (*texts, padding) for place in range(count)]


def _hide_from_later_texts(mask: Tensor, example: Example, image_token: int) -> None:
    """Of a mask (L, N, T): no text sees the images of one before it."""
    begin = seen = 0
    for count in example.texts:
        mask[begin : begin + count, :seen] = 0
        begin += count
        seen = example.input_ids[:begin].count(image_token)


def grouped(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """The examples in groups of ``size``; the last may be smaller."""
    rest = iter(examples)
    while group := list(islice(rest, size)):
        yield group
