"""Which implementation of the ops the modules of a model call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import mllama_kernels
from mllama.wording import quoted
from mllama_kernels import _dispatch, _library, reference

BACKENDS = ("auto", "kernels", "reference")
_warned: set[str] = set()


class Ops:
    """The op functions of one backend: ``ops.rms_norm(x, weight)``.

    All modules of a model share one object, so changing its backend changes the whole model. It is
    copied and pickled by what was chosen. Where the model is known to be, an op that runs as a kernel
    there is the kernel itself; the others are those of `mllama_kernels`, which decide it at every call.

    Args:
        backend, device: see :meth:`select`.
    """

    add_rms_norm = staticmethod(mllama_kernels.add_rms_norm)
    cross_attention = staticmethod(mllama_kernels.cross_attention)
    gated_residual = staticmethod(mllama_kernels.gated_residual)
    linear_cross_entropy = staticmethod(mllama_kernels.linear_cross_entropy)
    patch_embed = staticmethod(mllama_kernels.patch_embed)
    quantized_linear = staticmethod(mllama_kernels.quantized_linear)
    quantized_rows = staticmethod(mllama_kernels.quantized_rows)
    rms_norm = staticmethod(mllama_kernels.rms_norm)
    rotary_attention = staticmethod(mllama_kernels.rotary_attention)
    rotary_attention_cached = staticmethod(mllama_kernels.rotary_attention_cached)
    sample = staticmethod(mllama_kernels.sample)
    skinny_linear = staticmethod(mllama_kernels.skinny_linear)
    swiglu = staticmethod(mllama_kernels.swiglu)
    vision_attention = staticmethod(mllama_kernels.vision_attention)

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
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {quoted(backend)}")
        _settle(backend, device)
        self._choose(backend, device)

    def _choose(self, backend: str, device: torch.device | str) -> None:
        self.choice, self.device = backend, torch.device(device)
        self._module: Any = reference if backend == "reference" else mllama_kernels
        self._take()

    def settle(self, device: torch.device | str) -> None:
        """Take note that the model is on a device now, or will be.

        Where no kernel can run there and nobody asked for plain PyTorch, "auto" warns, once for each reason.

        Raises: RuntimeError with the reason when "kernels" were asked for and none can run there.
        """
        _settle(self.choice, device)
        self.device = torch.device(device)
        self._take()

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
        """Within it, the ops are those of what `wrap` makes of the module they come from."""
        module = self._module
        self._module = wrap(module)
        self._take()
        try:
            yield
        finally:
            self._module = module
            self._take()

    def _take(self) -> None:
        for name in _library.OPS:
            function = getattr(self._module, name)
            if self._module is mllama_kernels and _dispatch.why_not(name, self.device) is None:
                function = _dispatch.kernel_of(function)
            setattr(self, name, function)

    def __reduce__(self) -> tuple[Callable[..., Ops], tuple[str, torch.device]]:
        return _restored, (self.choice, self.device)

    def __repr__(self) -> str:
        return f"Ops({self.choice!r}, {str(self.device)!r})"


def _restored(choice: str, device: torch.device) -> Ops:
    """A copy, or what was pickled; it asks for nothing anew, and may be where that device is not."""
    ops = Ops.__new__(Ops)
    ops._choose(choice, device)
    return ops


def _settle(backend: str, device: torch.device | str) -> None:
    plain = {} if backend == "reference" else _dispatch.plain_ops(device)
    if len(plain) < len(_library.OPS):
        return
    reason = next(iter(plain.values()))
    kind = torch.device(device).type
    if backend == "kernels":
        raise RuntimeError(f'backend="kernels": {reason}')
    asked_for = any(map(_dispatch.switched_off, _library.OPS))
    if kind != "meta" and not asked_for and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"on {kind} the ops run as plain PyTorch: {reason}", stacklevel=2)
