"""What Python does to the logits between two steps: the processors of a call, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mllama.generation.config import GenerationPlan
from mllama.generation.sampling import SamplingConfig
from mllama_kernels.reference_sampling import penalized

# From the text so far (B, n) and scores (B, V) in float32 to scores.
Processor = Callable[[Tensor, Tensor], Tensor]


def processors_of(plan: GenerationPlan, prompt_length: int) -> list[Processor]:
    """The processors of a call, in the order of transformers.

    Args:
        prompt_length: columns of the prompt that the text so far begins with.
    """
    made: list[tuple[str, Processor]] = []
    if plan.sampling.repetition_penalty != 1:
        penalty = plan.sampling.repetition_penalty
        made.append(("RepetitionPenaltyLogitsProcessor", _repetition_penalty(penalty)))
    if plan.no_repeat_ngram_size:
        made.append(("NoRepeatNGramLogitsProcessor", _no_repeat(plan.no_repeat_ngram_size)))
    stops = plan.eos_token_ids
    if bad_words := [word for word in plan.bad_words_ids if word not in {(t,) for t in stops}]:
        made.append(("NoBadWordsLogitsProcessor", _no_bad_words(bad_words)))
    if plan.min_new_tokens and stops:
        least = prompt_length + plan.min_new_tokens
        made.append(("MinNewTokensLengthLogitsProcessor", _no_stop_before(least, stops)))
    if plan.prefix_allowed_tokens_fn is not None:
        allowed = _only_allowed(plan.prefix_allowed_tokens_fn)
        made.append(("PrefixConstrainedLogitsProcessor", allowed))
    return _merged(made, plan.logits_processor)


def _merged(made: Iterable[tuple[str, Processor]], given: Sequence[Any]) -> list[Processor]:
    """Those given, after those made; one of transformers replaces what does the same."""
    by_name = {type(processor).__name__: processor for processor in reversed(given)}
    merged = [by_name.get(name, processor) for name, processor in made]
    return merged + [processor for processor in given if not any(processor is p for p in merged)]


def _repetition_penalty(penalty: float) -> Processor:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        return penalized(scores, _as_scalar(penalty, scores), _marked(ids, scores))

    return process


def _no_repeat(size: int) -> Processor:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        length = ids.shape[1]
        if length < size:
            return scores
        ends, tail = ids[:, size - 1 :], ids[:, length + 1 - size :]
        repeats = torch.ones_like(ends, dtype=torch.bool)
        for i in range(size - 1):  # not all at once, which would take length times size
            repeats &= ids[:, i : i + ends.shape[1]] == tail[:, i : i + 1]
        ends = ends.masked_fill(~repeats, scores.shape[1])
        return scores.masked_fill(_marked(ends, scores), -torch.inf)

    return process


def _no_bad_words(words: Sequence[tuple[int, ...]]) -> Processor:
    # By the tokens that must stand before the last one: a row is looked up once for every length of those.
    endings: dict[tuple[int, ...], list[int]] = {}
    for *prefix, last in words:
        endings.setdefault(tuple(prefix), []).append(last)
    lengths = sorted({len(prefix) for prefix in endings})

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        length = ids.shape[1]
        tails = ids[:, max(length - lengths[-1], 0) :].tolist()
        banned = [
            [
                last
                for n in lengths
                if not n or n < length
                for last in endings.get(tuple(tail[len(tail) - n :]), ())
            ]
            for tail in tails
        ]
        rows = [row for row, tokens in enumerate(banned) for _ in tokens]
        scores = scores.clone()
        columns = [token for tokens in banned for token in tokens]
        scores[rows, columns] = -torch.inf
        return scores

    return process


def _no_stop_before(length: int, stops: Sequence[int]) -> Processor:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] >= length:
            return scores
        return scores.masked_fill(_marked(ids.new_tensor([stops]), scores), -torch.inf)

    return process


def _only_allowed(function: Callable[..., Any]) -> Processor:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(ids):
            allowed = torch.as_tensor(function(row, text), dtype=torch.int64, device=ids.device)
            if not allowed.numel():
                raise ValueError(f"prefix_allowed_tokens_fn allows no token in row {row}")
            low, high = allowed.min(), allowed.max()
            if low < 0 or high >= scores.shape[1]:
                raise ValueError(
                    f"prefix_allowed_tokens_fn must allow tokens within 0..{scores.shape[1] - 1}, got "
                    f"{low} to {high} in row {row}"
                )
            kept[row, allowed] = scores[row, allowed]
        return kept

    return process


def _marked(ids: Tensor, scores: Tensor) -> Tensor:
    """(B, V) bool, True at the ids (B or 1, n) of each row; those outside the vocabulary are ignored."""
    rows, vocab_size = scores.shape
    marked = torch.zeros(rows, vocab_size + 1, dtype=torch.bool, device=scores.device)
    inside = ids.masked_fill(ids < 0, vocab_size).clamp_max(vocab_size)
    return marked.scatter_(1, inside.expand(rows, -1), True)[:, :-1]


def _as_scalar(value: float, scores: Tensor) -> Tensor:
    """What scores are divided by: torch would multiply by the inverse of a Python number."""
    return torch.full((), value, dtype=torch.float32, device=scores.device)


def filtered(scores: Tensor, sampling: SamplingConfig) -> Tensor:
    """scores (B, V) after temperature, top-k, top-p and min-p, -inf for what they drop.

    The formulas of transformers; the op :func:`mllama_kernels.sample` decides alike but in integers.
    """
    if not sampling.do_sample:
        return scores
    scores = scores / _as_scalar(sampling.temperature, scores)
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort()
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    if sampling.min_p:
        weights = scores.softmax(-1)
        dropped = weights < sampling.min_p * weights.amax(-1, keepdim=True)
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores


class Record:
    """What a call keeps of its steps, one entry for each new token.

    Args:
        names: of "scores", "logits" and "hidden_states" those that are kept.

    Attributes:
        scores, logits: (B, V) float32 each; None if not kept.
        hidden_states: the tuples of a forward; None if not kept.
    """

    def __init__(self, names: Iterable[str]) -> None:
        def kept(name: str) -> tuple[Any, ...] | None:
            return () if name in names else None

        self.scores: tuple[Tensor, ...] | None = kept("scores")
        self.logits: tuple[Tensor, ...] | None = kept("logits")
        self.hidden_states: tuple[tuple[Tensor, ...], ...] | None = kept("hidden_states")

    def forward_of(self, model: Any) -> Callable[..., Any]:
        """The model's forward, which leaves its hidden states here where they are kept."""
        if self.hidden_states is None:
            return model

        def forward(**inputs: Any) -> Any:
            output = model(**inputs, output_hidden_states=True)
            self.hidden_states = (*(self.hidden_states or ()), output.hidden_states)
            return output

        return forward


class GuidedSampler:
    """A sampler whose logits pass through processors, which see the whole text.

    Args:
        sample: from scores (B, V) to tokens (B,), without the penalty.
        plan: of the call.
        input_ids: (B, L) the prompt as given.
        record: where scores and logits are kept.
    """

    def __init__(
        self,
        sample: Callable[[Tensor], Tensor],
        plan: GenerationPlan,
        input_ids: Tensor,
        record: Record,
    ) -> None:
        self._sample, self._sampling, self._record = sample, plan.sampling, record
        self._processors = processors_of(plan, input_ids.shape[1])
        self._criteria = plan.stopping_criteria
        self._ids = input_ids

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) of the last position -> (B,) int64 tokens."""
        record = self._record
        scores = logits.float()
        if record.logits is not None:
            record.logits += (scores.clone(),)
        for processor in self._processors:
            processed = processor(self._ids, scores)
            if not isinstance(processed, Tensor) or processed.shape != scores.shape:
                got = getattr(processed, "shape", type(processed).__name__)
                raise TypeError(
                    f"a logits_processor must return scores {tuple(scores.shape)}, got {got}"
                )
            scores = processed
        if record.scores is not None:
            record.scores += (filtered(scores, self._sampling),)
        return self._sample(scores)

    def extend(self, tokens: Tensor) -> list[bool]:
        """Add a token (B,) to the text of every row; which rows the stopping criteria end with it."""
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids)], dim=1)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=self._ids.device)
        for criterion in self._criteria:
            found = criterion(self._ids, self._record.scores)
            ends = None if found is None else torch.as_tensor(found, device=ended.device)
            if ends is None or ends.numel() not in (1, len(ended)):
                raise TypeError(
                    "a stopping_criteria must return a bool or one for each of "
                    f"{len(ended)} rows, got {None if ends is None else tuple(ends.shape)}"
                )
            ended |= ends.bool().flatten()
        return ended.tolist()
