"""What each rank computes of a plan: the tower over new pictures, and one forward over all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllama.engine.batch import Batch, pack
from mllama.engine.graphs import Aside, CapturedStep, captures
from mllama.engine.pages import PAGE_SIZE
from mllama.engine.plan import Encode, Plan
from mllama.engine.prompts import PreparedPicture
from mllama.engine.sizes import Sizes
from mllama.engine.step import DecodeRows, StepShape, power_of_two
from mllama.stores import KeyValueStore, PagedRows


class Forward:
    """A model and the pages and tiles that its sequences hold. Of one thread.

    Args:
        model: with a language head.
        store: where keys and values go.

    Attributes:
        store: the same.
        graphs: the steps that are captured, None where none is.

    Raises: TypeError for a model some part of which would not be called, though somebody has changed it.
    """

    def __init__(self, model: Any, store: KeyValueStore) -> None:
        if (changed := model.called_part()) is not None:
            name, part = changed
            raise TypeError(
                f"the engine does not call the {name} itself: a hook, or a forward of its own, on this "
                f"{type(part).__name__} would have no effect; put it on the layers"
            )
        self._model, self.store = model, store
        self._is_real = np.zeros(store.num_slots, bool)
        self.graphs = Graphs(model, store) if captures(model, store.page_values) else None

    @torch.no_grad()
    def prepare(self, most_rows: int) -> None:
        """Do what need not wait for the first requests."""
        if self.graphs is not None:
            self.graphs.prepare(most_rows)

    def run(
        self,
        plan: Plan,
        pictures: Sequence[PreparedPicture],
        sampled: Tensor | None,
        places: Mapping[int, int],
    ) -> Tensor | None:
        """A step, without gradients: logits (S, V) of the tokens whose next ones are sampled; None where no
        text is read.

        Args:
            pictures: those that the plan encodes.
            sampled: the tokens of the step before, which PENDING ones are among.
            places: of each sequence there.
        """
        if plan.encodes:
            self._encode(plan.encodes, pictures)
        if not plan.rows:
            return None
        batch = pack(plan, self.store, self._model.semantics, self._is_real, sampled, places)
        if self.graphs is not None and len(batch.ids) == len(batch.last) == len(plan.rows):
            return self.graphs.logits(batch)
        return self._model.packed_logits(batch.ids, batch.packed, batch.last)

    def _encode(self, encodes: Sequence[Encode], pictures: Sequence[PreparedPicture]) -> None:
        """The tower over new pictures together, and their keys and values to their slots."""
        device = self.store.page_values.device
        tiles = self._model.model.encode_images(
            torch.stack([p.pixels for p in pictures]).unsqueeze(1).to(device),
            torch.tensor([[p.aspect_ratio_id] for p in pictures], device=device),
            torch.stack([p.tile_mask for p in pictures]).unsqueeze(1).to(device),
        )
        slots = [slot for encode in encodes for slot in encode.slots]
        if len(slots) != len(tiles.states):
            raise RuntimeError(f"{len(tiles.states)} tiles were encoded for {len(slots)} slots")
        none = torch.empty(0, 0, dtype=torch.int32, device=device)
        rows = PagedRows(self.store, none, none, torch.tensor(slots, device=device))
        self._model.text_tower.store_tiles(tiles.states, rows)
        for encode, picture in zip(encodes, pictures):
            kept = picture.tile_mask != 0
            real = kept if len(encode.slots) == len(kept) else kept[kept]
            self._is_real[list(encode.slots)] = real.numpy()


def store_of(model: Any, sizes: Sizes) -> KeyValueStore:
    """The pages and slots of an engine, the scratch page among them."""
    return KeyValueStore(
        model.config.get_text_config(),
        dtype=model.dtype,
        device=model.device,
        num_pages=sizes.num_pages + 1,
        num_slots=sizes.num_slots,
        tokens_per_tile=sizes.tokens_per_tile,
    )


class Graphs:
    """The steps in which every sequence decodes a token, captured for each number of rows, pages and tiles.

    The model is not looked at again: in an engine nobody changes it.

    Attributes:
        steps: that are captured.
    """

    def __init__(self, model: Any, store: KeyValueStore) -> None:
        self._model, self._store = model, store
        self._aside = Aside.shared(store.page_values.device)
        self.steps: dict[StepShape, CapturedStep] = {}

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
        if shape not in self.steps:
            rows = DecodeRows.buffers(shape, self._store.page_values.device)
            self.steps[shape] = CapturedStep(rows, aside=self._aside)
        return self.steps[shape]


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
