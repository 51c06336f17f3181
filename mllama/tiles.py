"""Image tiles as the text tower sees them: their states, and which of them each token sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama.semantics import Semantics
from mllama.varlen import VarlenBatch

# What is at a place for an image of a sequence: nothing, where another one has more images; the image
# of an image token; or an image that no token of the text stands for.
PADDING, IMAGE, LOOSE = 0, 1, 2


@dataclass(frozen=True)
class ImageTiles:
    """Projected vision states of the tiles that are kept, and where they belong.

    Attributes:
        states: (n, P, E), one entry per kept tile.
        table: (B, T) int32, the entry of each tile of each sequence, or -1 where none is kept; the
            order of T is image, then tile.
        kinds: (B, images) int8, PADDING, IMAGE or LOOSE; None: all are LOOSE.
    """

    states: Tensor
    table: Tensor
    kinds: Tensor | None = None

    @classmethod
    def from_states(cls, states: Tensor, batch: int, kinds: Tensor | None = None) -> ImageTiles:
        """All tiles of ``cross_attention_states`` (B * images * tiles, P, E), batch-major."""
        table = torch.arange(states.shape[0], dtype=torch.int32, device=states.device)
        return cls(states, table.view(batch, -1), kinds)

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
    def from_seen(cls, seen: Tensor | None, semantics: Semantics) -> TileView:
        """From ``seen`` (N, T) bool, what the mask shows to each token; None if there was no mask."""
        if seen is None:
            return cls(None, None)
        any_seen = seen.any(-1)
        if semantics.imageless_rows == "leak":
            # Quirk: a row that sees no image attends to every tile, padded tiles and images included.
            seen = seen | ~any_seen.unsqueeze(-1)
        return cls(seen, any_seen)

    def of_columns(self, varlen: VarlenBatch, begin: int, end: int) -> TileView:
        """The rows of the tokens in some of the columns, of a view with one row per packed token."""
        masks = (self.tile_mask, self.row_mask)
        if all(mask is None for mask in masks):
            return self
        columns = torch.arange(varlen.batch * varlen.length, device=varlen.cu_seqlens.device)
        columns = (columns if varlen.rows is None else varlen.rows) % varlen.length
        chosen = ((columns >= begin) & (columns < end)).nonzero().squeeze(1)
        return TileView(*(None if mask is None else mask[chosen] for mask in masks))

    def per_token(self, varlen: VarlenBatch) -> TileView:
        """From one row per sequence to one row per packed token."""
        if varlen.length == 1 and varlen.rows is None:
            return self
        return TileView(
            *(
                None
                if mask is None
                else varlen.unpad(mask.unsqueeze(1).expand(-1, varlen.length, *mask.shape[1:]))
                for mask in (self.tile_mask, self.row_mask)
            )
        )


# The place in its sequence of a column that has no token there.
_NOWHERE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class _Read:
    """What each column of one forward saw.

    Attributes:
        at: (B, L) int64, the place of each column's token in its sequence; _NOWHERE at padding and
            for tokens that are forgotten.
        seen: (B, L, T) bool, the tiles.
        images: (B, L, M) bool, the images a mask has shown; M is 0 where there was no mask.
    """

    at: Tensor
    seen: Tensor
    images: Tensor

    def first(self, lengths: Tensor) -> _Read:
        """Without the tokens after the first ``lengths`` (B,) of each sequence."""
        return replace(self, at=self.at.masked_fill(self.at >= lengths.unsqueeze(1), _NOWHERE))

    def within(self, kept: Tensor) -> _Read:
        """With no other tiles in sight than those ``kept`` (B, M, tiles) bool."""
        seen = self.seen[:, :, : kept[0].numel()]
        images = self.images[:, :, : kept.shape[1]]
        return _Read(
            self.at,
            seen & kept.flatten(1)[:, None, : seen.shape[2]],
            images & kept.any(-1)[:, None, : images.shape[2]],
        )


@dataclass(frozen=True)
class _Sight:
    """What the latest token of each sequence saw: (B, T) tiles; the (B, M) images that a mask has shown
    to any token; and whether what it saw was a mask's to say, (B,)."""

    seen: Tensor
    images: Tensor
    is_masked: Tensor

    @classmethod
    def after(cls, before: _Sight | None, read: _Read) -> _Sight:
        """A sequence may have no token in a forward; new images append columns."""
        real = read.at != _NOWHERE
        column = torch.arange(1, real.shape[1] + 1, device=real.device)
        last = (real * column).amax(1)
        index = (last - 1).clamp_min(0)[:, None, None].expand(-1, 1, read.seen.shape[2])
        has_token = last.unsqueeze(1) > 0
        seen = read.seen.gather(1, index).squeeze(1) & has_token
        images = (read.images & real.unsqueeze(-1)).any(1)
        is_masked = (last > 0) & (read.images.shape[2] > 0)
        if before is not None:
            tiles = max(seen.shape[1], before.seen.shape[1])
            seen = torch.where(has_token, _widened(seen, tiles), _widened(before.seen, tiles))
            most = max(images.shape[1], before.images.shape[1])
            images = _widened(images, most) | _widened(before.images, most)
            is_masked = torch.where(last > 0, is_masked, before.is_masked)
        return cls(seen, images, is_masked)

    def view(self, semantics: Semantics) -> TileView:
        """For one more token of each sequence."""
        after_mask = seen_after_prompt(self.seen, self.images, semantics)
        seen = torch.where(self.is_masked.unsqueeze(1), after_mask, self.seen)
        return TileView.from_seen(seen, semantics)


class VisibleTiles:
    """What the next token of each sequence sees unless it comes with a mask of its own.

    It remembers what every token saw that was read with a mask or with new images, so that it can go
    back to an earlier one.

    Attributes:
        view: for one token per sequence, (B, T) and (B,).
    """

    def __init__(self) -> None:
        self.view = TileView(None, None)
        self._reads: tuple[_Read, ...] = ()
        self._sight: _Sight | None = None
        self._semantics = Semantics()

    def remember(
        self,
        seen: Tensor,
        images: Tensor,
        varlen: VarlenBatch,
        lengths: Tensor,
        semantics: Semantics,
    ) -> None:
        """Take over what the last real token of each sequence sees.

        Args:
            seen: (B, L, T) bool, the tiles that each column sees.
            images: (B, L, M) bool, the images that a mask shows to it; M is 0 without a mask.
            lengths: (B,) the tokens of each sequence so far.
        """
        real = varlen.pad(torch.ones(1, dtype=torch.bool, device=seen.device).expand(varlen.total))
        at = (lengths.unsqueeze(1) + real.cumsum(1) - 1).masked_fill(~real, _NOWHERE)
        read = _Read(at, seen, images)
        self._reads, self._semantics = (*self._reads, read), semantics
        self._sight = _Sight.after(self._sight, read)
        self.view = self._sight.view(semantics)

    def truncate(self, lengths: Tensor) -> None:
        """Forget what the tokens after the first ``lengths`` (B,) of each sequence saw."""
        reads = tuple(read.first(lengths) for read in self._reads)
        if not all(new.at.equal(old.at) for new, old in zip(reads, self._reads)):
            self._recall(reads)

    def keep_images(self, kept: Tensor) -> None:
        """Forget all tiles but those ``kept`` (B, M, tiles) bool, which are the first there are."""
        self._recall(tuple(read.within(kept) for read in self._reads))

    def _recall(self, reads: tuple[_Read, ...]) -> None:
        self._reads, self._sight = reads, None
        for read in reads:
            self._sight = _Sight.after(self._sight, read)
        if self._sight is not None:
            self.view = self._sight.view(self._semantics)


def _widened(mask: Tensor, columns: int) -> Tensor:
    return F.pad(mask, (0, columns - mask.shape[1]))


def rows_of_chunk(cross_attention_mask: Tensor, past: int, length: int) -> Tensor:
    """The ``length`` rows of a (B, L', M, T) mask that follow ``past``, as (B, length, M * T) bool.

    As in `transformers` the mask may cover the whole text; it may also hold the new rows only.
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
    varlen: VarlenBatch,
    cross_attention_mask: Tensor | None,
    semantics: Semantics,
    visible_tiles: VisibleTiles | None,
    lengths: Tensor | None,
    past: int,
    new_images: bool,
) -> TileView:
    """What the tokens of one forward see, remembered for those that are generated after them.

    Args:
        table: (B, T) of all tiles.
        cross_attention_mask: (B, L', M, tiles) or None.
        visible_tiles: of the cache, if there is one.
        lengths: (B,) tokens in the cache, if there is one.
        past: text columns in the cache.
        new_images: whether some of the tiles are new in this forward.
    """
    if cross_attention_mask is not None:
        shown = rows_of_chunk(cross_attention_mask, past, varlen.length)
        if visible_tiles is not None:
            images = shown.unflatten(-1, cross_attention_mask.shape[2:]).any(-1)
            visible_tiles.remember(shown, images, varlen, lengths, semantics)
        return TileView.from_seen(varlen.unpad(shown), semantics)
    if visible_tiles is not None and not new_images:
        return visible_tiles.view.per_token(varlen)
    # Every token sees all tiles of its sequence, and a sequence without images sees none, or all.
    sees_all = semantics.imageless_rows == "leak"
    seen = torch.ones_like(table, dtype=torch.bool) if sees_all else table >= 0
    view = TileView.from_seen(None if sees_all else seen, semantics)
    if visible_tiles is not None:
        columns = seen.unsqueeze(1).expand(-1, varlen.length, -1)
        visible_tiles.remember(columns, columns[:, :, :0], varlen, lengths, semantics)
        visible_tiles.view = view
    return view.per_token(varlen)
