"""Rotary position embedding: the frequencies of Llama 3, and cos and sin per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mllama.config import MllamaTextConfig


def inverse_frequencies(config: MllamaTextConfig) -> Tensor:
    """(D / 2,) float32 on the CPU, scaled as the config's ``rope_parameters`` say.

    With rope_type "llama3", wavelengths above original / low_freq_factor are stretched by ``factor``,
    those below original / high_freq_factor are kept, and between the two the frequency is blended.
    Source: Llama Team 2024 (arXiv 2407.21783) and the released configurations.
    """
    rope = config.rope_parameters
    assert rope is not None
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    )
    inv_freq = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "default":
        return inv_freq
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long, short = wavelength > original / low, wavelength < original / high
    return torch.where(long, inv_freq / factor, torch.where(short, inv_freq, blended))


class RotaryEmbedding:
    """cos and sin of each token's angles.

    Not a module: the frequencies follow from the config, are no part of a checkpoint, and must stay
    float32 when a model is cast. Those of a device stay where they are: a captured step reads them.
    """

    def __init__(self, config: MllamaTextConfig) -> None:
        self._config = config
        self._inv_freq: dict[torch.device, Tensor] = {}

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids (N,) to cos and sin (N, D / 2), computed in float32 and rounded to ``dtype``."""
        device = position_ids.device
        inv_freq = self._inv_freq.get(device)
        if inv_freq is None:
            inv_freq = inverse_frequencies(self._config).to(device)
            if not torch.compiler.is_exporting():  # there it has no values
                inv_freq = self._inv_freq.setdefault(device, inv_freq)
        angles = position_ids.unsqueeze(-1).float() * inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)
