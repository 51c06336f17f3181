"""What must hold of a call that returned: nothing else was written, and the values are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from fuzz_calls import Call
from fuzz_layouts import compact, is_plain
from numerics import compare
from torch import Tensor

from mllama_kernels import reference
from mllama_kernels.testing import to_double

CACHES = ("k_cache", "v_cache")
# Looser than the tests of each op: among millions of small calls the luckiest plain PyTorch is very good.
# What this looks for are wrong elements.
TIMES, ROUNDINGS = 16.0, 12
NOTHING = 1e-7  # what is left of terms that cancel


class Finding(Exception):
    """A call did what no call may do."""


class Memory:
    """The storages of a call's tensors, as they were before it."""

    def __init__(self, call: Call) -> None:
        self._tensors = {name: t for name, t in call.items() if is_plain(t)}
        self._bytes = {name: _bytes(t).clone() for name, t in self._tensors.items()}

    def check_unchanged(self, but: Iterable[str] = ()) -> None:
        """Of the tensors in `but` only the elements may have changed, not what lies around them."""
        for name, t in self._tensors.items():
            before, now = self._bytes[name], _bytes(t)
            if name in but:
                begin = t.storage_offset() * t.element_size()
                end = begin + t.numel() * t.element_size()
                same = torch.equal(before[:begin], now[:begin])
                same = same and torch.equal(before[end:], now[end:])
            else:
                same = torch.equal(before, now)
            if not same:
                raise Finding(f"wrote to {name}")

    def before(self, call: Call) -> Call:
        """The call with contiguous copies of its tensors, the caches as they were."""
        call = dict(call)
        for name in CACHES:
            if name in self._tensors:
                t = self._tensors[name]
                storage = self._bytes[name].view(t.dtype)
                call[name] = storage.as_strided(t.shape, t.stride(), t.storage_offset())
        return {name: compact(value) for name, value in call.items()}


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def check_caches(call: Call, before: Call, exact: Call, plain: Call) -> None:
    """Written where the reference writes, with its values, and nowhere else."""
    for name in CACHES:
        if name in call:
            kept = exact[name] == to_double(before[name])
            if not torch.equal(call[name][kept], before[name][kept]):
                raise Finding(f"{name} changed where nothing belongs")
            _compare(name, call[name], exact[name], plain[name])


def _compare(what: str, actual: Tensor, exact: Tensor, plain: Tensor, largest: float = 0.0) -> None:
    """`largest` of the elements of all results: what a sum cancels to is no better than its terms."""
    if actual.dtype == torch.float64:  # as good as the reference
        return _equal(what, actual, exact, 1e-9, largest)
    try:
        compare(actual, exact, plain, TIMES, TIMES, ROUNDINGS)
    except AssertionError as error:
        same = actual.shape == exact.shape and torch.equal(actual.isfinite(), exact.isfinite())
        finite = exact.isfinite()
        worst = (
            (actual.double() - exact)[finite].abs().max().item() if same and finite.any() else 0.0
        )
        if not same or worst > ROUNDINGS * torch.finfo(actual.dtype).eps * largest + NOTHING:
            raise Finding(f"{what}: {error}") from None


def check_against_reference(
    op: str,
    call: Call,
    memory: Memory,
    outs: tuple[Tensor, ...],
    gradients: Callable[..., tuple[Tensor, ...]] | None,
) -> bool:
    """Results, and gradients where there are, against float64 and plain PyTorch in the same dtype.
    False: the reference does not take the call."""
    function = getattr(reference, op)
    before, plain_call = memory.before(call), memory.before(call)
    exact_call = {name: to_double(value) for name, value in memory.before(call).items()}
    if op == "sample":
        expected = function(**plain_call)
        for actual, want in zip(outs, expected, strict=True):
            if not torch.allclose(
                actual.double(), want.double(), rtol=1e-6, atol=0, equal_nan=True
            ):
                raise Finding(f"chooses {actual.tolist()}, the reference {want.tolist()}")
        return True

    def results(arguments: Call) -> tuple[Tensor, ...]:
        if gradients is not None:
            return gradients(arguments, function)
        with torch.no_grad():
            out = function(**arguments)
        return (out,) if isinstance(out, Tensor) else out

    try:
        exact, plain = results(exact_call), results(plain_call)
    except (RuntimeError, ZeroDivisionError):
        return False  # plain PyTorch has no words for some calls of no elements
    if len(outs) != len(exact):
        raise Finding(f"{len(outs)} results and gradients, the reference has {len(exact)}")
    finite = [e.detach()[e.isfinite()].abs() for e in exact]
    largest = max((e.max().item() for e in finite if e.numel()), default=0.0)
    for place, (a, e, p) in enumerate(zip(outs, exact, plain)):
        _compare(f"result {place}", a.detach(), e.detach(), p.detach(), largest)
    check_caches(call, before, exact_call, plain_call)
    return True


def check_against_compact(
    call: Call,
    memory: Memory,
    outs: tuple[Tensor, ...],
    execute: Callable[[Call], tuple[Tensor, ...]],
    mutated: bool,
) -> str:
    """The same call on contiguous tensors gives the same. Says whether there was anything to compare."""
    if not all(is_plain(value) for value in call.values() if isinstance(value, Tensor)):
        return "ran"
    if mutated and CACHES[0] in call:  # two sequences may now write the same place
        return "ran"
    other = memory.before(call)
    try:
        expected = execute(other)
    except Exception as error:
        raise Finding(f"runs, but not on contiguous tensors: {error}") from error
    floats = [t for t in (*call.values(), *outs) if is_plain(t) and t.is_floating_point()]
    share = 32 * max((torch.finfo(t.dtype).eps for t in floats), default=0.0)
    least = _loss_terms(call) if "sums" in call else 0.0
    for place, (a, e) in enumerate(zip(outs, expected, strict=True)):
        _equal(f"result {place}", a, e, share if a.is_floating_point() else 0, least)
    for name in CACHES:
        if name in call:
            _equal(name, call[name], other[name], share)
    return "compared"


def _loss_terms(call: Call) -> float:
    """The size of what the gradients of `linear_cross_entropy` are sums of: `(p - 1) * weight`, where p has
    the rounding of the logit. With few classes it cancels, and the library multiplies in an order that
    depends on the layout."""
    x, weight, grad = (call[name].detach().double().abs() for name in ("x", "weight", "grad_loss"))
    if not (x.numel() and weight.numel() and grad.numel()):
        return 0.0
    logit = max(1.0, (x @ weight.T).max().item())
    return logit * grad.max().item() * max(x.max().item(), weight.max().item())


def _equal(what: str, actual: Tensor, expected: Tensor, share: float, least: float = 0.0) -> None:
    """Equal but for a share of the largest element, or of `least` if that is more."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Finding(
            f"{what} is {tuple(actual.shape)} {actual.dtype}, "
            f"expected {tuple(expected.shape)} {expected.dtype}"
        )
    if actual.equal(expected):
        return
    a, e = actual.detach().double(), expected.detach().double()
    if not torch.equal(a.isfinite(), e.isfinite()):
        raise Finding(f"{what} is not finite in other places than expected")
    keep = e.isfinite()
    if not keep.any():
        return
    difference, largest = (a - e)[keep].abs().max().item(), e[keep].abs().max().item()
    if difference > share * max(largest, least) + (NOTHING if share else 0):
        raise Finding(f"{what} differs by {difference:.2e}, where the largest is {largest:.2e}")
