"""Holds the simulator against a GPU: what ops gave on one machine, given again on another.

    python -m pytest -p compare_devices --record calls.pt tests/test_*.py     # writes calls and results
    python tests/compare_devices.py calls.pt [cpu|cuda]                       # repeats them and compares

The first is for the simulated build (PYTHONPATH and LD_LIBRARY_PATH as in run_simulated.sh, and this
folder on PYTHONPATH), the second for the machine with the GPU. A simulated device executes the very
instructions, so what differs by more than the approximate ones (exp2, reciprocal) and the matrix
products' order of additions is a finding: in the kernels, or in the simulator.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CALLS_PER_OP = 48
MOST_BYTES = 2**18  # of the arguments of one call: the file travels
# Of a result's norm: 64 roundings, by dtype.
TOLERANCE = {torch.float32: 64 * 2**-24, torch.float16: 64 * 2**-11, torch.bfloat16: 64 * 2**-8}


class Recorder(TorchDispatchMode):
    """Keeps some calls of every op, drawn evenly from all there are: arguments before, all after."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self._seen: Counter[str] = Counter()
        self._random = random.Random(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "mllama_kernels":
            return func(*args, **(kwargs or {}))
        given = (args, kwargs or {})
        is_wanted = _is_small(given)
        before = tree_map_only(Tensor, _copy, given) if is_wanted else None
        out = func(*args, **(kwargs or {}))
        if is_wanted:
            after = tree_map_only(Tensor, _copy, (out, _written(func, args)))
            self._keep(func._opname, {"given": before, "after": after})
        return out

    def _keep(self, name: str, call: dict[str, Any]) -> None:
        kept = self.kept.setdefault(name, [])
        self._seen[name] += 1
        slot = len(kept) if len(kept) < CALLS_PER_OP else self._random.randrange(self._seen[name])
        if slot < CALLS_PER_OP:
            kept[slot : slot + 1] = [call]


def _is_small(given: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    if any(t.is_meta or type(t) is not Tensor for t in tensors):
        return False
    return sum(t.untyped_storage().nbytes() for t in tensors) <= MOST_BYTES


def _copy(tensor: Tensor) -> Tensor:
    """With its strides: a kernel may take another path for a view."""
    storage = tensor.new_empty(0).set_(tensor.untyped_storage().clone())
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _written(func: Any, args: tuple) -> list[Tensor]:
    """The arguments that the op writes to."""
    schema = func._schema.arguments
    return [a for a, s in zip(args, schema) if s.alias_info is not None and s.alias_info.is_write]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file for calls of ops and what they gave")


_recorder = Recorder()


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest) -> Iterator[None]:
    if any(word in request.node.name for word in ("torch_machinery", "compile", "trains")):
        yield  # tracing does not go with a recorder
        return
    with _recorder:
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    torch.save(_recorder.kept, session.config.getoption("--record"))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Euclidean distance relative to the expected norm; infinite where only one of two is finite."""
    a, e = actual.cpu().double(), expected.double()
    if not a.isfinite().equal(e.isfinite()):
        return float("inf")
    a, e = a.nan_to_num(), e.nan_to_num()
    distance = torch.linalg.vector_norm(a - e).item()
    return distance and distance / max(torch.linalg.vector_norm(e).item(), 1e-30)


def compare(path: Path, device: str) -> int:
    import mllama_kernels  # noqa: F401  registers the ops

    findings = 0
    for name, calls in torch.load(path).items():
        worst, equal = 0.0, 0
        for call in calls:
            args, kwargs = tree_map_only(Tensor, lambda t: _copy(t).to(device), call["given"])
            op = getattr(torch.ops.mllama_kernels, name).default
            actual = tree_leaves((op(*args, **kwargs), _written(op, args)))
            results = list(zip(actual, tree_leaves(call["after"]), strict=True))
            equal += all(a.cpu().allclose(e, 0, 0, equal_nan=True) for a, e in results)
            for a, e in results:
                share = difference(a, e) / TOLERANCE.get(e.dtype, 1e-30)
                worst = max(worst, share)
                if share > 1:
                    findings += 1
                    shapes = [tuple(t.shape) for t in tree_leaves(args) if isinstance(t, Tensor)]
                    print(f"  {name} {e.dtype} {shapes}: differs by {difference(a, e):.2e}")
        print(
            f"{name}: {equal} of {len(calls)} calls bit-equal, worst {worst:.3f} of the tolerance"
        )
    return findings


if __name__ == "__main__":
    sys.exit(compare(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cuda") > 0)
