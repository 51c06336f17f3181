"""The self-check: kernels against plain PyTorch, op by op and layer by layer, on a real model.

Every op call of one forward pass is computed three times on the very same inputs: by the kernel, by plain
PyTorch in the model's dtype, and by plain PyTorch in float64. An op passes if its error against float64 is
at most twice plain PyTorch's, or half a unit in the last place, in the maximum and in the 2-norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllama.backend import Ops
from mllama_kernels import reference

ALLOWED_RATIO = 2.0
# In float32, before the store: rotation, score, scaling, exponential, weight, product, sum, quotient.
_ROUNDINGS = 8
# Arguments that an op writes to: each computation gets its own copy.
_WRITTEN = {"rotary_attention_cached": (5, 6)}


class Norms(NamedTuple):
    """The largest element and the 2-norm of something, gathered over calls."""

    largest: float = 0.0
    root: float = 0.0

    def with_(self, values: Tensor) -> Norms:
        """These norms of what was gathered and the values together."""
        largest, root = (torch.linalg.vector_norm(values, order).item() for order in (math.inf, 2))
        return Norms(max(self.largest, largest), math.hypot(self.root, root))


@dataclass
class Comparison:
    """Errors of one thing (an op over all its calls, or a layer) against the exact result.

    `error` and `plain_error` are those of the kernels and of plain PyTorch, `half_ulp` half a unit in the
    last place of the result, all gathered over the calls: one call on a single row says too little.
    """

    name: str
    calls: int = 0
    error: Norms = field(default_factory=Norms)
    plain_error: Norms = field(default_factory=Norms)
    half_ulp: Norms = field(default_factory=Norms)
    float32_roundings: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Takes in one result of the kernel, of plain PyTorch and of float64."""
        if actual.shape != exact.shape:
            self.problems.append(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
            return
        ideal = exact.to(actual.dtype)
        if not torch.equal(actual.isfinite(), ideal.isfinite()):
            self.problems.append("elements that should be finite are not, or the reverse")
            return
        keep = ideal.isfinite() & plain.isfinite()
        a, p, e = (t[keep].double() for t in (actual, plain, exact))
        if e.numel():
            self.error = self.error.with_(a - e)
            self.plain_error = self.plain_error.with_(p - e)
            self.half_ulp = self.half_ulp.with_(e * torch.finfo(actual.dtype).eps / 2)
            self.float32_roundings = max(
                self.float32_roundings,
                _ROUNDINGS * torch.finfo(torch.float32).eps / 2 * e.abs().max().item(),
            )

    @property
    def ratio(self) -> float:
        """The worse quotient of the two norms.

        Plain PyTorch's error counts as half of what is always allowed at least: half an ulp for the
        store and, in the largest error, a few float32 roundings before it.
        """
        allowed = Norms(self.half_ulp.largest + self.float32_roundings, self.half_ulp.root)
        return max(
            error / max(plain, floor / ALLOWED_RATIO) if error else 0.0
            for error, plain, floor in zip(self.error, self.plain_error, allowed)
        )

    @property
    def passed(self) -> bool:
        return not self.problems and self.ratio <= ALLOWED_RATIO

    def to_json(self) -> dict[str, Any]:
        """The row as `mllama verify --json` prints it; errors are the largest absolute ones."""
        return {
            "name": self.name,
            "calls": self.calls,
            "error": self.error.largest,
            "plain_error": self.plain_error.largest,
            "ratio": self.ratio,
            "problems": self.problems,
            "passed": self.passed,
        }


class _CheckedOps:
    """Stands where the op functions are and compares each call; gives back what the kernel gave."""

    def __init__(self, kernels: Any, table: dict[str, Comparison]) -> None:
        self._kernels, self._table = kernels, table

    def __getattr__(self, name: str) -> Any:
        def checked(*args: Any, **kwargs: Any) -> Any:
            plain_args = _own_copies(name, args)
            exact_args = [_double(a) for a in _own_copies(name, args)]
            exact_kwargs = {key: _double(value) for key, value in kwargs.items()}
            actual = getattr(self._kernels, name)(*args, **kwargs)
            plain = getattr(reference, name)(*plain_args, **kwargs)
            exact = getattr(reference, name)(*exact_args, **exact_kwargs)
            row = self._table.setdefault(name, Comparison(name))
            row.calls += 1
            for a, p, e in zip(*map(_as_tuple, (actual, plain, exact))):
                row.add(a, p, e)
            return actual

        return checked


def _own_copies(name: str, args: tuple[Any, ...]) -> list[Any]:
    written = _WRITTEN.get(name, ())
    return [a.clone() if i in written else a for i, a in enumerate(args)]


def _double(value: Any) -> Any:
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if torch.is_tensor(value) else value


@contextmanager
def _checked(ops: Ops) -> Iterator[dict[str, Comparison]]:
    """Within it, every op the model calls is compared; the table fills as the model runs."""
    table: dict[str, Comparison] = {}
    with ops.replaced(lambda module: _CheckedOps(module, table)):
        yield table


@torch.no_grad()
def compare_ops(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Comparison]:
    """One row per op, over every call of a prefill and of one decode step.

    Args:
        model: a model with kernels as its backend.
        inputs: what the processor returned, on the model's device.
    """
    with _checked(model.ops) as table:
        prefill = model(**inputs, use_cache=True)
        token = prefill.logits[:, -1:].argmax(-1)
        model(input_ids=token, past_key_values=prefill.past_key_values)
        model(**inputs, use_cache=False)
    return list(table.values())


@torch.no_grad()
def compare_layers(
    model: nn.Module, exact_model: nn.Module, inputs: Mapping[str, Tensor]
) -> list[Comparison]:
    """One row per vision layer, text layer and for the logits, errors adding up from layer to layer.

    Args:
        model: a model with kernels as its backend; runs with them and with plain PyTorch.
        exact_model: the same weights in a wider dtype with the reference backend.
        inputs: what the processor returned, on the model's device.
    """
    wide = exact_model.dtype
    exact = _layer_outputs(exact_model, {k: _cast(v, wide) for k, v in inputs.items()})
    actual = _layer_outputs(model, inputs)
    backend = model.backend
    model.backend = "reference"
    try:
        plain = _layer_outputs(model, inputs)
    finally:
        model.backend = backend
    rows = []
    for name in exact:
        row = Comparison(name, calls=1)
        row.add(actual[name], plain[name], exact[name].double())
        rows.append(row)
    return rows


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _layer_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every layer of a forward pass leaves in its stream, and the logits, by name."""
    outputs: dict[str, Tensor] = {}
    hooks = []
    if "pixel_values" in inputs:
        encoders = {"vision layer": model.model.vision_model.transformer.layers}
        encoders["vision global layer"] = model.model.vision_model.global_transformer.layers
        for kind, layers in encoders.items():
            for index, layer in enumerate(layers):

                def keep(_m: nn.Module, _i: Any, out: Any, name: str = f"{kind} {index}") -> None:
                    outputs[name] = out.detach()

                hooks.append(layer.register_forward_hook(keep))
    try:
        result = model(**inputs, use_cache=False, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [f"before text layer {i}" for i in range(1, len(result.hidden_states) - 1)]
    outputs.update(zip([*layers, "text norm"], result.hidden_states[1:]))
    outputs["logits"] = result.logits
    return outputs
