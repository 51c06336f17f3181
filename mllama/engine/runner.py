"""Runs plans on a model: the tower over new pictures, one forward over all tokens, the choice of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllama.engine.batch import Batch, pack
from mllama.engine.graphs import Aside, CapturedStep, captures
from mllama.engine.pages import PAGE_SIZE
from mllama.engine.plan import PENDING, Encode, Plan, Row
from mllama.engine.prompts import PreparedPicture
from mllama.engine.sampling import Chosen, Counted, Likelihood, Sampling, choose
from mllama.engine.step import DecodeRows, StepShape, power_of_two
from mllama.generation.sampling import INVALID_TOKEN
from mllama.stores import KeyValueStore, PagedRows


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
        sequences: whose tokens they are.
        told: those of them whose log-probabilities are asked for.

    Attributes:
        places: of each sequence among the tokens.
    """

    def __init__(
        self, chosen: Chosen | None, sequences: Sequence[int] = (), told: Sequence[int] = ()
    ) -> None:
        self.chosen, self.places = chosen, {id_: i for i, id_ in enumerate(sequences)}
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
    Raises: TypeError for a model some part of which would not be called, though somebody has changed it.
    """

    def __init__(self, model: Any, store: KeyValueStore) -> None:
        self._model, self._store = model, store
        if (changed := model.called_part()) is not None:
            name, part = changed
            raise TypeError(
                f"the engine does not call the {name} itself: a hook, or a forward of its own, on this "
                f"{type(part).__name__} would have no effect; put it on the layers"
            )
        self._vocab_size = model.head_rows
        self._is_real = np.zeros(store.num_slots, bool)
        self._counted: dict[int, Counted] = {}
        self._pictures: dict[int, Sequence[PreparedPicture]] = {}
        self._latest = Launched(None)
        self._graphs = _Graphs(model, store) if captures(model, store.page_values) else None

    def prepare(self, most_rows: int) -> None:
        """Do what need not wait for the first requests."""
        if self._graphs is not None:
            with torch.no_grad():
                self._graphs.prepare(most_rows)

    def add(
        self,
        sequence: int,
        pictures: Sequence[PreparedPicture],
        sampling: Sampling,
        prompt: Sequence[int],
        answer: Sequence[int] = (),
    ) -> None:
        """Know a sequence until remove(), by its id; added again it is known by its text of then."""
        device = self._store.page_values.device
        self._pictures[sequence] = pictures
        self._counted[sequence] = Counted(sampling, prompt, answer, self._vocab_size, device)

    def remove(self, sequence: int) -> None:
        self._pictures.pop(sequence, None)
        self._counted.pop(sequence, None)

    @torch.no_grad()
    def launch(self, plan: Plan) -> Launched:
        """Give a step to the device, after the one before."""
        if plan.encodes:
            self._encode(plan.encodes)
        launched = Launched(None)
        if plan.rows:
            logits = self._logits(plan)
            rows = [row for row in plan.rows if row.sample_step is not None]
            if rows:
                self._accept(rows)
                counted = [self._counted[row.sequence] for row in rows]
                chosen = choose(self._model.ops, logits, counted, [row.sample_step for row in rows])
                told = [
                    row.sequence
                    for row, own in zip(rows, counted)
                    if own.sampling.top_logprobs is not None
                ]
                launched = Launched(chosen, [row.sequence for row in rows], told)
        self._latest = launched
        return launched

    def run(self, plan: Plan) -> dict[int, int | None]:
        """The tokens of a step by the ids of its sequences, None where the logits are not finite."""
        return self.launch(plan).read().tokens

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

    def _logits(self, plan: Plan) -> Tensor:
        """(S, V) of the tokens whose next ones are sampled."""
        before = self._latest
        batch = pack(
            plan,
            self._store,
            self._model.semantics,
            self._is_real,
            before.chosen.tokens if before.chosen is not None else None,
            before.places,
        )
        if self._graphs is not None and len(batch.ids) == len(batch.last) == len(plan.rows):
            return self._graphs.logits(batch)
        return self._model.packed_logits(batch.ids, batch.packed, batch.last)

    def _encode(self, encodes: Sequence[Encode]) -> None:
        """The tower over new pictures together, and their keys and values to their slots."""
        device = self._store.page_values.device
        pictures = [self._pictures[encode.sequence][encode.index] for encode in encodes]
        tiles = self._model.model.encode_images(
            torch.stack([p.pixels for p in pictures]).unsqueeze(1).to(device),
            torch.tensor([[p.aspect_ratio_id] for p in pictures], device=device),
            torch.stack([p.tile_mask for p in pictures]).unsqueeze(1).to(device),
        )
        slots = [slot for encode in encodes for slot in encode.slots]
        if len(slots) != len(tiles.states):
            raise RuntimeError(f"{len(tiles.states)} tiles were encoded for {len(slots)} slots")
        none = torch.empty(0, 0, dtype=torch.int32, device=device)
        rows = PagedRows(self._store, none, none, torch.tensor(slots, device=device))
        self._model.text_tower.store_tiles(tiles.states, rows)
        for encode, picture in zip(encodes, pictures):
            kept = picture.tile_mask != 0
            real = kept if len(encode.slots) == len(kept) else kept[kept]
            self._is_real[list(encode.slots)] = real.numpy()


class _Graphs:
    """The steps in which every sequence decodes a token, captured for each number of rows, pages and tiles.

    The model is not looked at again: in an engine nobody changes it.
    """

    def __init__(self, model: Any, store: KeyValueStore) -> None:
        self._model, self._store = model, store
        self._aside = Aside.shared(store.page_values.device)
        self._steps: dict[StepShape, CapturedStep] = {}

    def prepare(self, most_rows: int) -> None:
        """Capture the usual steps, which takes the device a while, before anybody waits for it."""
        shape = bucket(StepShape(1, 1, 1 if self._store.num_slots else 0))
        while shape.rows < 2 * most_rows:
            for tiles in {0, shape.tiles}:
                step = self._step(shape._replace(tiles=tiles))
                while not step.is_settled:  # its rows are all at the scratch page
                    step(self._model, self._store)
            shape = shape._replace(rows=2 * shape.rows)

    def logits(self, batch: Batch) -> Tensor:
        """(S, V), which the next step overwrites."""
        rows = DecodeRows.of_tokens(batch.ids, batch.packed)
        step = self._step(bucket(rows.shape))
        step.rows.load(rows)
        return step(self._model, self._store)[: len(batch.ids)]

    def _step(self, shape: StepShape) -> CapturedStep:
        if shape not in self._steps:
            rows = DecodeRows.buffers(shape, self._store.page_values.device)
            self._steps[shape] = CapturedStep(rows, aside=self._aside)
        return self._steps[shape]


# Tokens of a sequence up to which decode attention splits its keys alike (csrc/cuda/attention/decode.h).
_SPLIT_ALIKE = (4096, 32768)
# Of a picture there are no more, and those that a sequence lacks cost nothing.
_FEWEST_TILES = 4


def bucket(shape: StepShape) -> StepShape:
    """What a step is captured for: powers of two rows and tiles, and one of few numbers of pages."""
    pages = next(
        (tokens // PAGE_SIZE for tokens in _SPLIT_ALIKE if shape.pages * PAGE_SIZE <= tokens),
        power_of_two(shape.pages),
    )
    tiles = shape.tiles and max(_FEWEST_TILES, power_of_two(shape.tiles))
    return StepShape(power_of_two(shape.rows), pages, tiles)
