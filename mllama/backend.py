"""Which implementation of the ops the modules of a model call."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mllama_kernels import _library

BACKENDS = ("auto", "kernels", "reference")
_MODULES = {"kernels": "mllama_kernels", "reference": "mllama_kernels.reference"}


class Ops:
    """The op functions of one backend, looked up by name: ``ops.rms_norm(x, weight)``.

    All modules of a model share one object, so changing its backend changes the whole model. It is
    copied and pickled by the backend's name.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.select(backend)

    def select(self, backend: str) -> None:
        """Use "kernels", "reference", or with "auto" the kernels where the compiled library loads.

        Raises: ValueError for another name; RuntimeError with the reason when "kernels" are asked for
            and cannot be loaded.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
        missing = _library.missing
        if backend == "kernels" and missing is not None:
            raise RuntimeError(f'backend="kernels": {missing}')
        if backend == "auto":
            backend = "kernels" if missing is None else "reference"
        self.backend = backend
        self._module = importlib.import_module(_MODULES[backend])

    @contextmanager
    def replaced(self, wrap: Callable[[Any], Any]) -> Iterator[None]:
        """Within it, ops are looked up in what `wrap` makes of the module they come from."""
        module = self._module
        self._module = wrap(module)
        try:
            yield
        finally:
            self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._module, name)

    def __reduce__(self) -> tuple[type[Ops], tuple[str]]:
        return Ops, (self.backend,)

    def __repr__(self) -> str:
        return f"Ops({self.backend!r})"
