"""A stand-in for CUDA graphs on a machine without a GPU.

It records the operations of one step and repeats them on the very same tensors, as a graph does: a value that
the host had computed for the first step would come out in all of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What makes the host wait for the device, or the shape of a result depend on values there.
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
OPERATIONS |= {"_unique2", "unique_dim", "repeat_interleave", "bincount"}
METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}


class NoHostReads(TorchFunctionMode):
    """Refuses the methods that read CPU memory without an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise RuntimeError(f"{func.__name__}() cannot be captured: it reads the device")
        return func(*args, **(kwargs or {}))


class RecordedGraph(TorchDispatchMode):
    """Has the interface of torch.cuda.CUDAGraph as far as CapturedStep uses it."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._guard = NoHostReads()
        self.replays = 0
        self.made.append(self)

    def __enter__(self) -> RecordedGraph:
        self._guard.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._guard.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in OPERATIONS:
            raise RuntimeError(f"{func} cannot be captured: it reads the device")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # a graph writes tensors of any mode
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return  # unlike a capture, the recording has run the step
        for func, args, kwargs, recorded in self._calls:
            given = {t.data_ptr() for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)}
            results = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(tree_flatten(recorded)[0], results):
                if torch.is_tensor(old) and old.data_ptr() not in given:
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class FakeStream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Put it in the place of what captures use of CUDA."""
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    return RecordedGraph
