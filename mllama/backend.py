"""Which implementation of the ops the modules of a model call."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mllama_kernels import _dispatch, _library

BACKENDS = ("auto", "kernels", "reference")
_MODULES = {name: "mllama_kernels" for name in BACKENDS} | {"reference": "mllama_kernels.reference"}
_told: set[str] = set()


class Ops:
    """The op functions of one backend, looked up by name: ``ops.rms_norm(x, weight)``.

    All modules of a model share one object, so changing its backend changes the whole model. It is
    copied and pickled by what was chosen. Whether an op runs as a kernel is a matter of the tensors it
    gets: `mllama_kernels` decides it at every call.

    Args:
        backend, device: see :meth:`select`.
    """

    def __init__(self, backend: str = "auto", device: torch.device | str = "cpu") -> None:
        self.select(backend, device)

    def select(self, backend: str, device: torch.device | str) -> None:
        """Use "kernels", "reference", or with "auto" the kernels where there are any.

        Args:
            backend: one of the three.
            device: where the model is.
        Raises: ValueError for another name; RuntimeError as :meth:`settle`.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")
        _settle(backend, device)
        self.choice, self.device = backend, torch.device(device)
        self._module = importlib.import_module(_MODULES[backend])

    def settle(self, device: torch.device | str) -> None:
        """Take note that the model is on a device now, or will be.

        Where no kernel can run there and nobody asked for plain PyTorch, "auto" warns, once for each reason.

        Raises: RuntimeError with the reason when "kernels" were asked for and none can run there.
        """
        _settle(self.choice, device)
        self.device = torch.device(device)

    @property
    def backend(self) -> str:
        """What the ops run on where the model was last known to be."""
        return self.backend_on(self.device)

    def backend_on(self, device: torch.device | str) -> str:
        """ "kernels" if any op runs as a kernel on a device, else "reference"."""
        return "reference" if len(self.plain_ops(device)) == len(_library.OPS) else "kernels"

    def plain_ops(self, device: torch.device | str) -> dict[str, str]:
        """The ops that run as plain PyTorch on a device, each with the reason."""
        if self.choice == "reference":
            return dict.fromkeys(_library.OPS, "the model's backend is the reference")
        return _dispatch.plain_ops(device)

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
        return Ops, (self.choice,)

    def __repr__(self) -> str:
        return f"Ops({self.choice!r}, {str(self.device)!r})"


def _settle(backend: str, device: torch.device | str) -> None:
    plain = {} if backend == "reference" else _dispatch.plain_ops(device)
    if len(plain) < len(_library.OPS):
        return
    reason = next(iter(plain.values()))
    kind = torch.device(device).type
    if backend == "kernels":
        raise RuntimeError(f'backend="kernels": {reason}')
    asked_for = any(map(_dispatch.switched_off, _library.OPS))
    if kind != "meta" and not asked_for and reason not in _told:
        _told.add(reason)
        warnings.warn(f"on {kind} the ops run as plain PyTorch: {reason}", stacklevel=2)
