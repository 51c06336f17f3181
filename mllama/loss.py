"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def causal_lm_loss(logits: Tensor, labels: Tensor, image_token_index: int | None = None) -> Tensor:
    """Mean cross entropy of each token given those before it, in float32.

    Args:
        logits: (B, L, V).
        labels: (B, L) int64, the tokens themselves (the shift happens here); -100 is ignored.
        image_token_index: a label that is never a target, since the head has no such class.
    Raises: ValueError for a label that is no class.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:2])}, like the logits, got {tuple(labels.shape)}"
        )
    if image_token_index is not None:
        labels = labels.masked_fill(labels == image_token_index, IGNORED)
    labels, classes = labels[:, 1:], logits.shape[-1]
    if bool(((labels != IGNORED) & ((labels < 0) | (labels >= classes))).any()):
        raise ValueError(
            f"labels must be {IGNORED} or within 0..{classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )
