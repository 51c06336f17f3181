"""What a model says it runs on is what it runs on, wherever it is loaded, built or moved to."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from test_dispatch import REASON, Kernels, set_build

import mllama_kernels
from mllama import MllamaForConditionalGeneration, backend
from mllama.backend import Ops
from mllama.demo import checkpoint_path
from mllama.generation import generate
from mllama_kernels import _dispatch, _library, reference

KINDS = ("reference", "disabled", "no library", "no such device")


@pytest.fixture(autouse=True)
def nobody_was_told(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())
    if _library.missing:
        pytest.fail(_library.missing)


def load(**options):
    return MllamaForConditionalGeneration.from_pretrained(
        checkpoint_path(), device="cpu", **options
    )


def kernels_of(model):
    with torch.no_grad(), Kernels() as ran:
        model(input_ids=torch.arange(20).unsqueeze(0))
    return set(ran.names)


@pytest.mark.filterwarnings("ignore:on cpu the ops run")
@pytest.mark.parametrize("kind", [*KINDS, "as built", "its own choice"])
def test_a_model_names_what_runs(monkeypatch, kind):
    set_build(monkeypatch, kind)
    model = load(backend="reference" if kind == "its own choice" else "auto")
    runs = kind == "as built"
    assert bool(kernels_of(model)) == runs
    assert model.backend == ("kernels" if runs else "reference")
    assert (model.ops.plain_ops("cpu") == {}) == runs


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_were_asked_for_are_had_or_refused(monkeypatch, kind):
    model = load(backend="kernels")
    set_build(monkeypatch, kind)
    reason = _dispatch.why_not("rms_norm", "cpu")
    assert reason
    for act in (
        lambda: load(backend="kernels"),
        lambda: MllamaForConditionalGeneration(model.config, backend="kernels"),
        lambda: model.to("cpu"),
        lambda: model.double(),
        lambda: setattr(model, "backend", "kernels"),
        lambda: Ops("kernels", "cpu"),
    ):
        with pytest.raises(RuntimeError) as error:
            act()
        assert str(error.value) == f'backend="kernels": {reason}'
    assert model.backend == "reference"


def test_a_model_on_a_device_without_kernels_says_so_once(monkeypatch):
    """As a CUDA model on a build without CUDA: at the load, or when it is moved."""
    set_build(monkeypatch, "no such device")
    message = f"on cpu the ops run as plain PyTorch: {REASON}"
    with pytest.warns(UserWarning, match=message):
        model = load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
        model.to("cpu")
        load(backend="reference")
    monkeypatch.setattr(backend, "_warned", set())
    with pytest.warns(UserWarning, match=message):
        model.to("cpu")


@pytest.mark.parametrize("kind", ["reference", "disabled", "as built"])
def test_nothing_is_said_of_what_was_asked_for(monkeypatch, kind):
    set_build(monkeypatch, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load().to("cpu")


def test_the_meta_device_decides_nothing(monkeypatch):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(_library, "missing", REASON)
        model = MllamaForConditionalGeneration(load_config())
        monkeypatch.setattr(_library, "missing", None)
        assert model.backend == "kernels"
    monkeypatch.setattr(_library, "missing", REASON)
    with pytest.warns(UserWarning, match=REASON):
        model.to_empty(device="cpu")
    assert model.backend == "reference"


def load_config():
    return copy.deepcopy(load(backend="reference").config)


def test_one_disabled_op_is_told_from_all(monkeypatch):
    monkeypatch.setattr(_dispatch, "DISABLED", frozenset(["rms_norm"]))
    model = load(backend="kernels")
    assert model.backend == "kernels" and list(model.ops.plain_ops("cpu")) == ["rms_norm"]
    assert "add_rms_norm" in kernels_of(model) and "rms_norm" not in kernels_of(model)


def test_graphs_are_captured_where_every_op_is_a_kernel(monkeypatch):
    model, tokens = load(), type("Tokens", (), {"is_cuda": True})()
    assert generate.captures(model, tokens)
    monkeypatch.setattr(_dispatch, "DISABLED", frozenset(["sample"]))
    assert not generate.captures(model, tokens), "it reads on the host"
    monkeypatch.setattr(_dispatch, "DISABLED", frozenset())
    set_build(monkeypatch, "no such device")
    assert not generate.captures(model, tokens)


def test_copies_keep_the_choice(monkeypatch):
    for choice in backend.BACKENDS:
        model = load(backend=choice)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.ops.choice == choice and twin.backend == model.backend
            assert twin.model.language_model.ops is twin.ops


def test_the_ops_are_named_one_by_one():
    """Editors and type checkers find each; a model on the CPU has the kernels themselves."""
    named = {name: f for name, f in vars(Ops).items() if isinstance(f, staticmethod)}
    assert named.keys() == set(_library.OPS)
    ops, plain = Ops("auto", "cpu"), Ops("reference", "cpu")
    for name, declared in named.items():
        public = getattr(mllama_kernels, name)
        assert declared.__func__ is public
        assert getattr(ops, name) is _dispatch.kernel_of(public) is not public
        assert getattr(plain, name) is getattr(reference, name)


def test_an_op_without_kernel_decides_at_every_call(monkeypatch):
    monkeypatch.setattr(_dispatch, "DISABLED", frozenset(["swiglu"]))
    ops = Ops("auto", "cpu")
    assert ops.swiglu is mllama_kernels.swiglu
    assert ops.rms_norm is _dispatch.kernel_of(mllama_kernels.rms_norm)
