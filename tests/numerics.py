"""Comparison with float64, and what the op tests share."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mllama_kernels import _library, testing
from mllama_kernels.testing import assert_close_to_exact, to_double

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Under a sanitizer a kernel takes some hundred times as long.
REDUCED = os.environ.get("MLLAMA_TEST_REDUCED") == "1"


def grid(small: list[Any], more: list[Any]) -> list[Any]:
    """The cases of a test: all of them, or the first few where each costs much."""
    return small if REDUCED else small + more


def several_blocks() -> int:
    """A length of several blocks of the kernels at hand; those of a simulated device are smaller."""
    return 150 if REDUCED or _library.simulated else 600


def simulated_share(count: int) -> pytest.MarkDecorator:
    """`share` (pyproject.toml) of cases that take long on a simulated device, and no time anywhere else."""
    return pytest.mark.share(count if _library.simulated else 1)


def assert_no_worse(actual: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any) -> None:
    """As `testing.assert_no_worse`, of an op, whose results are contiguous."""
    assert all(t.is_contiguous() for t in ((actual,) if torch.is_tensor(actual) else actual))
    testing.assert_no_worse(actual, *args, **kwargs)


def compare(actual: Tensor, *args: Any, **kwargs: Any) -> None:
    """As `testing.assert_close_to_exact`, of an op's result, which is contiguous."""
    assert actual.is_contiguous()
    assert_close_to_exact(actual, *args, **kwargs)


def compare_sum(
    actual: Tensor, exact: Tensor, plain: Tensor, terms: Tensor, roundings: int
) -> None:
    """Holds a single number to float64 that is the sum of `terms`, each rounded so often to its dtype before,
    and eight times in float32.

    The terms may cancel: neither the sum's size nor plain PyTorch's error of the same sum, which may be luck,
    says what is right. Roundings are independent, each within half a unit in the last place: their sum has a
    standard deviation of sqrt(1 / 3) of that times the terms' 2-norm, and is within five of them but once in
    1.7 million. Three times plain PyTorch's error is allowed as ever.
    """
    unit, float32 = (torch.finfo(dtype).eps / 2 for dtype in (actual.dtype, torch.float32))
    deviation = math.sqrt((roundings * unit**2 + 8 * float32**2) / 3) * terms.norm().item()
    a, e, p = (t.double().item() for t in (actual, exact, plain))
    most = max(5 * deviation + unit * abs(e), 3 * abs(p - e))
    assert abs(a - e) <= most, f"the error is {abs(a - e):.2e}, allowed {most:.2e}"


def gradients(
    function: Callable[..., Any], args: tuple[Any, ...], grads: list[Tensor], **kwargs: Any
) -> Any:
    """Of the results' products with `grads`, for every floating argument, in order."""
    leaves = [a.detach().clone().requires_grad_() if _is_float(a) else a for a in args]
    named = {
        n: a.detach().clone().requires_grad_() if _is_float(a) else a for n, a in kwargs.items()
    }
    out = function(*leaves, **named)
    outs = [out] if torch.is_tensor(out) else list(out)
    torch.autograd.backward(outs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    return tuple(a.grad for a in (*leaves, *named.values()) if _is_float(a))


def _is_float(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def assert_gradients_no_worse(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    times: float = 2.0,
    largest: float | None = None,
    grads: list[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """The gradients of every floating argument, for `grads` or a random gradient of every result.

    Each is a product with something that the definition rounds: a normalised row, a probability.
    """
    if grads is None:
        with torch.no_grad():
            out = reference(*args, **kwargs)
        grads = [torch.randn_like(o) for o in ([out] if torch.is_tensor(out) else out)]
    actual = gradients(function, args, grads, **kwargs)
    plain = gradients(reference, args, grads, **kwargs)
    doubles = {n: to_double(v) for n, v in kwargs.items()}
    exact = gradients(reference, tuple(map(to_double, args)), grads, **doubles)
    assert len(actual) == len(exact) > 0
    for a, e, p in zip(actual, exact, plain):
        compare(a, e, p, times, largest, roundings=2)
    return actual


def assert_gradcheck(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Numerical derivatives in float64, which only the CPU kernels take; then, no second derivative."""
    if not takes_float64():
        return
    doubles = tuple(to_double(a).requires_grad_() if _is_float(a) else a for a in args)
    torch.autograd.gradcheck(lambda *a: function(*a, **kwargs), doubles)
    out = function(*doubles, **kwargs)
    out = out if torch.is_tensor(out) else out[0]
    leaf = next(a for a in doubles if _is_float(a))
    (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grad.sum().backward()


def takes_float64() -> bool:
    return not _library.simulated


def assert_same_bits_on_any_threads(function: Callable[[], tuple[Tensor, ...]]) -> None:
    """One thread and more than there is work for: the kernels may share it out differently."""
    if _library.simulated:  # the host's threads do nothing for a kernel on a device
        assert all(a.equal(b) for a, b in zip(function(), function(), strict=True))
        return
    count = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(count)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def assert_trains_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """torch.compile(fullgraph=True), activation checkpointing and deterministic mode give eager's bits."""
    torch.compiler.reset()
    with torch.no_grad():
        out = function(*args, **kwargs)
    grads = [torch.randn_like(o) for o in ([out] if torch.is_tensor(out) else out)]
    eager = gradients(function, args, grads, **kwargs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    checkpointed = functools.partial(checkpoint, function, use_reentrant=False)
    for variant in (compiled, checkpointed, function):
        torch.use_deterministic_algorithms(variant is function)
        try:
            actual = gradients(variant, args, grads, **kwargs)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(a.equal(e) for a, e in zip(actual, eager, strict=True))


def randn(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(device=device, dtype=dtype)


def strided(t: Tensor, extra: int = 8) -> Tensor:
    """The same values as a view cut out of a tensor that is `extra` wider in the last dimension."""
    wide = torch.full(
        (*t.shape[:-1], t.shape[-1] + extra), float("nan"), dtype=t.dtype, device=t.device
    )
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def opcheck(name: str, args: tuple[Any, ...]) -> None:
    """torch's own checks of schema, fake implementation, autograd registration and tracing."""
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(getattr(torch.ops.mllama_kernels, name).default, args, test_utils=tests)


def assert_compiles(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """torch.compile(fullgraph=True) gives the bits that eager gives."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    eager = function(*args, **kwargs)
    for c, e in zip(*((r,) if torch.is_tensor(r) else r for r in (compiled, eager))):
        assert torch.equal(c, e)


def chi_square_limit(degrees: int) -> float:
    """The chi-square quantile at one false alarm in ten million (Wilson, Hilferty 1931)."""
    z = 5.2
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Statistic and limit, with cells of fewer than ten expected draws pooled."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 10
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0, "drew a token of probability zero"
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    return statistic, chi_square_limit(max(int(keep.sum()) - 1, 1))
