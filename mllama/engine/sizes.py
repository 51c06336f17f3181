"""How large an engine's pools and batches are, and what it takes: as asked for, or by what there is memory
for, also of a model that is still to be loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mllama.engine.pages import PAGE_SIZE
from mllama.engine.plan import Limits
from mllama.engine.step import power_of_two
from mllama.quantization.workspace import (
    GRAPHS,
    logit_copies,
    projected_bytes,
    text_workspace,
    vision_workspace,
)
from mllama.stores import KeyValueStore

# What a prompt may take of a step besides the tokens that are decoded.
_BATCH_TOKENS = {"cpu": 512, "cuda": 2048}
# Of the memory that weights and workspace leave, for pages and for tiles, where nobody says how many.
_PAGE_SHARE, _TILE_SHARE = 0.5, 0.25
# Tokens of a context that is of some use: fewer are not settled for unless they are asked for.
_LEAST_LENGTH = 2048
# Bytes of each logit while a token is chosen: tokens that were seen and their counts, of a row and of all
# rows together.
_CHOICE = 2 * (1 + 4)


@dataclass(frozen=True)
class Sizes:
    """What an engine is made with.

    Attributes:
        limits: of steps and sequences.
        num_pages: without the scratch page.
        num_slots: for image tiles.
        tokens_per_tile: that a slot holds.
        slot_bytes: of one.
    """

    limits: Limits
    num_pages: int
    num_slots: int
    tokens_per_tile: int
    slot_bytes: int


@dataclass(frozen=True)
class EnginePlan:
    """Bytes that an engine takes.

    Attributes:
        weights: of the model, 0 where it is loaded already.
        pages, tiles: of the pools.
        workspace: while a step is computed.
        graphs: of captured steps.
        longest: tokens of the longest context for which there is memory; 0 if there is none for any.
    """

    sizes: Sizes
    weights: int
    pages: int
    tiles: int
    workspace: int
    graphs: int
    longest: int

    @property
    def total(self) -> int:
        return self.weights + self.pages + self.tiles + self.workspace + self.graphs

    def require_fit(self, free: int | None, where: str, instead: str = "") -> None:
        """Raises: ValueError with the numbers if it takes more than is free.

        Args:
            free: bytes; None where nobody knows.
            instead: what to do about it, besides a shorter context.
        """
        if free is not None and self.total > free:
            raise ValueError(self.refusal(free, where, instead))

    def refusal(self, free: int, where: str, instead: str) -> str:
        """What :meth:`require_fit` says."""
        parts = {
            "weights": self.weights,
            f"{self.sizes.num_pages} pages of {PAGE_SIZE} tokens": self.pages,
            f"{self.sizes.num_slots} image tiles": self.tiles,
            "workspace": self.workspace + self.graphs,
        }
        listed = ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in parts.items() if nbytes)
        asked = self.sizes.limits.max_length
        shorter = f"a max_length of {self.longest} fits"
        if not self.longest:
            shorter = "no context fits"
        elif self.longest >= asked:
            shorter = "fewer pages and image tiles fit"
        return (
            f"a context of {asked} tokens takes {_gb(self.total)} GB ({listed}), {where} has {_gb(free)} GB "
            f"free: {_gb(self.total - free)} GB are missing; {shorter}"
            + (f"; {instead}" if instead else "")
        )


def plan_engine(
    config: Any,
    store: KeyValueStore,
    free: int | None,
    device: str,
    *,
    weights: int = 0,
    quantized: bool = False,
    max_batch_size: int = 32,
    max_batch_tokens: int | None = None,
    max_prefills: int = 32,
    max_new_pictures: int = 1,
    max_length: int | None = None,
    max_images: int = 4,
    num_pages: int | None = None,
    num_slots: int | None = None,
) -> EnginePlan:
    """Settle what is None; these arguments are those of the engine.

    Args:
        config: of the model.
        store: of its text tower, empty, on any device.
        free: bytes, those included that weights are still to take; None where nobody knows.
        device: its type.
        weights: bytes that are still to be loaded.
        quantized: whether there are quantised ones.
    Raises: ValueError for what contradicts another, or the model.
    """
    text = config.get_text_config()
    context = text.max_position_embeddings
    if max_length is not None and max_length > context:
        raise ValueError(f"max_length={max_length} is beyond the model's context, {context}")
    if num_pages is not None and num_pages < 1:
        raise ValueError(f"an engine needs a page at least, got num_pages={num_pages}")
    if max_batch_tokens is None:
        max_batch_tokens = max(_BATCH_TOKENS.get(device, 512), max_batch_size)
    longest = context if max_length is None else max_length
    limits = Limits(max_batch_tokens, max_batch_size, max_prefills, max_new_pictures, longest)
    workspace, graphs = _workspace(
        config, limits, store.page_values.itemsize, quantized, on_gpu=device != "cpu"
    )
    left = math.inf if free is None else max(free - weights - workspace - graphs, 0)
    page_bytes = store.page_nbytes()
    tokens_per_tile, slot_bytes, fewest = 0, 1, 0
    if (vision := getattr(config, "vision_config", None)) is not None:
        tokens_per_tile = vision.num_patches
        slot_bytes = store.slot_nbytes(tokens_per_tile)
        fewest = max_images * vision.max_num_tiles if num_slots is None else num_slots
    if num_pages is None:
        # Where no length is asked for, a useful one is the least.
        least = min(longest, _LEAST_LENGTH) if max_length is None else longest
        most = max_batch_size * _pages_for(longest)
        num_pages = _bounded(_pages_for(least), most, left * _PAGE_SHARE, page_bytes)
    if num_slots is None or vision is None:
        # A context that takes more than its share leaves less.
        room = min(left * _TILE_SHARE, left - (num_pages + 1) * page_bytes)
        num_slots = _bounded(fewest, max_batch_size * fewest, room, slot_bytes)
    if max_length is None:
        longest = min(longest, num_pages * PAGE_SIZE)
    elif num_pages < _pages_for(longest):
        raise ValueError(
            f"max_length={max_length} takes {_pages_for(longest)} pages of {PAGE_SIZE} tokens, there are "
            f"{num_pages}"
        )
    room = left - fewest * slot_bytes - page_bytes
    return EnginePlan(
        Sizes(
            replace(limits, max_length=longest), num_pages, num_slots, tokens_per_tile, slot_bytes
        ),
        weights=weights,
        pages=(num_pages + 1) * page_bytes,
        tiles=num_slots * slot_bytes,
        workspace=workspace,
        graphs=graphs,
        longest=PAGE_SIZE * _bounded(0, context // PAGE_SIZE, room, page_bytes),
    )


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _bounded(least: int, most: int, room: float, nbytes: int) -> int:
    """How many of something, from least to most: as many as there is room for."""
    return int(min(most, max(room // nbytes, least)))


def _workspace(
    config: Any, limits: Limits, itemsize: int, quantized: bool, on_gpu: bool
) -> tuple[int, int]:
    """Bytes of a step, whose pictures pass the tower before its text is read, and of captured ones."""
    text = config.get_text_config()
    tokens, rows, ranks = limits.max_batch_tokens, limits.max_batch_size, text.tensor_parallel_size

    def of_text(count: int) -> int:
        values = text_workspace(
            text, count, itemsize, quantized=quantized, on_gpu=on_gpu, part=count, ranks=ranks
        )
        return values + rows * text.vocab_size * (logit_copies(ranks) * itemsize + _CHOICE)

    workspace = of_text(tokens)
    if (vision := getattr(config, "vision_config", None)) is not None:
        pictures = limits.max_new_pictures
        states = projected_bytes(config, pictures * vision.max_num_tiles, itemsize)
        tower = vision_workspace(vision, pictures, itemsize, on_gpu=on_gpu, ranks=ranks)
        workspace = max(workspace, tower + states)
    return workspace, GRAPHS + of_text(power_of_two(rows)) if on_gpu else 0


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}"
