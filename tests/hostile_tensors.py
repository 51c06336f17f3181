"""Calls of every op below autograd, forward and backward, and what is done to one argument at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from op_calls import arguments_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mllama_kernels
from mllama_kernels import _library

Args = list[Any]


class _Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of every op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Args] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "mllama_kernels":
            self.calls[func._schema.name.partition("::")[2]] = [_copy(a) for a in args]
        return func(*args, **(kwargs or {}))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def recorded_calls() -> dict[str, Args]:
    """One call of every op, and of every backward."""
    recorder = _Recorder()
    for name in _library.OPS:
        arguments = arguments_of(name)
        if name != "skinny_linear" and name != "sample" and not name.endswith("cached"):
            for key, value in arguments.items():
                no_gradient = name == "rotary_attention" and key in ("cos", "sin")
                if isinstance(value, Tensor) and value.is_floating_point() and not no_gradient:
                    value.requires_grad_()
        with recorder:
            out = getattr(mllama_kernels, name)(**arguments)
            if (
                name == "linear_cross_entropy"
            ):  # once more, for a weight that is made a chunk at a time
                chunked = [*recorder.calls[name][:8], False, 4096]
                out = torch.ops.mllama_kernels.linear_cross_entropy(
                    *(a.requires_grad_() if i < 2 else a for i, a in enumerate(chunked))
                )[0].sum()
            outs = out if isinstance(out, tuple) else (out,)
            if any(o.requires_grad for o in outs):
                sum(o.float().sum() for o in outs).backward()
    return recorder.calls


def parameters(name: str) -> list[str]:
    """The names of an op's arguments."""
    schema = getattr(torch.ops.mllama_kernels, name).default._schema
    return [argument.name for argument in schema.arguments]


def call(name: str, args: Args) -> tuple[Any, Args]:
    """What an op makes of copies of the tensors, and those it may have written."""
    out = getattr(torch.ops.mllama_kernels, name)(*args)
    return out, [a for a in args if isinstance(a, Tensor)]


# ---------------------------------------------------------------- what is done to a tensor


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def expanded(t: Tensor) -> Tensor:
    """The first of each element of the last dimension, at stride 0."""
    return t[..., :1].expand(t.shape) if t.dim() else t


def rows_expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape) if t.dim() else t


def strided(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t


def offset(t: Tensor) -> Tensor:
    return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)


def unit_stride_of_ones(t: Tensor) -> Tensor:
    strides = [2**40 if n == 1 else s for n, s in zip(t.shape, t.stride())]
    return t.as_strided(t.shape, strides)


def bytes_of_bool(t: Tensor) -> Tensor:
    return torch.full(t.shape, 255, dtype=torch.uint8).view(torch.bool)


def _bytes(t: Tensor) -> torch.dtype:
    """uint8, or another dtype for what is of bytes."""
    return torch.int16 if t.dtype == torch.uint8 else torch.uint8


# To be refused by an error that names the argument.
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "shrunk": shrunk,
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "bytes of a bool": lambda t: bytes_of_bool(t) if t.dtype == torch.bool else t.to(_bytes(t)),
}
# Another shape or dtype: an error that names an argument, or a result where the op takes it.
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "0-d": lambda t: t.flatten()[0],
    "1-d": lambda t: t.flatten(),
    "one more dimension": lambda t: t.unsqueeze(0),
    "no elements": lambda t: t.flatten()[:0],
    "no rows": lambda t: t[:0] if t.dim() else t,
    "no columns": lambda t: t[..., :0] if t.dim() else t,
    "one element more": lambda t: torch.cat((t.flatten(), t.flatten()[:1])),
    "first dimension cut": lambda t: t[1:] if t.dim() else t.expand(2),
    "last dimension cut": lambda t: t[..., 1:] if t.dim() else t.expand(2),
    "doubled": lambda t: torch.cat((t, t)) if t.dim() else t.expand(2),
    "expanded without end": lambda t: t.flatten()[:1].expand(2**62),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.long(),
}
# Nothing that has strides on the CPU: torch refuses it before the op does.
UNFIT: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: (t if t.dim() > 1 else t.reshape(1, -1)).flatten(1).to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:-1]]),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "no tensor": lambda t: "a tensor",
}
# The same values in other memory: the same result, or an error that names the argument.
ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": expanded,
    "rows expanded": rows_expanded,
    "strided": strided,
    "transposed": transposed,
    "offset": offset,
    "strides of ones": unit_stride_of_ones,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.nan_to_num() if a.is_floating_point() else a,
        b.nan_to_num() if b.is_floating_point() else b,
    )


def _flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _refuse(name: str, args: Args, *expected: str) -> bool:
    """Whether an op raises; that its own error names one of the arguments, or of those expected."""
    try:
        call(name, args)
    except Exception as error:
        text = str(error)
        if text.startswith("mllama_kernels."):
            assert len(text) < 500, "an error of great length"
        elif not expected:
            return True  # torch's own, of whatever it says
        names = "|".join(expected or (*parameters(name), "head_dim", "heads", "one device"))
        assert re.search(rf"\b({names})\b", text), f"none of {names} is in: {text[:300]}"
        return True
    return False


def try_tensor(calls: dict[str, Args], name: str, place: int) -> None:
    """All that is done to one tensor of a call; prints what it is at, for a crash to tell."""
    argument, args = parameters(name)[place], calls[name]
    others = sum(isinstance(a, Tensor) for a in args) - 1

    def given(change: Callable[[Tensor], Any]) -> Args:
        copies = [_copy(a) for a in args]
        copies[place] = change(copies[place])
        return copies

    for what, spoil in REFUSED.items():
        print(what, flush=True)
        assert _refuse(name, given(spoil), argument), f"{argument}: {what} was taken"
    for what, spoil in OTHER.items():
        print(what, flush=True)
        _refuse(name, given(spoil))
    for what, spoil in UNFIT.items():
        print(what, flush=True)
        try:
            spoiled = given(spoil)
        except (RuntimeError, NotImplementedError):
            continue  # torch has no such tensor
        alone = what == "meta" and others == 0
        assert alone or _refuse(name, spoiled), f"{argument}: {what} was taken"
    for what, change in ALIKE.items():
        if what in ("negated", "zero tensor") and argument.endswith("_cache"):
            continue  # torch's own fallbacks fail for what is written
        print(what, flush=True)
        plain = given(lambda t, change=change: _plain(change(t)))
        if _refuse(name, plain):
            continue  # values that do not fit, such as bounds of one number
        plain = given(lambda t, change=change: _plain(change(t)))
        expected, kept = call(name, plain)
        changed = given(change)
        if _refuse(name, changed, argument):
            continue
        changed = given(change)
        found, written = call(name, changed)
        pairs = [*zip(_flat(found), _flat(expected)), *zip(written, kept)]
        assert all(_same(a, b) for a, b in pairs), f"{argument}: another result when {what}"


def _plain(t: Tensor) -> Tensor:
    """The values in memory of their own."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)


WHOLE = (-(2**63), -(2**31) - 1, -1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
REAL = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 5e-324, 1e-46, 1e308)


def try_number(calls: dict[str, Args], name: str, place: int) -> None:
    """All that is given for one number of a call: an error that names it, or a result."""
    argument, args = parameters(name)[place], calls[name]
    for value in WHOLE if isinstance(args[place], int) else REAL:
        print(value, flush=True)
        given = [_copy(a) for a in args]
        given[place] = value
        if _refuse(name, given):
            continue
        assert argument != "eps" or 0 <= value < float("inf"), f"eps of {value} was taken"
        if argument == "max_seqlen":
            assert value >= 0, f"max_seqlen of {value} was taken"
            out, same = (call(name, [_copy(a) for a in x])[0] for x in (given, args))
            pairs = zip(_flat(out), _flat(same), strict=True)
            assert all(_same(a, b) for a, b in pairs), f"another result for {value}"
