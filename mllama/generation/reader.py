"""The way of the tokens from the device to the host."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class TokenReader:
    """Copies the tokens of each step to the host, ``delay`` steps late.

    On CUDA that is one: the copy of a step is awaited only when the next step has been enqueued, so
    that the device always has work.

    Args:
        tokens: (B,) int64, written anew in every step.
    """

    def __init__(self, tokens: Tensor, delay: int) -> None:
        self._tokens, self.delay = tokens, delay
        self._slots = deque(
            torch.empty_like(tokens, device="cpu", pin_memory=tokens.is_cuda)
            for _ in range(self.delay + 1)
        )
        self._requests: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    @property
    def waiting(self) -> int:
        """Steps requested and not yet read."""
        return len(self._requests)

    def request(self) -> None:
        """Start copying the tokens of the latest step."""
        slot = self._slots.popleft()
        slot.copy_(self._tokens, non_blocking=True)
        event = None
        if self._tokens.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._tokens.device))
        self._requests.append((slot, event))

    def read(self) -> list[int]:
        """The tokens of the oldest step that was requested."""
        slot, event = self._requests.popleft()
        if event is not None:
            event.synchronize()
        self._slots.append(slot)
        return slot.tolist()
