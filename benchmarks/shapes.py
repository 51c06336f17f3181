"""The sizes of Llama 3.2 Vision 11B, and what the cases make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Setting

E, INTERMEDIATE, HQ, HKV, D = 4096, 14336, 32, 8, 128
VOCAB = 128256
VISION_WIDTH, VISION_HEADS, VISION_DIM, PATCH, TILE = 1280, 16, 80, 14, 560
TILES, TILE_TOKENS, PADDED_TILE_TOKENS = 4, 1601, 1608
PAGE = 64
EPS = 1e-5
# Rows whose exact result is computed where computing all would take too long or too much memory.
CHECKED_ROWS = 64


def angles(setting: Setting, begin: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (length, D / 2) of the positions from ``begin`` on."""
    position = torch.arange(begin, begin + length, device=setting.device, dtype=torch.float64)
    exponent = torch.arange(0, D, 2, device=setting.device, dtype=torch.float64) / D
    angle = position.unsqueeze(-1) * 500000.0**-exponent
    return angle.cos().to(setting.dtype), angle.sin().to(setting.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of `transformers`: x (..., L, H, D) by cos, sin (L, D / 2)."""
    cos, sin = (torch.cat([t, t], -1).unsqueeze(-2) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def sample_rows(length: int, count: int = CHECKED_ROWS) -> Tensor:
    """Row numbers spread over ``length``, the first and the last among them."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32 unless the scores are float64, rounded to their dtype."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=wide).to(scores.dtype)
