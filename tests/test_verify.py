"""The self-check passes by what it has compared: whatever is broken, missing or not run fails it by name."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from model_helpers import Prompt, Shape, batch_of, randomise
from test_dispatch import set_build

import mllama_kernels
from mllama import MllamaConfig, MllamaForConditionalGeneration, cli, verification
from mllama.verification import Comparison, compare_layers, compare_ops, not_compared
from mllama_kernels import _library

# The ops of models whose weights are quantised, and those of every model.
QUANTIZED = {"quantized_linear", "quantized_rows"}
PLAIN = [op for op in _library.OPS if op not in QUANTIZED]
CHECK = ("verify", "--device", "cpu", "--dtype", "float32", "--oracle", "none")


SHAPE = Shape(
    tile_side=28, local_layers=2, global_layers=1, taps=(0,), layers=2, cross=(1,), intermediate=64
)


@pytest.fixture(scope="module")
def model():
    if _library.missing:
        pytest.fail(_library.missing)
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig(**SHAPE.configs())).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def inputs(model):
    torch.manual_seed(0)
    return batch_of(SHAPE, [Prompt(20, (3,), (2,))])


def break_op(monkeypatch, name, harm) -> None:
    """The op's kernel runs, and then `harm` is what it gives."""
    kernel = getattr(mllama_kernels, name)
    monkeypatch.setattr(mllama_kernels, name, lambda *a, **k: harm(kernel(*a, **k)))


def first(result):
    return result[0] if isinstance(result, tuple) else result


def wrong_value(result):
    out = first(result)
    out.view(-1)[0] += 1 if out.dtype == torch.int64 else 1e-2
    return result


def broken_row(rows, name):
    failed = {row.name: row for row in rows if not row.passed}
    assert name in failed, failed
    return failed[name]


def test_everything_is_compared_or_named(model, inputs):
    rows = compare_ops(model, inputs)
    assert all(row.passed and row.compared and row.calls for row in rows)
    assert {row.name for row in rows} == set(PLAIN)
    named = not_compared(rows)
    kernels = {name for name in dir(torch.ops.mllama_kernels) if not name.startswith("_")}
    backward = {
        f"{op}_backward"
        for op in _library.OPS
        if hasattr(torch.ops.mllama_kernels, f"{op}_backward")
    }
    assert set(named) == backward | QUANTIZED and len(backward) == 9
    assert backward <= kernels | backward


def test_generation_and_loss_call_nothing_that_is_not_compared(model, inputs, monkeypatch):
    called = set()

    class Recorded:
        def __getattr__(self, name):
            def recorded(*args, **kwargs):
                called.add(name)
                return getattr(mllama_kernels, name)(*args, **kwargs)

            return recorded

    rows = {row.name for row in compare_ops(model, inputs)}
    with model.ops.replaced(lambda _: Recorded()):
        model.generate(**inputs, max_new_tokens=3, do_sample=True, repetition_penalty=1.2)
        model(**inputs, labels=inputs["input_ids"], return_logits=False)
    assert called and called <= rows


@pytest.mark.parametrize("name", PLAIN)
def test_a_wrong_value_is_found(model, inputs, monkeypatch, name):
    break_op(monkeypatch, name, wrong_value)
    broken_row(compare_ops(model, inputs), name)


@pytest.mark.parametrize(
    ("name", "harm", "problem"),
    [
        ("rms_norm", lambda out: out[:, :-1], r"shape \(\d+, \d+\), expected \(\d+, \d+\)"),
        (
            "sample",
            lambda out: (out[0].unsqueeze(-1), *out[1:]),
            r"shape \(1, 1\), expected \(1,\)",
        ),
        ("linear_cross_entropy", lambda out: out.mean(), r"shape \(\), expected"),
        ("swiglu", lambda out: out.double(), "torch.float64, expected torch.float32"),
        ("sample", lambda out: (out[0].int(), *out[1:]), "torch.int32, expected torch.int64"),
        ("cross_attention", lambda out: None, "a NoneType, expected a tensor"),
        ("add_rms_norm", lambda out: out[0], "1 results, expected 2"),
        ("rms_norm", lambda out: (out, out), "2 results, expected 1"),
        ("gated_residual", lambda out: 1 / 0, "raised ZeroDivisionError: division by zero"),
        ("vision_attention", lambda out: out * math.nan, "elements that should be finite are not"),
        ("skinny_linear", lambda out: out / 0, "elements that should be finite are not"),
    ],
)
def test_a_wrong_kind_of_result_is_named_and_the_check_goes_on(
    model, inputs, monkeypatch, name, harm, problem
):
    break_op(monkeypatch, name, harm)
    rows = compare_ops(model, inputs)
    assert re.search(problem, broken_row(rows, name).verdict)
    assert {"sample", "linear_cross_entropy", "skinny_linear"} <= {row.name for row in rows}


def scribbled(kernel, *args, **kwargs):
    out = kernel(*args, **kwargs)
    args[5][0, 0, 0, 0] += 1  # in k_cache, perhaps in a row that this call does not write
    return out


def unwritten(kernel, *args, **kwargs):
    return kernel(*args[:5], args[5].clone(), args[6].clone(), *args[7:], **kwargs)


@pytest.mark.parametrize("harm", [scribbled, unwritten])
def test_what_an_op_writes_is_compared(model, inputs, monkeypatch, harm):
    kernel = mllama_kernels.rotary_attention_cached
    monkeypatch.setattr(
        mllama_kernels, "rotary_attention_cached", lambda *a, **k: harm(kernel, *a, **k)
    )
    broken_row(compare_ops(model, inputs), "rotary_attention_cached")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("rms_norm", 0),
        ("rms_norm", 1),
        ("swiglu", 0),
        ("vision_attention", 1),
        ("rotary_attention", 2),
        ("rotary_attention_cached", 0),
        ("linear_cross_entropy", 2),  # whole numbers
    ],
)
def test_an_argument_that_is_not_to_be_written_is_watched(
    model, inputs, monkeypatch, name, argument
):
    kernel = getattr(mllama_kernels, name)

    def scribbling(*args, **kwargs):
        out = kernel(*args, **kwargs)
        args[argument].select(0, 0).zero_()
        return out

    weights = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(mllama_kernels, name, scribbling)
    rows = compare_ops(model, inputs)
    assert "wrote to its argument" in broken_row(rows, name).verdict
    assert [row.name for row in rows if not row.passed] == [name]
    for key, values in model.state_dict().items():
        torch.testing.assert_close(values, weights[key], rtol=0, atol=0, msg=key)


def test_nan_is_the_fault_of_one_op_only(model, inputs, monkeypatch):
    break_op(monkeypatch, "vision_attention", lambda out: out * math.nan)
    rows = compare_ops(model, inputs)
    assert [row.name for row in rows if not row.passed] == ["vision_attention"]


def test_the_arguments_that_ops_write_are_those_of_their_schemas():
    written = {
        name: tuple(
            a.name
            for a in getattr(torch.ops.mllama_kernels, name).default._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        )
        for name in _library.OPS
    }
    assert {name: names for name, names in written.items() if names} == verification._WRITTEN


def test_plain_pytorch_in_the_place_of_a_kernel_is_named(model, inputs, monkeypatch):
    monkeypatch.setattr(mllama_kernels, "swiglu", mllama_kernels.reference.swiglu)
    assert broken_row(compare_ops(model, inputs), "swiglu").problems[0] == "did not run as a kernel"


def test_ops_that_a_text_does_not_call_are_not_passed(model, inputs):
    text = {"input_ids": torch.randint(3, SHAPE.vocab, (1, 20))}
    rows = compare_ops(model, text)
    assert all(row.passed for row in rows)
    assert {"patch_embed", "vision_attention"} <= set(not_compared(rows))


def test_a_model_that_does_not_come_through_fails(model, inputs):
    rows = compare_ops(model, {**inputs, "wings": 2})
    assert not rows[-1].passed and rows[-1].name == "model" and "wings" in rows[-1].problems[0]


def test_layers_with_an_op_that_raises_fail(model, inputs, monkeypatch):
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    assert all(row.passed for row in compare_layers(model, exact, inputs))
    break_op(monkeypatch, "swiglu", lambda out: 1 / 0)
    model.ops.select("kernels", "cpu")
    (row,) = compare_layers(model, exact, inputs)
    assert not row.passed and "ZeroDivisionError" in row.verdict


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("actual", "plain", "exact", "passes"),
    [
        ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], True),
        ([], [], [], False),
        ([NAN, NAN], [NAN, NAN], [NAN, NAN], False),
        ([1.0, NAN], [1.0, NAN], [1.0, NAN], False),
        ([1.0, NAN], [1.0, NAN], [1.0, 2.0], False),
        ([1.0, INF], [1.0, INF], [1.0, INF], True),
        ([1.0, -INF], [1.0, INF], [1.0, INF], False),
        ([1.0, NAN], [1.0, INF], [1.0, INF], False),
        ([INF, INF], [INF, INF], [INF, INF], False),
        ([1.0, 2.5], [1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, INF], [1.0, 2.0], True),
        ([0.0], [0.0], [0.0], True),
        ([1e-30], [0.0], [0.0], False),
        ([3, 4], [3, 4], [3, 4], True),
        ([3, 5], [3, 4], [3, 4], False),
        ([3, 5], [3, 5], [3, 4], False),
        ([True], [True], [False], False),
    ],
)
def test_a_comparison(actual, plain, exact, passes):
    a, p = torch.tensor(actual), torch.tensor(plain)
    e = torch.tensor(exact)
    row = Comparison("x")
    row.add(a, p, e.double() if e.is_floating_point() else e)
    assert row.passed == passes
    assert (row.verdict == "ok") == passes


def test_an_empty_comparison_fails():
    assert not Comparison("x").passed and "nothing was compared" in Comparison("x").verdict


def test_one_bad_call_among_good_ones_fails():
    row, good = Comparison("x"), torch.ones(3)
    row.add(good, good, good.double())
    row.add(good * NAN, good, good.double())
    row.add(good, good, good.double())
    assert not row.passed


def verify(capsys, *options) -> tuple[int, str, str]:
    code = cli.main([*CHECK, *options])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("kind", ["reference", "disabled", "no library", "no such device"])
def test_without_kernels_every_op_is_named_with_the_reason(model, inputs, monkeypatch, kind):
    set_build(monkeypatch, kind)
    reason = mllama_kernels._dispatch.why_not("rms_norm", "cpu")
    rows = compare_ops(model, inputs)
    assert {row.name for row in rows} == set(PLAIN)
    for row in rows:
        assert row.problems[0] == f"did not run as a kernel: {reason}" and not row.passed


@pytest.mark.filterwarnings("ignore:on cpu the ops run")
@pytest.mark.parametrize("kind", ["reference", "no such device"])
def test_the_verdict_without_kernels(capsys, monkeypatch, kind):
    set_build(monkeypatch, kind)
    reason = mllama_kernels._dispatch.why_not("rms_norm", "cpu")
    code, out, err = verify(capsys, "--json")
    report = json.loads(out)
    assert code == 1 and not report["passed"] and not any(row["passed"] for row in report["ops"])
    assert "layers" in report["not_compared"]
    assert f"verdict: FAILED, no kernel ran: {reason}" in err


def test_only_the_disabled_op_fails(capsys, monkeypatch):
    monkeypatch.setattr(mllama_kernels._dispatch, "DISABLED", frozenset(["sample"]))
    code, out, _ = verify(capsys)
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert code == 1 and len(failed) == 2 and failed[0].startswith("sample ")
    assert "MLLAMA_KERNELS_DISABLE=sample" in failed[0]
    assert failed[1].startswith("verdict: FAILED; not compared: ")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("sample", wrong_value),
        ("linear_cross_entropy", lambda out: 1 / 0),
        ("rms_norm", lambda out: out[..., None]),
    ],
)
def test_json_is_whole_whatever_breaks(capsys, monkeypatch, name, harm):
    break_op(monkeypatch, name, harm)
    code, out, err = verify(capsys, "--json")
    report = json.loads(out)
    assert code == 1 and not report["passed"] and "verdict: FAILED" in err
    assert [row["name"] for row in report["ops"] if not row["passed"]] == [name]


def test_demo_names_what_ran(capsys, monkeypatch, tmp_path):
    ask = ("demo", "--seed", "5", "--question", "Describe the picture.", "--device", "cpu")
    ask += ("--out", str(tmp_path / "shown.png"))
    assert cli.main([*ask]) == 0
    assert "backend kernels on cpu, " in capsys.readouterr().out
    monkeypatch.setattr(mllama_kernels._dispatch, "DISABLED", frozenset(["sample"]))
    assert cli.main([*ask]) == 0
    assert "backend kernels on cpu (in plain PyTorch: sample), " in capsys.readouterr().out
    set_build(monkeypatch, "reference")
    assert cli.main([*ask]) == 0
    out = capsys.readouterr().out
    assert (
        "backend reference on cpu (MLLAMA_KERNELS_BACKEND=reference" in out
        and "backend kernels" not in out
    )
    assert cli.main([*ask, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "reference"
