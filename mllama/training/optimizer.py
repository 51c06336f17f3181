"""What every training run takes: which parameters decay, and along what the learning rate falls."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over those parameters that require a gradient; matrices decay, norms, gates, biases and
    embeddings do not."""
    trained = [(n, p) for n, p in named if p.requires_grad]
    decays = {n for n, p in trained if p.dim() > 1 and "embed" not in n}
    groups = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=betas)


def half_cosine(share: float) -> float:
    """From 1 at the beginning of a run to 0 at its end."""
    return 0.5 * (1 + math.cos(math.pi * share))
