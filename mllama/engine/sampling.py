"""How the next token of each sequence is chosen: what a request says of it, and what has been counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllama.engine.interface import Constraint
from mllama.generation.sampling import SamplingConfig


@dataclass(frozen=True)
class Sampling:
    """What one answer's tokens are drawn by.

    Attributes:
        config: the filters.
        seed: of its stream of random numbers, in 64 bits.
        presence_penalty: taken from the logit of each token that the answer has already.
        frequency_penalty: taken from it as often as the answer has the token.
        bias: added to the logits of tokens.
        min_tokens: of the answer, before which none of ``stop_token_ids`` is chosen.
        top_logprobs: how many of the likeliest tokens are told with their log-probabilities, beside the
            chosen one's; None: nothing is.
        constraint: what the answer has to be, at its beginning; None: it is free.
    """

    config: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    top_logprobs: int | None = None
    constraint: Constraint | None = None


class Counted:
    """What the choice for one sequence has counted, on the device.

    Args:
        prompt, answer: the tokens so far; ids outside the vocabulary (the image token) are ignored.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        answer: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        if sampling.config.repetition_penalty != 1:
            known = sorted({token for token in (*prompt, *answer) if token < vocab_size})
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[known] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            given = torch.tensor(answer, dtype=torch.int64)
            self.counts = given.bincount(minlength=vocab_size).int().to(device)
        self.held = None
        if sampling.constraint is not None:
            self.held = Held(sampling.constraint.fork(), answer, vocab_size)

    @property
    def is_counting(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return self.seen is not None or self.counts is not None

    def add(self, token: Tensor) -> None:
        """Count a token (1,) that was chosen; a marker ends the sequence."""
        token = token.clamp_min(0)
        if self.seen is not None:
            self.seen.index_fill_(0, token, True)
        if self.counts is not None:
            self.counts.index_add_(0, token, self.counts.new_ones(1))


class Held:
    """The state of an answer that is held to a form.

    Args:
        constraint: at the answer's beginning; of this answer alone.
        answer: the tokens so far.
    """

    def __init__(self, constraint: Constraint, answer: Sequence[int], vocab_size: int) -> None:
        self._constraint, self._num_accepted = constraint, 0
        self._words = np.zeros(-(-vocab_size // 32), np.int32)
        for step, token in enumerate(answer, 1):
            self.accept(token, step)

    def accept(self, token: int, step: int) -> None:
        """The latest token of the answer, which has ``step`` of them, unless it is known already."""
        if step == self._num_accepted + 1:
            self._num_accepted = step
            with suppress(RuntimeError):  # which `allowed` meets again
                self._constraint.accept(token)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as the op takes them; none where the answer cannot go on."""
        try:
            self._constraint.fill(self._words)
        except (
            RuntimeError
        ):  # of its own limits: the answer ends as one of numbers that are not finite
            self._words.fill(0)
        return self._words


@dataclass(frozen=True)
class Chosen:
    """What was chosen for S sequences.

    Attributes:
        tokens: (S,) int64; INVALID_TOKEN where logits are not finite.
        likeliest, logprobs: of the op, with columns only where a row asks for them.
    """

    tokens: Tensor
    likeliest: Tensor
    logprobs: Tensor


def choose(ops: Any, logits: Tensor, rows: Sequence[Counted], steps: Sequence[int]) -> Chosen:
    """The next tokens of logits (S, V): each a function of its row's logits, options and step alone.

    Args:
        ops: where ``sample`` comes from.
        rows: whose they are; the tokens are counted.
        steps: how many tokens each answer has.
    """
    tokens, likeliest, logprobs = ops.sample(
        logits,
        _column([row.sampling.seed for row in rows], torch.int64, logits.device),
        _column(steps, torch.int64, logits.device),
        **_options(logits, rows),
        **_biases(logits.device, rows, steps),
        **_allowed(logits, rows),
    )
    for place, row in enumerate(rows):
        if row.is_counting:
            row.add(tokens[place : place + 1])
    return Chosen(tokens, likeliest, logprobs)


def _options(logits: Tensor, rows: Sequence[Counted]) -> dict[str, Tensor]:
    """Those of the op that do something to some row."""
    device, found = logits.device, {}
    samplings = [row.sampling for row in rows]
    found["temperature"] = _column(
        [s.config.temperature if s.config.do_sample else 0.0 for s in samplings],
        torch.float64,
        device,
    )
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        values = [getattr(s.config, name) for s in samplings]
        if any(value != off for value in values):
            found[name] = _column(values, torch.int64 if name == "top_k" else torch.float64, device)
    for name in ("presence_penalty", "frequency_penalty"):
        values = [getattr(s, name) for s in samplings]
        if any(values):
            found[name] = _column(values, torch.float64, device)
    if "repetition_penalty" in found:
        none = logits.new_zeros(logits.shape[1], dtype=torch.bool)
        found["seen"] = torch.stack([none if row.seen is None else row.seen for row in rows])
    if "presence_penalty" in found or "frequency_penalty" in found:
        none = logits.new_zeros(logits.shape[1], dtype=torch.int32)
        found["counts"] = torch.stack([none if row.counts is None else row.counts for row in rows])
    wanted = [-1 if s.top_logprobs is None else s.top_logprobs for s in samplings]
    if max(wanted) >= 0:
        found["num_likeliest"] = _column(wanted, torch.int64, device)
    return found


def _biases(
    device: torch.device, rows: Sequence[Counted], steps: Sequence[int]
) -> dict[str, Tensor]:
    """What is added to single logits, by row; a token that may not come yet is hidden by it."""
    added = []
    for row, step in zip(rows, steps):
        sampling = row.sampling
        early = sampling.stop_token_ids if step < sampling.min_tokens else ()
        added.append(sorted((dict(sampling.bias) | dict.fromkeys(early, -math.inf)).items()))
    width = max(map(len, added))
    if not width:
        return {}
    filled = [entries + [(-1, 0.0)] * (width - len(entries)) for entries in added]
    return {
        "bias_tokens": _column(
            [[t for t, _ in entries] for entries in filled], torch.int64, device
        ),
        "bias": _column([[b for _, b in entries] for entries in filled], torch.float32, device),
    }


def _allowed(logits: Tensor, rows: Sequence[Counted]) -> dict[str, Tensor]:
    """The tokens that may come next, of all rows where some answer is held to a form."""
    if all(row.held is None for row in rows):
        return {}
    words = np.full((len(rows), -(-logits.shape[1] // 32)), -1, np.int32)
    for place, row in enumerate(rows):
        if row.held is not None:
            words[place] = row.held.allowed()
    return {"allowed": torch.from_numpy(words).to(logits.device, non_blocking=True)}


def _column(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a chosen token under the model's own logits, and the likeliest in its place.

    Attributes:
        logprob: of the chosen one.
        likeliest: ids and log-probabilities, the likeliest first.
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, likeliest: Sequence[int], logprobs: Sequence[float]) -> Likelihood:
        """From a row of the op's, which ends with -1 behind what was asked for."""
        known = [token for token in likeliest if token >= 0]
        return cls(logprobs[0], tuple(zip(known, logprobs[1:])))
