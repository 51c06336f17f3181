"""Decode steps that are captured as CUDA graphs, and replayed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mllama.engine.fingerprint import addresses, fingerprint
from mllama.engine.step import DecodeRows, StepShape
from mllama.stores import KeyValueStore

if TYPE_CHECKING:
    from mllama.generation.sampling import Sampler

# Steps that run as usual before the capture: libraries allocate their workspaces in the first.
_WARM_UP_STEPS = 2
# Steps that are kept for one store.
_MOST_KEPT = 8

# CUDA allows one capture at a time in a process.
_capturing = threading.Lock()


def captures(model: Any, tensor: Tensor) -> bool:
    """Whether steps on a tensor's device are replayed as graphs; ops in plain PyTorch read lengths on the
    host, as ranks do that share a model over gloo."""
    if not (model.cuda_graph and tensor.is_cuda) or model.ops.plain_ops(model.device):
        return False
    return model.share is None or model.share.ranks.can_be_captured


@dataclass
class Aside:
    """Where steps are captured.

    Attributes:
        stream: what runs there, since libraries keep a workspace for each.
        memory: of the graphs, for those of which no two are in use at once; None: each has its own.
    """

    stream: torch.cuda.Stream
    memory: Any = None

    @classmethod
    def shared(cls, device: torch.device) -> Aside:
        """For steps that run one after another, each on what the one before has left."""
        return cls(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


class CapturedStep:
    """Runs a step over buffers, from the third call on as one replay of a CUDA graph.

    The calls before warm up, and are steps like the others, so nothing has to be undone. Where the
    capture fails, the steps run without a graph and a warning says why; the next run tries again.

    Model and store come with each call and are not kept: a model that keeps steps is then freed with its last
    reference, and so is a store. Neither may change from one begin() to the next.

    Args:
        rows: the buffers, on a CUDA device.
        choose: the tokens that the rows go on with, as a part of the step; None: they are loaded anew for
            each.
        aside: where it is captured.
    """

    def __init__(
        self,
        rows: DecodeRows,
        choose: Sampler | None = None,
        aside: Aside | None = None,
    ) -> None:
        self.rows, self.choose = rows, choose
        self._aside = aside or Aside(torch.cuda.Stream(rows.tokens.device))
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._fingerprint: list[Any] = []

    @property
    def has_graph(self) -> bool:
        return self._graph is not None

    @property
    def is_settled(self) -> bool:
        """Whether a capture has been tried: what steps take from now on they have."""
        return self._calls > _WARM_UP_STEPS

    def reads(self, store: KeyValueStore) -> bool:
        """Whether the graph reads a store where that is now."""
        return self.has_graph and self._fingerprint[0] == addresses(store)

    def begin(self, model: Any, store: KeyValueStore) -> None:
        """Begin a run: the graph is replayed from its first step on if nothing that is baked in differs."""
        self._calls = 0
        if self.has_graph and fingerprint(model, store) != self._fingerprint:
            self._graph = self._logits = None

    def __call__(self, model: Any, store: KeyValueStore) -> Tensor:
        """The logits (B, V) of a step, which the next one overwrites."""
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._calls == _WARM_UP_STEPS + 1:
            self._capture(model, store)
        else:
            self._run_aside(model, store)
        assert self._logits is not None
        return self._logits

    def _run(self, model: Any, store: KeyValueStore) -> Tensor:
        logits = self.rows.logits(model, store)
        if self.choose is not None:
            self.rows.tokens.copy_(self.choose(logits))
        return logits

    def _run_aside(self, model: Any, store: KeyValueStore) -> None:
        current = torch.cuda.current_stream(self.rows.tokens.device)
        self._aside.stream.wait_stream(current)
        with torch.cuda.stream(self._aside.stream):
            self._logits = self._run(model, store)
        current.wait_stream(self._aside.stream)

    def _capture(self, model: Any, store: KeyValueStore) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate and wait meanwhile, which the default mode would forbid them.
            with (
                _capturing,
                _streams_kept(self.rows.tokens.device),
                torch.cuda.graph(
                    graph,
                    pool=self._aside.memory,
                    stream=self._aside.stream,
                    capture_error_mode="thread_local",
                ),
            ):
                logits = self._run(model, store)
        except RuntimeError as error:
            warnings.warn(f"decoding continues without a CUDA graph: {error}", stacklevel=2)
            self._run_aside(model, store)
            return
        self._graph, self._logits = graph, logits
        self._fingerprint = fingerprint(model, store)
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


class KeptSteps:
    """The captured steps of one model that no call is using, by the store that they read.

    They go with the store, or when it has moved; of one store those go first that were used least recently.
    Copying or pickling gives none.
    """

    def __init__(self) -> None:
        self._steps: WeakKeyDictionary[KeyValueStore, list[tuple[StepShape, CapturedStep]]] = (
            WeakKeyDictionary()
        )
        # Reentrant, since the garbage collector may close a suspended stream() anywhere.
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[KeptSteps], tuple[()]]:
        return KeptSteps, ()

    def has(self, store: KeyValueStore) -> bool:
        """Whether a step is kept for a store."""
        with self._lock:
            return bool(self._steps.get(store))

    def clear(self) -> None:
        """Free all; those in use are not kept either when their calls end."""
        with self._lock:
            self._steps = WeakKeyDictionary()

    @contextmanager
    def lend(
        self, store: KeyValueStore, shape: StepShape, make: Callable[[], CapturedStep]
    ) -> Iterator[CapturedStep]:
        """A step for one call, and nobody else's meanwhile.

        It is kept when the call has ended as planned or its generator was closed, if it was captured. After
        another exception it is dropped: it may be half done.
        """
        steps = self._steps
        step = self._take(store, shape) or make()
        try:
            yield step
        except GeneratorExit:  # between two steps
            self._keep(steps, store, shape, step)
            raise
        self._keep(steps, store, shape, step)

    def _take(self, store: KeyValueStore, shape: StepShape) -> CapturedStep | None:
        with self._lock:
            kept = self._steps.get(store, [])
            place = next((i for i, (own, _) in enumerate(kept) if own == shape), None)
            return None if place is None else kept.pop(place)[1]

    def _keep(
        self, steps: object, store: KeyValueStore, shape: StepShape, step: CapturedStep
    ) -> None:
        with self._lock:
            if steps is self._steps:
                kept = [*self._steps.pop(store, ()), (shape, step)]
                if kept := [entry for entry in kept if entry[1].reads(store)]:
                    self._steps[store] = kept[-_MOST_KEPT:]
