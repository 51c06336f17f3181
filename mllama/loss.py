"""The training loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mllama.checks import require_value
from mllama_kernels._arguments import IGNORED


def targets_of(labels: Tensor, classes: int, image_token_index: int | None = None) -> Tensor:
    """What each token is followed by, (B, L); IGNORED where that is no target, as after the last one.

    Args:
        labels: (B, L) int64, the tokens themselves (the shift happens here); IGNORED (-100) is no target.
        classes: V of the head.
        image_token_index: a label that is never a target, since the head has no such class.
    Raises: ValueError for a label that is no class.
    """
    return checked_targets(F.pad(labels[:, 1:], (0, 1), value=IGNORED), classes, image_token_index)


def checked_targets(targets: Tensor, classes: int, image_token_index: int | None = None) -> Tensor:
    """The targets (B, L) themselves, IGNORED at image tokens; see :func:`targets_of`."""
    if image_token_index is not None:
        targets = targets.masked_fill(targets == image_token_index, IGNORED)
    expected = f"labels must be {IGNORED} or within 0..{classes - 1}"
    require_value(
        ((targets == IGNORED) | ((targets >= 0) & (targets < classes))).all(),
        lambda: f"{expected}, got {targets.min()} to {targets.max()}",
        expected,
    )
    return targets


def causal_lm_loss(logits: Tensor, targets: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of the targets in float32: their mean, or their sum over a number of items.

    Args:
        logits: (..., V).
        targets: (...).
        items: what the sum is divided by, in training the targets of all batches of one step.
    """
    loss = F.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction=reduction_for(items),
    )
    return per_item(loss, items)


def reduction_for(items: Tensor | int | None) -> str:
    return "mean" if items is None else "sum"


def per_item(loss: Tensor, items: Tensor | int | None) -> Tensor:
    """The loss of that reduction as it is wanted."""
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
