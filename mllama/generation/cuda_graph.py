"""The decode step over static buffers, and its replay as a CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.generation.fingerprint import fingerprint
from mllama.generation.sampling import Sampler

# Steps that run as usual before the capture: libraries allocate their workspaces in the first.
_WARM_UP_STEPS = 2

# CUDA allows one capture at a time in a process.
_capturing = threading.Lock()


class DecodeStep:
    """Reads the latest token of every row and chooses the next, always in the same buffers.

    Everything that changes from step to step lies on the device and is updated in place: the token,
    lengths and positions in the cache, the sampler's state. Nothing is read by the host. (The cache
    counts its columns there, which a replay leaves out; the caller settles them at the end.)

    Model and cache come with each call and are not kept: a cache that owns its captured step, and a
    model that keeps such caches, are then freed with their last reference.

    Args:
        sampler: from logits to tokens.
        batch_size: rows.
        device: of the model and the cache.

    Attributes:
        sampler: as given.
        tokens: (B,) int64, the latest token of each row; INVALID_TOKEN where there was none.
    """

    def __init__(self, sampler: Sampler, batch_size: int, device: torch.device) -> None:
        self.sampler = sampler
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._input_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)

    def accept(self, logits: Tensor) -> None:
        """Choose the next tokens from logits (B, V)."""
        self.take(self.sampler(logits))

    def take(self, tokens: Tensor) -> None:
        """Continue with these tokens (B,)."""
        self.tokens.copy_(tokens)
        self._input_ids.copy_(self.tokens.clamp_min(0).unsqueeze(1))  # a marker has no embedding

    def __call__(self, model: Any, cache: MllamaCache) -> None:
        """One step: ``cache`` holds all tokens but the latest, and has room."""
        output = model(input_ids=self._input_ids, past_key_values=cache, logits_to_keep=1)
        self.accept(output.logits[:, -1])


class CapturedStep:
    """Runs a DecodeStep, from the third call on as one replay of a CUDA graph.

    The calls before warm up, and are steps like the others, so nothing has to be undone. Where the
    capture fails, the steps run without a graph and a warning says why; the next run tries again.

    In a later run with the same cache, after restart(), the graph is replayed from the first call on
    if its fingerprint is still that of model and cache. Neither may change while a run lasts.

    Args:
        step: on a CUDA device.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self._calls = 0
        self._stream = torch.cuda.Stream(step.tokens.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fingerprint: list[Any] = []

    @property
    def has_graph(self) -> bool:
        return self._graph is not None

    def restart(self, input_ids: Tensor, seeds: list[int]) -> None:
        """Begin another run, with another prompt and other seeds."""
        self.step.sampler.restart(input_ids, seeds)
        self._calls = 0

    def __call__(self, model: Any, cache: MllamaCache) -> None:
        if self._calls == 0:
            # The device is still busy with the prompt: the fingerprint takes none of its time.
            cache.settle()
            if self.has_graph and fingerprint(model, cache) != self._fingerprint:
                self._graph = None
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._calls == _WARM_UP_STEPS + 1:
            self._capture(model, cache)
        else:
            self._run_aside(model, cache)

    def _run_aside(self, model: Any, cache: MllamaCache) -> None:
        """Run on the stream that will be captured: libraries keep a workspace for each stream."""
        current = torch.cuda.current_stream(self.step.tokens.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.step(model, cache)
        current.wait_stream(self._stream)

    def _capture(self, model: Any, cache: MllamaCache) -> None:
        graph, columns = torch.cuda.CUDAGraph(), cache.columns
        try:
            # Other threads may allocate and wait meanwhile, which the default mode would forbid them.
            with (
                _capturing,
                _streams_kept(self.step.tokens.device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self.step(model, cache)
        except RuntimeError as error:
            warnings.warn(f"decoding continues without a CUDA graph: {error}", stacklevel=2)
            cache.columns = columns  # a failed step may have been counted, and computed nothing
            self._run_aside(model, cache)
            return
        self._graph, self._fingerprint = graph, fingerprint(model, cache)
        graph.replay()  # a capture runs nothing on the device


@contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    """Makes the same streams current again after an error.

    torch.cuda.graph ends the capture before it leaves its stream. Where the capture is broken the first
    raises, and the second does not come about.
    """
    streams = (torch.cuda.current_stream(device), torch.cuda.current_stream())
    try:
        yield
    except BaseException:
        for stream in streams:  # the last one's device becomes the current one
            torch.cuda.set_stream(stream)
        raise


def captured_step(
    cache: MllamaCache,
    sampling: Any,
    input_ids: Tensor,
    vocab_size: int,
    seeds: list[int],
    ops: Any,
) -> CapturedStep:
    """The step captured on ``cache``, restarted, if it samples in the same way; else a new one.

    Args: as for :class:`Sampler`.
    """
    captured = cache.captured
    if captured is not None and captured.step.sampler.made_for == (sampling, vocab_size, ops):
        captured.restart(input_ids, seeds)
        return captured
    with torch.inference_mode(False):  # the buffers will be written in any mode
        sampler = Sampler(sampling, input_ids, vocab_size, seeds, ops)
        cache.captured = CapturedStep(DecodeStep(sampler, len(input_ids), input_ids.device))
    return cache.captured
