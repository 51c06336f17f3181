"""The decode step over static buffers, and its replay as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.generation.sampling import Sampler

# Steps that run as usual before the capture: libraries allocate their workspaces in the first.
_WARM_UP_STEPS = 2


class DecodeStep:
    """Reads the latest token of every row and chooses the next, always in the same buffers.

    Everything that changes from step to step lies on the device and is updated in place: the token,
    lengths and positions in the cache, the sampler's state. Nothing is read by the host. (The cache
    counts its columns there, which a replay leaves out; the caller settles them at the end.)

    Args:
        model: called with one token per row, the cache and logits_to_keep=1.
        cache: holds the prompt and has room for all tokens to come.
        sampler: from logits to tokens.

    Attributes:
        tokens: (B,) int64, the latest token of each row; INVALID_TOKEN where there was none.
    """

    def __init__(self, model: Callable[..., Any], cache: MllamaCache, sampler: Sampler) -> None:
        self._model, self._cache, self._sampler = model, cache, sampler
        device = cache.lengths.device
        self.tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)
        self._input_ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)

    def accept(self, logits: Tensor) -> None:
        """Choose the next tokens from logits (B, V)."""
        self.tokens.copy_(self._sampler(logits))
        self._input_ids.copy_(self.tokens.clamp_min(0).unsqueeze(1))  # a marker has no embedding

    def __call__(self) -> None:
        output = self._model(
            input_ids=self._input_ids, past_key_values=self._cache, logits_to_keep=1
        )
        self.accept(output.logits[:, -1])


class CapturedStep:
    """Runs a DecodeStep, from the third call on as one replay of a CUDA graph.

    The calls before warm up, and are steps like the others, so nothing has to be undone. Where the
    capture fails, the steps go on without a graph and a warning says why.

    Args:
        step: on a CUDA device.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream(step.tokens.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._calls == _WARM_UP_STEPS + 1:
            self._capture()
        else:
            self._run_aside()

    def _run_aside(self) -> None:
        """Run on the stream that will be captured, so that its memory is warm as well."""
        current = torch.cuda.current_stream(self._step.tokens.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step()
        current.wait_stream(self._stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without a CUDA graph: {error}", stacklevel=2)
            self._run_aside()
            return
        self._graph = graph
        graph.replay()  # a capture runs nothing on the device
