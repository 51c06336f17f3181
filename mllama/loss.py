"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def targets_of(labels: Tensor, classes: int, image_token_index: int | None = None) -> Tensor:
    """What each token but the last is followed by, (B, L - 1); IGNORED where that is not learnt.

    Args:
        labels: (B, L) int64, the tokens themselves (the shift happens here); -100 is ignored.
        classes: V of the head.
        image_token_index: a label that is never a target, since the head has no such class.
    Raises: ValueError for a label that is no class.
    """
    if image_token_index is not None:
        labels = labels.masked_fill(labels == image_token_index, IGNORED)
    targets = labels[:, 1:]
    if bool(((targets != IGNORED) & ((targets < 0) | (targets >= classes))).any()):
        raise ValueError(
            f"labels must be {IGNORED} or within 0..{classes - 1}, got {targets.min()} to {targets.max()}"
        )
    return targets


def causal_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it, in float32.

    Args:
        logits: (B, L, V), or (n, V) of the rows that have a target.
        targets: (B, L - 1), or (n,).
    """
    if logits.dim() == 3:
        logits = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORED)
