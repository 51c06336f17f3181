"""Padded batches without their padding (varlen, unpadded): only real tokens are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarlenBatch:
    """How the real tokens of a padded (B, L) batch lie in a packed (N, ...) tensor, row by row.

    Attributes:
        batch, length: B and L.
        rows: (N,) int64, where each packed token lies in the flattened batch; None if all are real.
        cu_seqlens: (B + 1,) int32, first packed token of each sequence, and N.
        max_seqlen: at least the number of real tokens of any sequence.
        texts: (n + 1,) int32, the same of each text; a sequence may hold several that do not see each
            other, but see the images of the sequence alike.
    """

    batch: int
    length: int
    rows: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    texts: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> VarlenBatch:
        """Real are the tokens at which ``mask`` (B, L) is not 0. Reads it on the host, unless exporting."""
        batch, length = mask.shape
        lengths = (mask != 0).sum(1)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        if torch.compiler.is_exporting():
            rows = mask.flatten().nonzero().squeeze(1)
            return cls(batch, length, rows, cu_seqlens, length, cu_seqlens)
        longest, total = torch.stack([lengths.max(), lengths.sum()]).tolist()
        if total == batch * length:
            return cls(batch, length, None, cu_seqlens, length, cu_seqlens)
        rows = mask.flatten().nonzero().squeeze(1)
        return cls(batch, length, rows, cu_seqlens, longest, cu_seqlens)

    @classmethod
    def dense(cls, batch: int, length: int, device: torch.device) -> VarlenBatch:
        """All tokens are real; nothing is read on the host."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(batch, length, None, cu_seqlens, length, cu_seqlens)

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> VarlenBatch:
        """All tokens are real; a text begins where ``position_ids`` (B, L) do not continue by one. Reads how
        many there are on the host, unless exporting."""
        batch, length = position_ids.shape
        dense = cls.dense(batch, length, position_ids.device)
        begins = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 2) != 1).flatten()
        if torch.compiler.is_exporting():
            # As many texts as tokens; those too many are empty, at the end.
            rows = torch.arange(batch * length, dtype=torch.int32, device=begins.device)
            first = torch.where(begins, rows, batch * length).sort().values
        else:
            first = begins.nonzero().squeeze(1).int()
        return replace(dense, texts=torch.cat([first, dense.cu_seqlens[-1:]]))

    @property
    def total(self) -> int:
        """N."""
        return self.batch * self.length if self.rows is None else self.rows.shape[0]

    def unpad(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (N, ...)."""
        x = x.flatten(0, 1)
        return x if self.rows is None else x[self.rows]

    def pad(self, x: Tensor) -> Tensor:
        """(N, ...) to (B, L, ...), zero at padding."""
        if self.rows is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy(0, self.rows, x)
        return x.unflatten(0, (self.batch, self.length))
