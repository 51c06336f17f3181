"""Image tiles as the text tower sees them: their states, and which of them each token sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama.packing import Packing
from mllama.semantics import Semantics


@dataclass(frozen=True)
class ImageTiles:
    """Projected vision states of the tiles that are kept, and where they belong.

    Attributes:
        states: (n, P, E), one entry per kept tile.
        table: (B, T) int32, the entry of each tile of each sequence, or -1 where none is kept; the
            order of T is image, then tile.
    """

    states: Tensor
    table: Tensor

    @classmethod
    def of_states(cls, states: Tensor, batch: int) -> ImageTiles:
        """All tiles of ``cross_attention_states`` (B * images * tiles, P, E), batch-major."""
        table = torch.arange(states.shape[0], dtype=torch.int32, device=states.device)
        return cls(states, table.view(batch, -1))

    @staticmethod
    def table_of(keep: Tensor) -> Tensor:
        """(B, T) int32 table when the tiles with ``keep`` (B, T) are stored in that order."""
        order = keep.flatten().cumsum(0).view_as(keep) - 1
        return torch.where(keep, order, -1).to(torch.int32)


@dataclass(frozen=True)
class TileView:
    """What each packed token sees.

    Attributes:
        tile_mask: (N, T) bool, the tiles a token attends to; None for all.
        row_mask: (N,) bool, False where a token sees no image: the MLP of cross-attention layers adds
            nothing there; None for all True.
    """

    tile_mask: Tensor | None
    row_mask: Tensor | None

    @classmethod
    def of_seen(cls, seen: Tensor | None, semantics: Semantics) -> TileView:
        """From ``seen`` (N, T) bool, what the mask shows to each token; None if there was no mask."""
        if seen is None:
            return cls(None, None)
        any_seen = seen.any(-1)
        if semantics.imageless_rows == "leak":
            # Quirk: a row that sees no image attends to every tile, padded tiles and images included.
            seen = seen | ~any_seen.unsqueeze(-1)
        return cls(seen, any_seen)

    def clone(self) -> TileView:
        masks = (self.tile_mask, self.row_mask)
        return TileView(*(None if mask is None else mask.clone() for mask in masks))

    def of_each_token(self, packing: Packing) -> TileView:
        """From one row per sequence to one row per packed token."""
        if packing.length == 1 and packing.rows is None:
            return self
        return TileView(
            *(
                None
                if mask is None
                else packing.pack(mask.unsqueeze(1).expand(-1, packing.length, *mask.shape[1:]))
                for mask in (self.tile_mask, self.row_mask)
            )
        )


class TileMemory:
    """What the next token of each sequence sees unless it comes with a mask of its own.

    Attributes:
        view: for one token per sequence, (B, T) and (B,).
    """

    def __init__(self) -> None:
        self.view = TileView(None, None)
        self._last_seen: Tensor | None = None  # (B, T)
        self._images_seen: Tensor | None = None  # (B, M)

    def remember(self, seen: Tensor, shown: Tensor, packing: Packing, semantics: Semantics) -> None:
        """Take over what the last real token of each sequence sees.

        Args:
            seen: (N, T) bool per packed token.
            shown: (B, L, M, tiles) bool, the same per column.
        """
        if not seen.shape[0]:
            return  # nothing but padding
        last = seen[(packing.cu_seqlens[1:] - 1).clamp_min(0)]
        images = shown.any(-1).any(1)
        if self._last_seen is not None and self._images_seen is not None:
            # A sequence may have no token in this forward; new images append columns.
            is_empty = packing.cu_seqlens.diff().unsqueeze(1) == 0
            last = torch.where(is_empty, _widened(self._last_seen, last.shape[1]), last)
            images = images | _widened(self._images_seen, images.shape[1])
        self._last_seen, self._images_seen = last, images
        self.view = TileView.of_seen(seen_after_prompt(last, images, semantics), semantics)


def _widened(mask: Tensor, columns: int) -> Tensor:
    return F.pad(mask, (0, columns - mask.shape[1]))


def rows_of_chunk(cross_attention_mask: Tensor, past: int, length: int) -> Tensor:
    """The ``length`` rows of a (B, L', M, T) mask that follow ``past``, as (B, length, M * T) bool.

    As in `transformers` the mask may cover the whole text; it may also hold the new rows alone.
    """
    if cross_attention_mask.shape[1] >= past + length:
        cross_attention_mask = cross_attention_mask[:, past : past + length]
    return cross_attention_mask.flatten(2) == 1


def seen_after_prompt(seen: Tensor, images_seen: Tensor, semantics: Semantics) -> Tensor:
    """What a generated token sees: (B, T) bool.

    Args:
        seen: (B, T) bool, what the last prompt token of each sequence sees.
        images_seen: (B, M) bool, the images that any token so far has seen.
    """
    if semantics.decode_rows == "prompt_only":
        # Quirk: Meta's mask ends with the prompt, unless there is only one image.
        return seen & (images_seen.sum(-1, keepdim=True) < 2)
    return seen


def view_of_tokens(
    table: Tensor,
    packing: Packing,
    cross_attention_mask: Tensor | None,
    semantics: Semantics,
    memory: TileMemory | None,
    past: int,
    new_images: bool,
) -> TileView:
    """What the tokens of one forward see, remembered for those that are generated after them.

    Args:
        table: (B, T) of all tiles.
        cross_attention_mask: (B, L', M, tiles) or None.
        memory: of the cache, if there is one.
        past: text columns in the cache.
        new_images: whether some of the tiles are new in this forward.
    """
    if cross_attention_mask is not None:
        shown = rows_of_chunk(cross_attention_mask, past, packing.length)
        seen = packing.pack(shown)
        if memory is not None:
            memory.remember(
                seen, shown.unflatten(-1, cross_attention_mask.shape[2:]), packing, semantics
            )
        return TileView.of_seen(seen, semantics)
    if memory is not None and not new_images:
        return memory.view.of_each_token(packing)
    if semantics.imageless_rows == "leak":
        view = TileView(None, None)
    else:
        # Every token sees all tiles of its sequence, and a sequence without images sees none.
        view = TileView.of_seen(table >= 0, semantics)
    if memory is not None:
        memory.view = view
    return view.of_each_token(packing)
