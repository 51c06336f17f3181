"""The public functions take what their docstrings say in every build and backend, and one function answers
whether a kernel runs."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from op_calls import arguments_of
from torch.utils._python_dispatch import TorchDispatchMode

import mllama_kernels
from mllama_kernels import _dispatch, _library, reference

REASON = "the library was built without this device"
NO_TENSORS = {
    "list": [1.0, 2.0],
    "tuple": (1.0,),
    "float": 1.5,
    "bool": True,
    "str": "x",
    "ndarray": np.ones(3),
}


EXPECTED = {
    "Tensor": "a tensor",
    "Tensor | None": "a tensor or None",
    "QuantizedTensor": "a QuantizedTensor",
}


class Kernels(TorchDispatchMode):
    """Within it, the names of the kernels that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mllama_kernels":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def set_build(monkeypatch, kind: str) -> None:
    """Pretend another build or setting; "as built" leaves everything as it is."""
    if kind == "reference":
        monkeypatch.setattr(_dispatch, "BACKEND", "reference")
    elif kind == "disabled":
        monkeypatch.setattr(_dispatch, "DISABLED", frozenset(_library.OPS))
    elif kind == "no library":
        monkeypatch.setattr(_library, "missing", REASON)
    elif kind == "no such device":
        monkeypatch.setattr(_library, "unavailable", lambda kind: REASON)
    elif kind == "nvcc":
        monkeypatch.setattr(_library, "has_cuda", True)


BUILDS = ("as built", "nvcc", "reference", "disabled", "no library", "no such device")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    if request.param in ("as built", "nvcc") and _library.missing:
        pytest.fail(_library.missing)
    set_build(monkeypatch, request.param)
    return request.param


def values(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", _library.OPS)
def test_every_argument_binds_by_keyword_and_by_position(name, build):
    op, arguments = getattr(mllama_kernels, name), arguments_of(name)
    parameters = inspect.signature(op).parameters
    assert list(parameters) == list(arguments), "the call has every argument"
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [t.clone() for t in values(op(**arguments_of_again(arguments)))]
    for count in range(len(positional) + 1):
        given = arguments_of_again(arguments)
        args = [given.pop(n) for n in positional[:count]]
        for result, want in zip(values(op(*args, **given)), expected, strict=True):
            assert result.equal(want)


def arguments_of_again(arguments):
    return {n: v.clone() if torch.is_tensor(v) else v for n, v in arguments.items()}


@pytest.mark.parametrize("name", _library.OPS)
def test_the_docstring_names_every_argument_and_no_other(name):
    op = getattr(mllama_kernels, name)
    section = op.__doc__.split("Args:\n")[1].split("\n    Returns:")[0]
    named = re.findall(r"^        (\w+(?:, \w+)*):", section, flags=re.MULTILINE)
    assert [n for group in named for n in group.split(", ")] == list(
        inspect.signature(op).parameters
    )


@pytest.mark.parametrize("name", _library.OPS)
@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["public", "plain"])
def test_what_is_no_tensor_is_named(name, module, build):
    op, arguments = getattr(module, name), arguments_of(name)
    for wrong, parameter in inspect.signature(op).parameters.items():
        if "Tensor" not in parameter.annotation:
            continue
        expected = EXPECTED[parameter.annotation]
        optional = parameter.annotation == "Tensor | None"
        for value in [*NO_TENSORS.values(), *[None] * (not optional)]:
            given = "None" if value is None else f"a {type(value).__name__}"
            message = f"^mllama_kernels.{name}: {wrong} must be {expected}, got {given}$"
            with pytest.raises(TypeError, match=message):
                op(**{**arguments, wrong: value})
            positional = list({**arguments, wrong: value}.items())
            keyword = [
                n for n, p in inspect.signature(op).parameters.items() if p.kind is p.KEYWORD_ONLY
            ]
            with pytest.raises(TypeError, match=message):
                op(
                    *[v for n, v in positional if n not in keyword],
                    **{n: v for n, v in positional if n in keyword},
                )


@pytest.mark.parametrize("name", _library.OPS)
def test_a_missing_or_unknown_argument_is_named(name, build):
    op, arguments = getattr(mllama_kernels, name), arguments_of(name)
    lead, *_ = arguments
    with pytest.raises(TypeError, match=rf"{name}.*missing.*'{lead}'"):
        op(**{n: v for n, v in arguments.items() if n != lead})
    with pytest.raises(TypeError, match=rf"{name}.*'wings'"):
        op(**arguments, wings=2)


def test_a_fake_is_given_tensors() -> None:
    """torch takes None for a tensor that is no option, and on meta nobody else looks."""
    with pytest.raises(TypeError, match="swiglu_backward: gate_up must be a tensor, got None"):
        torch.ops.mllama_kernels.swiglu_backward(torch.empty(3, device="meta"), None)


@pytest.mark.parametrize("name", _library.OPS)
def test_one_meta_tensor_among_others_gives_no_values(name):
    tensors = {n: value for n, value in arguments_of(name).items() if torch.is_tensor(value)}
    if len(tensors) == 1:
        pytest.skip("it takes one tensor")
    for argument, value in tensors.items():
        with pytest.raises(RuntimeError, match="must be on one device, got cpu, meta"):
            getattr(mllama_kernels, name)(**arguments_of(name) | {argument: value.to("meta")})


@pytest.mark.parametrize("name", _library.OPS)
def test_an_error_of_the_op_itself_stays_as_it_is(name):
    arguments = arguments_of(name)
    lead, *_ = arguments
    with pytest.raises(RuntimeError, match=f"mllama_kernels.{name}: "):
        getattr(mllama_kernels, name)(**{**arguments, lead: arguments[lead].to(torch.complex64)})


@pytest.mark.parametrize("name", _library.OPS)
def test_a_kernel_runs_exactly_where_nothing_speaks_against_it(name, build):
    with Kernels() as ran:
        getattr(mllama_kernels, name)(**arguments_of(name))
    assert (name in ran.names) == (_dispatch.why_not(name, "cpu") is None)
    assert (name in ran.names) == (build in ("as built", "nvcc"))


@pytest.mark.parametrize("name", _library.OPS)
@pytest.mark.parametrize("kind", ["as built", "reference"])
def test_ops_compile_by_keyword_without_a_graph_break(name, kind, monkeypatch):
    if kind == "reference" and name.startswith(("rotary", "cross")):
        pytest.skip("in plain PyTorch it reads lengths on the host")
    set_build(monkeypatch, kind)
    torch._dynamo.reset()
    op, arguments = getattr(mllama_kernels, name), arguments_of(name)
    compiled = torch.compile(lambda given: op(**given), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(arguments_of_again(arguments))
        for a, b in zip(values(got), values(op(**arguments)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("setting", "value", "device", "reason"),
    [
        ("BACKEND", "reference", "cpu", "MLLAMA_KERNELS_BACKEND=reference asks for plain PyTorch"),
        ("DISABLED", frozenset(["swiglu"]), "cpu", "MLLAMA_KERNELS_DISABLE=swiglu asks for plain"),
        ("missing", "it is not there", "cpu", "it is not there"),
        ("missing", "it is not there", "meta", "it is not there"),
        ("has_cuda", False, "cuda", "built without CUDA; reinstall with nvcc"),
        ("has_cuda", False, "cuda:1", "built without CUDA; reinstall with nvcc"),
        ("simulated", True, "cuda", "runs the CUDA kernels on CPU tensors"),
        ("missing", None, "xpu", "there are kernels for CPU and CUDA, none for xpu"),
    ],
)
def test_why_not(monkeypatch, setting, value, device, reason):
    monkeypatch.setattr(_library, "missing", None)
    monkeypatch.setattr(_library, "simulated", False)
    monkeypatch.setattr(_dispatch if setting.isupper() else _library, setting, value)
    why = _dispatch.why_not("swiglu", torch.device(device))
    assert reason in why and why == _dispatch.plain_ops(device)["swiglu"]
    others = set(_dispatch.plain_ops(device)) - {"swiglu"}
    assert not others if setting == "DISABLED" else len(others) == len(_library.OPS) - 1


def test_nothing_speaks_against_the_kernels_here(device):
    assert _dispatch.plain_ops(device) == {}
    assert _dispatch.plain_ops("meta") == {}


def test_kernels_backend_raises_but_for_disabled_ops(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "kernels")
    monkeypatch.setattr(_dispatch, "DISABLED", frozenset(["swiglu"]))
    monkeypatch.setattr(_library, "unavailable", lambda kind: REASON)
    assert mllama_kernels.swiglu(torch.ones(1, 2)).shape == (1, 1)
    with pytest.raises(RuntimeError, match=f"mllama_kernels.rms_norm cannot run: {REASON}"):
        mllama_kernels.rms_norm(torch.ones(1, 2), torch.ones(2))
