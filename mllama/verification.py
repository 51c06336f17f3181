"""The self-check: kernels against plain PyTorch, op by op and layer by layer, on a real model.

Every op call of one forward pass, and calls of what chooses tokens and what makes the loss, are computed
three times on the very same inputs: by the kernel, by plain PyTorch in the model's dtype, and by plain
PyTorch in float64. An op passes if its error against float64 is at most twice plain PyTorch's, or half a
unit in the last place, in the maximum and in the 2-norm; integers and what is not finite are to be equal.
What an op writes into its arguments counts as its result. A check passes by what it has compared, never
by what it has not: without a kernel that ran, or with nothing to compare, it fails.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mllama.backend import Ops
from mllama.loss import IGNORED
from mllama.wording import reason
from mllama_kernels import _dispatch, _library, reference
from mllama_kernels.quantized_tensor import QuantizedTensor
from mllama_kernels.reference_sampling import MAX_LIKELIEST
from mllama_kernels.testing import Errors, allowed

ALLOWED_RATIO = 2.0
# Arguments that an op writes to: each computation gets its own copy.
_WRITTEN = {"rotary_attention_cached": ("k_cache", "v_cache")}
# Calls of `sample`, the same options for every row: greedy, and through every filter.
_SAMPLING: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"num_likeliest": MAX_LIKELIEST},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
)


@dataclass
class Comparison:
    """One thing (an op over all its calls, or a layer) against the exact result.

    `errors` are gathered over the calls; `compared` are the elements, whole numbers and truth values too.
    """

    name: str
    calls: int = 0
    compared: int = 0
    errors: Errors = field(default_factory=Errors)
    problems: list[str] = field(default_factory=list)

    def add(self, actual: Any, plain: Tensor, exact: Tensor, roundings: int = 1) -> None:
        """Takes in one result of the kernel, of plain PyTorch and of float64."""
        problem = _shape_or_dtype(actual, plain) or _not_finite(actual, exact)
        if problem:
            self.problems.append(problem)
            return
        self.compared += exact.numel()
        if not exact.is_floating_point():
            if wrong := int((actual != exact).sum()):
                self.problems.append(f"{wrong} of {exact.numel()} elements differ")
            return
        self.errors.add(actual, plain, exact, roundings)

    @property
    def ratio(self) -> float:
        """The worse quotient of the two norms of the error and of plain PyTorch's, which counts as half of
        what is always allowed at least."""
        limit = allowed(self.errors.plain, self.errors.floor(), ALLOWED_RATIO)
        return ALLOWED_RATIO * self.errors.ratio(limit)

    @property
    def passed(self) -> bool:
        """Whether something was compared, and all of it was right."""
        return self.compared > 0 and not self.problems and self.ratio <= ALLOWED_RATIO

    @property
    def verdict(self) -> str:
        if self.passed:
            return "ok"
        faults = list(dict.fromkeys(self.problems))  # the same in many calls is one
        if not faults:
            faults = ["error too large" if self.compared else "nothing was compared"]
        return "FAILED " + "; ".join(faults[:2])

    def to_json(self) -> dict[str, Any]:
        """The row as `mllama verify --json` prints it; errors are the largest absolute ones."""
        return {
            "name": self.name,
            "calls": self.calls,
            "error": self.errors.error.largest,
            "plain_error": self.errors.plain.largest,
            "ratio": self.ratio,
            "problems": self.problems,
            "passed": self.passed,
        }


def _shape_or_dtype(actual: Any, plain: Tensor) -> str | None:
    if not isinstance(actual, Tensor):
        return f"a {type(actual).__name__}, expected a tensor"
    if actual.shape != plain.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(plain.shape)}"
    if actual.dtype != plain.dtype:
        return f"{actual.dtype}, expected {plain.dtype}"
    return None


def _not_finite(actual: Tensor, exact: Tensor) -> str | None:
    """What is wrong with elements that are not finite. NaN tells nothing, not even next to NaN."""
    if not exact.is_floating_point():
        return None
    if exact.isnan().any():
        return "NaN in the exact result: there is nothing to compare with"
    ideal = exact.to(actual.dtype)
    infinite = ideal.isinf()
    if not torch.equal(actual.isfinite(), ~infinite) or not torch.equal(
        actual[infinite], ideal[infinite]
    ):
        return "elements that should be finite are not, or the reverse"
    if exact.numel() and infinite.all():
        return "no element of the exact result is finite: there is nothing to compare with"
    return None


class _Kernels(TorchDispatchMode):
    """Within it, the names of the kernels that run: what a function says of itself does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "mllama_kernels":
            self.ran.add(func._schema.name.removeprefix("mllama_kernels::"))
        return func(*args, **(kwargs or {}))


class _CheckedOps:
    """Stands where the op functions are and compares each call; gives back what the kernel gave, or what
    plain PyTorch gave where a model could not continue with that."""

    def __init__(self, kernels: Any, table: dict[str, Comparison]) -> None:
        self._kernels, self._table = kernels, table

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, name)

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        row = self._table.setdefault(name, Comparison(name))
        row.calls += 1
        function = getattr(reference, name)
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        before = _copies(name, given)
        plain_written, exact_written = _copies(name, given), _copies(name, given)
        # First, so that whatever the kernel does to its arguments, these two do not see it.
        plain = _as_tuple(function(**{**given, **plain_written}))
        wide = {n: _double(value) for n, value in {**given, **exact_written}.items()}
        exact = _as_tuple(function(**wide))
        try:
            with _Kernels() as kernels:
                result = getattr(self._kernels, name)(*args, **kwargs)
        except Exception as error:
            row.problems.append(f"raised {type(error).__name__}: {reason(error)}")
            result = None
        else:
            if name not in kernels.ran:
                row.problems.append(f"did not run as a kernel{_reason(name, given)}")
            fits = _take(row, result, plain, exact, _roundings(given))
            for argument in before:
                _take_written(row, *(t[argument] for t in (before, given, plain_written, wide)))
            for argument in set(given) - set(before):
                if not _is_kept(given[argument], wide[argument]):
                    row.problems.append(f"wrote to its argument {argument}")
                    given[argument].copy_(wide[argument])
            if fits:
                return result
        for argument, values in plain_written.items():
            given[argument].copy_(values)
        return plain if len(plain) > 1 else plain[0]


def _is_kept(value: Any, before: Any) -> bool:
    """Whether an argument still is what its wide copy was made of."""
    if not torch.is_tensor(value):
        return True
    return bool(((value == before) | (value.isnan() & before.isnan())).all())


def _reason(name: str, given: dict[str, Any]) -> str:
    lead = next(value for value in given.values() if isinstance(value, Tensor))
    why = _dispatch.why_not(name, lead.device)
    return "" if why is None else f": {why}"


def _roundings(given: dict[str, Any]) -> int:
    """To the dtype, in what an op does one after another: those of a norm before a product, of SwiGLU, which
    multiplies two columns, and of a sum behind."""
    has = {name for name, value in given.items() if value is not None and value is not False}
    return 1 + ("norm_weight" in has) + 2 * ("swiglu" in has) + ("residual" in has)


def _take(
    row: Comparison,
    result: Any,
    plain: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    roundings: int,
) -> bool:
    """Compares the results of one call. Whether the model can continue with them: NaN would be every later
    op's fault."""
    actual = _as_tuple(result)
    if len(actual) != len(plain):
        row.problems.append(f"{len(actual)} results, expected {len(plain)}")
        return False
    for a, p, e in zip(actual, plain, exact, strict=True):
        row.add(a, p, e, roundings)
    return not any(
        _shape_or_dtype(a, p) or _not_finite(a, e)
        for a, p, e in zip(actual, plain, exact, strict=True)
    )


def _take_written(
    row: Comparison, before: Tensor, actual: Tensor, plain: Tensor, exact: Tensor
) -> None:
    """Compares an argument where any of the three has written to it."""
    was_nan = before.isnan()
    written = torch.zeros_like(was_nan)
    for after in (actual, plain, exact):
        written |= (after != before.to(after.dtype)) & ~(was_nan & after.isnan())
    row.add(actual[written], plain[written], exact[written])


def _copies(name: str, given: dict[str, Any]) -> dict[str, Tensor]:
    return {argument: given[argument].clone() for argument in _WRITTEN.get(name, ())}


def _double(value: Any) -> Any:
    """A copy in float64; of whole numbers one in their own dtype."""
    if not torch.is_tensor(value):
        return value
    return value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@contextmanager
def _checked(ops: Ops) -> Iterator[dict[str, Comparison]]:
    """Within it, every op the model calls is compared; the table fills as the model runs."""
    table: dict[str, Comparison] = {}
    with ops.replaced(lambda module: _CheckedOps(module, table)):
        yield table


@torch.no_grad()
def compare_ops(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Comparison]:
    """One row per op, over every call of a prefill and of one decode step, of the choice of a token and of
    the loss.

    Args:
        model: a model that is not on the reference backend.
        inputs: what the processor returned, on the model's device.
    Returns:
        the rows; if the model did not come through, the last one is "model" with the reason.
    """
    with _checked(model.ops) as table:
        try:
            prefill = model(**inputs, use_cache=True)
            token = prefill.logits[:, -1:].argmax(-1)
            model(input_ids=token, past_key_values=prefill.past_key_values)
            whole = model(**inputs, use_cache=False, output_hidden_states=True)
            _sample(model.ops, prefill.logits[:, -1], inputs["input_ids"])
            _loss(model, whole.hidden_states[-1], inputs["input_ids"])
        except Exception as error:
            table["model"] = failure("model", error)
    return [row for row in table.values() if row.compared or row.problems]


def not_compared(rows: list[Comparison]) -> list[str]:
    """The kernels that no row is about: those that the model did not call, and those of training."""
    backward = [f"{op}_backward" for op in _library.OPS]
    kernels = [*_library.OPS, *(b for b in backward if hasattr(torch.ops.mllama_kernels, b))]
    names = {row.name for row in rows}
    return [kernel for kernel in kernels if kernel not in names]


def _sample(ops: Ops, logits: Tensor, input_ids: Tensor) -> None:
    """As generation calls it, with the prompt as what was seen."""
    batch, vocab = logits.shape
    seeds = torch.arange(batch, device=logits.device)
    seen = torch.zeros(batch, vocab + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter_(1, input_ids.clamp_max(vocab), True)[:, :-1].contiguous()
    for step, options in enumerate(_SAMPLING):
        columns = {
            name: seeds.new_full(
                (batch,), value, dtype=torch.int64 if isinstance(value, int) else torch.float64
            )
            for name, value in options.items()
        }
        if "repetition_penalty" in options:
            columns["seen"] = seen
        ops.sample(logits.contiguous(), seeds, torch.full_like(seeds, step), **columns)


def _loss(model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
    """The loss of every row, which says more than their mean."""
    weight = model.get_output_embeddings().weight
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize(hidden.dtype)
    labels = input_ids.where(input_ids < weight.shape[0], IGNORED)
    model.ops.linear_cross_entropy(hidden, weight, labels, reduction="none")


def failure(name: str, error: Exception) -> Comparison:
    """A row of what could not be compared at all."""
    return Comparison(name, problems=[f"raised {type(error).__name__}: {reason(error)}"])


@torch.no_grad()
def compare_layers(
    model: nn.Module, exact_model: nn.Module, inputs: Mapping[str, Tensor]
) -> list[Comparison]:
    """One row per vision layer, text layer and for the logits, errors adding up from layer to layer.

    Args:
        model: a model that is not on the reference backend; runs as it is and with plain PyTorch.
        exact_model: the same weights in a wider dtype with the reference backend.
        inputs: what the processor returned, on the model's device.
    """
    wide = exact_model.dtype
    exact = _layer_outputs(exact_model, {k: _cast(v, wide) for k, v in inputs.items()})
    try:
        actual = _layer_outputs(model, inputs)
    except Exception as error:
        return [failure("model", error)]
    with model.ops.replaced(lambda _: reference):
        plain = _layer_outputs(model, inputs)
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
    outputs.update(zip([*layers, "text norm"], result.hidden_states[1:], strict=True))
    outputs["logits"] = result.logits
    return outputs
