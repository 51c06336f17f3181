"""Runs plans: the forward, which other ranks compute too, and the choice of the next tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.engine.following import Followers
from mllama.engine.forward import Forward
from mllama.engine.plan import PENDING, Plan, Row, places_of
from mllama.engine.prompts import PreparedPicture
from mllama.engine.sampling import Chosen, Counted, Likelihood, Sampling, choose
from mllama.generation.sampling import INVALID_TOKEN
from mllama.stores import KeyValueStore


@dataclass(frozen=True)
class Results:
    """What a step has sampled, by the ids of sequences.

    Attributes:
        tokens: None where the logits are not finite.
        likelihoods: of those that ask for them.
    """

    tokens: dict[int, int | None]
    likelihoods: dict[int, Likelihood]


class Launched:
    """A step whose work is given to the device.

    Args:
        chosen: what was sampled, None where nothing was.
        places: of each sequence among the tokens.
        told: those of them whose log-probabilities are asked for.

    Attributes:
        chosen, places: the same.
    """

    def __init__(
        self, chosen: Chosen | None, places: Mapping[int, int], told: Sequence[int] = ()
    ) -> None:
        self.chosen, self.places = chosen, places
        self._told, self._event = told, None
        if chosen is None:
            return
        wanted = (chosen.tokens, chosen.likeliest, chosen.logprobs)
        self._read = [_on_host(tensor) for tensor in (wanted if told else wanted[:1])]
        if chosen.tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(chosen.tokens.device))

    def read(self) -> Results:
        """Wait for the device."""
        if self.chosen is None:
            return Results({}, {})
        if self._event is not None:
            self._event.synchronize()
        tokens, *others = (tensor.tolist() for tensor in self._read)
        sampled = {
            id_: None if tokens[place] == INVALID_TOKEN else tokens[place]
            for id_, place in self.places.items()
        }
        likelihoods = {
            id_: Likelihood.of(*(rows[self.places[id_]] for rows in others)) for id_ in self._told
        }
        return Results(sampled, likelihoods)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that is there once the work before it is done."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class Runner:
    """The model of an engine, and what its sequences need besides pages. Of one thread.

    Args:
        model: with a language head.
        store: where keys and values go.
        followers: the other ranks of a model that is split.
    Raises: TypeError for a model some part of which would not be called, though somebody has changed it.
    """

    def __init__(
        self, model: Any, store: KeyValueStore, followers: Followers | None = None
    ) -> None:
        self.forward, self._followers = Forward(model, store), followers
        self._ops, self._device = model.ops, store.page_values.device
        self._vocab_size = model.head_rows
        self._counted: dict[int, Counted] = {}
        self._pictures: dict[int, Sequence[PreparedPicture]] = {}
        self._latest = Launched(None, {})

    @property
    def idle_seconds(self) -> float | None:
        """After which stay() is to be called where nothing is launched; None: never."""
        return None if self._followers is None else self._followers.idle_seconds

    def stay(self) -> None:
        """Let the other ranks know that this one is there, and see that they are. Raises: OutOfStep."""
        if self._followers is not None:
            self._followers.stay()

    def close(self) -> None:
        """Let the other ranks go."""
        if self._followers is not None:
            self._followers.end()

    def add(
        self,
        sequence: int,
        pictures: Sequence[PreparedPicture],
        sampling: Sampling,
        prompt: Sequence[int],
        answer: Sequence[int] = (),
    ) -> None:
        """Know a sequence until remove(), by its id; added again it is known by its text of then."""
        self._pictures[sequence] = pictures
        self._counted[sequence] = Counted(sampling, prompt, answer, self._vocab_size, self._device)

    def remove(self, sequence: int) -> None:
        self._pictures.pop(sequence, None)
        self._counted.pop(sequence, None)

    @torch.no_grad()
    def launch(self, plan: Plan) -> Launched:
        """Give a step to the device, after the one before. Raises: OutOfStep."""
        logits = self._logits(plan)
        rows = [row for row in plan.rows if row.sample_step is not None]
        launched = Launched(None, {})
        if logits is not None and rows:
            self._accept(rows)
            counted = [self._counted[row.sequence] for row in rows]
            chosen = choose(self._ops, logits, counted, [row.sample_step for row in rows])
            told = [
                row.sequence
                for row, own in zip(rows, counted)
                if own.sampling.top_logprobs is not None
            ]
            launched = Launched(chosen, places_of(plan), told)
        self._latest = launched
        return launched

    def run(self, plan: Plan) -> dict[int, int | None]:
        """The tokens of a step by the ids of its sequences, None where the logits are not finite."""
        return self.launch(plan).read().tokens

    def _logits(self, plan: Plan) -> Tensor | None:
        """(S, V) of the tokens whose next ones are sampled; None where no text is read."""
        pictures = [self._pictures[encode.sequence][encode.index] for encode in plan.encodes]
        before = self._latest
        sampled = None if before.chosen is None else before.chosen.tokens
        if self._followers is None:
            return self.forward.run(plan, pictures, sampled, before.places)
        with self._followers.computing(plan, pictures, sampled):
            return self.forward.run(plan, pictures, sampled, before.places)

    def _accept(self, rows: Sequence[Row]) -> None:
        """Let the answers that are held to a form know their latest tokens; those still on the device are
        waited for."""
        for row in rows:
            held, token = self._counted[row.sequence].held, row.tokens[-1]
            if held is not None and row.sample_step:
                if token == PENDING:
                    chosen = self._latest.chosen
                    assert chosen is not None
                    token = int(chosen.tokens[self._latest.places[row.sequence]])
                if token != INVALID_TOKEN:
                    held.accept(token, row.sample_step)
