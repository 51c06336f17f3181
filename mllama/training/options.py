"""What a training run is asked to do, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .optimizer import half_cosine

_RATES = {True: 2e-4, False: 1e-5}  # of adapters, of all weights


@dataclass(frozen=True)
class TrainingOptions:
    """Everything besides model and data that decides the result of a run.

    Attributes:
        lora_rank: of the adapters; 0 trains all weights.
        lora_alpha: the adapters' sum is scaled by alpha / rank; 0: twice the rank.
        lora_dropout: share of an adapter's inputs that is zeroed.
        lora_vision: adapters in the vision tower too.
        epochs: passes over the data; ``max_steps`` instead of them if it is not 0.
        batch_size: examples computed at once; ``accumulate`` such batches make a step.
        learning_rate: its peak; 0: 2e-4 for adapters, 1e-5 for all weights.
        warmup: share of the steps in which it rises; then it falls to 0 along half a cosine.
        weight_decay: of matrices, none of norms, gates and biases.
        max_grad_norm: gradients longer than this are scaled down to it; 0: never.
        max_length: tokens of the longest example that is taken; 0: what the model takes.
        escape_special_tokens: special tokens in the words of the data are plain text.
        gradient_checkpointing: compute layers again instead of keeping what their backward reads.
        save_every: steps between checkpoints.
        seed: of the adapters, the dropout and the order of the examples.
    Raises: ValueError naming the option.
    """

    lora_rank: int = 16
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_vision: bool = False
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 1
    accumulate: int = 8
    learning_rate: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 0
    escape_special_tokens: bool = True
    gradient_checkpointing: bool = False
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in (
            "lora_rank",
            "lora_alpha",
            "max_steps",
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "max_length",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("lora_dropout", "warmup"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def alpha(self) -> float:
        return self.lora_alpha or 2.0 * self.lora_rank

    @property
    def peak_rate(self) -> float:
        return self.learning_rate or _RATES[self.lora_rank > 0]

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of so many."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.peak_rate * (step + 1) / rising
        share = (step - rising) / max(steps - rising, 1)
        return self.peak_rate * half_cosine(share)
