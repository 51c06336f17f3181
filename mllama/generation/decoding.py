"""From the latest token of each row to the next: the step of `generate`, captured or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.engine.graphs import CapturedStep
from mllama.engine.step import DecodeRows, StepShape, power_of_two
from mllama.generation.sampling import Sampler, SamplingConfig


@dataclass(frozen=True)
class Decoder:
    """Makes a token of each row, step after step.

    Attributes:
        tokens: (B,) int64, the latest, in the same place in every step.
        choose: from logits (B, V) to the next.
        step: reads the latest tokens, and gives the logits after them.
        is_whole: whether the step chooses the next as well.
    """

    tokens: Tensor
    choose: Callable[[Tensor], Tensor]
    step: Callable[[], Tensor]
    is_whole: bool = False

    def accept(self, logits: Tensor) -> None:
        """Choose the next tokens from logits (B, V)."""
        self.tokens.copy_(self.choose(logits))

    def advance(self) -> None:
        logits = self.step()
        if not self.is_whole:
            self.accept(logits)


def packed_decoder(model: Any, cache: MllamaCache, choose: Callable[[Tensor], Tensor]) -> Decoder:
    """Steps on the tensors of a cache that holds the prompt."""
    rows = DecodeRows.of_cache(cache)

    def step() -> Tensor:
        cache.columns += 1
        return rows.logits(model, cache.store)

    return Decoder(rows.tokens, choose, step)


def called_decoder(
    forward: Callable[..., Any], cache: MllamaCache, choose: Callable[[Tensor], Tensor]
) -> Decoder:
    """Steps by calls of a forward, for a model that somebody has put something around."""
    tokens = torch.zeros_like(cache.lengths, dtype=torch.int64)
    ids = tokens.unsqueeze(1).clone()  # in the same place in every step, too

    def step() -> Tensor:
        ids.copy_(tokens.clamp_min(0).unsqueeze(1))  # a marker has no embedding
        return forward(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    return Decoder(tokens, choose, step)


@contextmanager
def captured_decoder(
    model: Any,
    cache: MllamaCache,
    sampling: SamplingConfig,
    input_ids: Tensor,
    vocab_size: int,
    seeds: list[int],
) -> Iterator[Decoder]:
    """Steps in buffers that the model keeps with a graph of them. The tensors of the cache stay as the prompt
    has left them, but for keys and values."""
    rows, ops = DecodeRows.of_cache(cache), model.ops
    shape = _rounded(rows.shape)

    def make() -> CapturedStep:
        with torch.inference_mode(False):  # the buffers will be written in any mode
            sampler = Sampler(sampling, input_ids, vocab_size, seeds, ops, restartable=True)
        return CapturedStep(DecodeRows.buffers(shape, input_ids.device), sampler)

    with model.kept_steps.lend(cache.store, shape, make) as step:
        step.begin(model, cache.store)  # while the device is still busy with the prompt
        step.choose.restart(sampling, input_ids, seeds, ops)
        step.rows.load(rows)
        yield Decoder(
            step.rows.tokens, step.choose, lambda: step(model, cache.store), is_whole=True
        )


def _rounded(shape: StepShape) -> StepShape:
    """With powers of two pages and tiles. No result depends on it: hidden tiles, and pages that hold nothing,
    are left out."""
    return StepShape(shape.rows, power_of_two(shape.pages), power_of_two(shape.tiles))
