"""What a training run is asked to do, and the learning rate that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .optimizer import half_cosine

SCHEDULES: dict[
    str, Callable[[float], float]
] = {  # what the rate is multiplied by after the warm-up
    "cosine": half_cosine,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}
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
        batch_size: examples that a rank computes at once; ``accumulate`` such batches make a step.
        packing: rows of ``max_length`` tokens, each of as many conversations as fit, are the examples.
        learning_rate: its peak; 0: 2e-4 for adapters, 1e-5 for all weights.
        warmup: share of the steps in which it rises.
        schedule: how it falls to 0 then, one of SCHEDULES; "constant": it does not.
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
    packing: bool = False
    learning_rate: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
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
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        if self.packing and not self.max_length:
            raise ValueError("packing needs max_length: the tokens of a row")

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
        return self.peak_rate * self.factor(step, steps)

    def factor(self, step: int, steps: int) -> float:
        """The same as a share of its peak."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return SCHEDULES[self.schedule]((step - rising) / max(steps - rising, 1))
