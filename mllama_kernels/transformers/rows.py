"""Which tokens of a batch form causal sequences: padding and packing as bounds instead of masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """(B, L) tokens as causal sequences that do not see each other.

    Attributes:
        cu_seqlens: (n + 1,) int32, the first row of each sequence among the B * L rows, then B * L.
            None: each of the B rows of tokens is one sequence.
        max_seqlen: bound on their lengths.
    """

    cu_seqlens: Tensor | None
    max_seqlen: int

    def mask(self, batch: int) -> Tensor:
        """(B, 1, L, L) bool, True where a token sees a token."""
        length = self.max_seqlen
        device = self.cu_seqlens.device if self.cu_seqlens is not None else None
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if self.cu_seqlens is None:
            return causal.expand(batch, 1, -1, -1)
        row = torch.arange(batch * length, device=device, dtype=torch.int32)
        sequence = torch.searchsorted(self.cu_seqlens, row, right=True).view(batch, length)
        return ((sequence.unsqueeze(-1) == sequence.unsqueeze(-2)) & causal).unsqueeze(1)


def sequences_from_padding(mask: Tensor) -> Sequences | None:
    """A (B, L) mask, nonzero at tokens: padding before and after them become sequences of their own.

    Nothing that counts sees those, so no token has to move. Waits for the device once.

    Returns: None where padding lies between tokens.
    """
    batch, length = mask.shape
    token = mask != 0
    count = token.sum(1)
    begin = token.int().argmax(1)
    end = length - token.flip(1).int().argmax(1)
    together = (count == end - begin) | (count == 0)
    dense, representable = torch.stack([(count == length).all(), together.all()]).tolist()
    if dense:
        return Sequences(None, length)
    if not representable:
        return None
    first = torch.arange(0, batch * length, length, device=mask.device)
    bounds = torch.stack([first, first + begin, first + end], dim=1).flatten()
    return Sequences(_with_end(bounds, batch * length), length)


def sequences_from_positions(position_ids: Tensor, step: int = 1) -> Sequences:
    """(B, L) numbers: a sequence begins where they do not continue by `step`. Waits for the device once."""
    batch, length = position_ids.shape
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != step
    bounds = begins.flatten().nonzero().flatten()
    if bounds.numel() == batch:
        return Sequences(None, length)
    return Sequences(_with_end(bounds, batch * length), length)


def _with_end(bounds: Tensor, end: int) -> Tensor:
    return torch.cat([bounds, bounds.new_full((1,), end)]).int()
