"""What an engine counts of its work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from mllama.engine.interface import Distribution
from mllama.engine.plan import Plan

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Values counted up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, float("inf"))
        self._counts, self._total = [0] * len(self._bounds), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def distribution(self) -> Distribution:
        counts, sum_ = [], 0
        for count in self._counts:
            sum_ += count
            counts.append(sum_)
        return Distribution(self._bounds, tuple(counts), self._total)


class Counts:
    """Since the start. One thread counts, any may read.

    Attributes:
        steps, step_tokens, encoded_pictures: what was computed.
        step_seconds, batch_size: of steps.
    """

    def __init__(self) -> None:
        self.steps = self.step_tokens = self.encoded_pictures = 0
        self.step_seconds, self.batch_size = Histogram(_SECONDS), Histogram(_ROWS)

    def step(self, plan: Plan, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.step_tokens += plan.num_tokens
        self.encoded_pictures += len(plan.encodes)
        self.step_seconds.add(seconds)
        self.batch_size.add(len(plan.rows))
