"""The parts of the benchmark that need no clock: ratios, rotation, the gate, goals, tables."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

import mllama_kernels  # noqa: E402
from benchmarks import (  # noqa: E402
    cases,
    ceilings,
    figure,
    goals,
    machine,
    measure,
    model,
    peers,
    quantized_model,
    readme,
    report,
    run,
    scenario,
    tables,
    timing,
    training,
)
from benchmarks.case import OURS, PLAIN, Case, Impl, Setting, absent  # noqa: E402
from benchmarks.correctness import Gate  # noqa: E402
from benchmarks.runs import committed, newest, read, superseded  # noqa: E402
from mllama_kernels import _library  # noqa: E402

CEILING = {"copy_gbps": 100.0, "read_gbps": 200.0, "matmul_tflops_float32": 1.0}


def wrong_sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1) * 1.001


def case_of(*impls: Impl) -> Case:
    return Case(
        op="sum",
        shape={"rows": 8},
        dtype=torch.float32,
        make=lambda: (torch.randn(8, 64),),
        truth=lambda x: x.sum(-1),
        impls=impls,
        bytes=8 * 64 * 4,
        bound="read",
    )


def small_effort() -> measure.Effort:
    return measure.Effort(torch.device("cpu"), rounds=3, seconds=1e-4, cold_bytes=10_000)


def sample_run(kind: str = "cpu", **changes: object) -> dict:
    """A document as run.py writes it, from a case that takes no time."""
    plain = Impl(PLAIN, lambda x: x.sum(-1))
    case = case_of(Impl(OURS, lambda x: x.sum(-1)), plain, absent("flashinfer", "not here"))
    row = measure.measure(case, small_effort())
    measure.add_floor(row, CEILING)
    described = machine.describe(torch.device("cpu")) | {"kind": kind, "gpu": "GPU"}
    document = {
        "started": "2026-01-01T00:00:00+00:00",
        "parts": ["ops", "model", "training"],
        "machine": described,
        "versions": machine.versions(),
        "commit": "abc",
        "dirty": False,
        "ceilings": CEILING,
        "skipped": {"sample": "no such op"},
        "rows": [row],
        "model": [],
        "training": [],
        "file": "sample.json",
    }
    return json.loads(json.dumps(document)) | changes


def test_ratio_is_the_median_of_the_ratios_of_each_round():
    ours, peer = [1.0, 2.0, 4.0], [3.0, 2.0, 40.0]
    spread = timing.ratios(ours, peer)
    assert (spread.median, spread.min, spread.max) == (3.0, 1.0, 10.0)
    assert median(peer) / median(ours) != spread.median
    with pytest.raises(ValueError):
        timing.ratios(ours, peer[:2])


@pytest.mark.parametrize("nbytes", [1, 4_000, 40_000, 100_000, 300_000])
def test_copies_exceed_the_cache_or_are_labelled_warm(nbytes):
    copies = timing.copies_for(nbytes, 100_000)
    if copies.cold:
        assert copies.count * nbytes >= 100_000 and copies.count <= timing.MOST_COPIES
        assert copies.count > 1 or nbytes >= 200_000
    else:
        assert nbytes * timing.MOST_COPIES < 100_000


@pytest.mark.parametrize("copies", [1, 2, 7, 256])
@pytest.mark.parametrize("once", [1e-7, 1e-5, 1e-3, 1.0])
def test_a_graph_uses_every_copy_equally_often(copies, once):
    calls = timing.graph_calls(once, 5e-3, copies)
    assert calls % copies == 0 and copies <= calls <= timing.MOST_GRAPH_CALLS


def test_rotation_goes_on_where_it_stopped():
    seen = []
    rotation = timing.Rotation(seen.append, [(0,), (1,), (2,)])
    rotation.run(4)
    rotation.run(3)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    rotation.assert_even()
    rotation.uses[1] += 2
    with pytest.raises(AssertionError):
        rotation.assert_even()


def test_rounds_alternate():
    order = []
    rounds = [lambda name=name: order.append(name) or 0.0 for name in "ABC"]
    assert timing.interleave(rounds, 2) == [[0.0, 0.0]] * 3
    assert "".join(order) == "ABCCBA"


def test_floor_is_the_longer_of_moving_and_computing():
    assert ceilings.floor(10**9, 0, "copy", "float32", CEILING) == (0.01, "copy")
    assert ceilings.floor(10**9, 0, "read", "float32", CEILING) == (0.005, "read")
    assert ceilings.floor(10**9, 10**12, "read", "float32", CEILING) == (1.0, "matmul")


def test_what_is_compared_is_selected_from_what_the_op_returns():
    case = replace(
        case_of(Impl(OURS, lambda x: x.sum(-1)), Impl("as a row", lambda x: x.sum(-1)[None])),
        truth=lambda x: x[:2].sum(-1),
        select=lambda output: (output[:2],),
    )
    row = measure.measure(case, small_effort())
    assert [impl["status"] for impl in row["impls"]] == ["timed", "wrong"]


def test_a_wrong_implementation_is_not_timed():
    row = measure.measure(
        case_of(
            Impl(OURS, lambda x: x.sum(-1)),
            Impl("wrong", wrong_sum),
            Impl("NaN", lambda x: x.sum(-1) * float("nan")),
            Impl("broken", lambda x: x.no_such_method()),
            Impl("sdpa cudnn", lambda x: x.sum(-1)),
        ),
        small_effort(),
    )
    status = {impl["name"]: impl["status"] for impl in row["impls"]}
    assert status == {
        OURS: "timed",
        "wrong": "wrong",
        "NaN": "wrong",
        "broken": "failed",
        "sdpa cudnn": "unavailable",  # it never called that backend
    }
    assert all(("us" in impl) == (impl["status"] == "timed") for impl in row["impls"])


@pytest.mark.parametrize(("forced", "used"), [("flash", "flash"), ("math", "math"), ("", "flash")])
def test_the_backend_that_sdpa_took_is_seen(forced, used):
    setting = Setting(torch.device("cpu"), torch.float32)
    q, k, v = (setting.randn(1, 16, 2, 64) for _ in range(3))
    (impl,) = peers.sdpa_backends(setting, peers.sdpa, suffix=", no mask", names=(forced,))
    with torch.inference_mode():
        ran = peers.backend_used(impl.name, lambda: impl.call(q, k, v), setting.device)
    assert ran == {"sdpa": used}
    assert peers.wrong_backend(impl.name, ran) is None
    assert (peers.wrong_backend("sdpa flash", ran) is None) == (used == "flash")


def test_ours_is_held_to_less_than_a_peer():
    case = case_of()
    gate = Gate(case, case.make())
    size = max(gate.plain.root, gate.rounding.root)
    off = gate.exact[0] * (1 + 4 * size)
    assert gate.check(Impl(OURS, wrong_sum), off, ours=True)[1]
    assert gate.check(Impl("peer", wrong_sum), off, ours=False)[1] is None


def squares(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.square() * weight


def trained_squares(*impls: Impl, **options: object) -> Case:
    def make() -> tuple[torch.Tensor, ...]:
        return torch.randn(8, 64), torch.randn(64)

    forward = Case(
        "squares", {"rows": 8}, torch.float32, make, squares, impls, bytes=2 * 8 * 64 * 4
    )
    return training.trained(forward, bytes=5 * 8 * 64 * 4, **options)


def test_a_backward_is_timed_only_if_its_gradients_are_right():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return squares(x, weight)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return 2 * x * weight * grad, (grad * x).sum(0)

    halves = Impl(
        "halves",
        lambda a, b, w: squares(torch.cat([a, b]), w),
        prepare=lambda x, w: (*x.chunk(2), w),
        result=lambda grads: (torch.cat(grads[:2]), grads[2]),
    )
    wrong = Impl("wrong", WrongGradient.apply)
    no_grad = Impl("no gradient", lambda x, w: squares(x, w).detach())
    case = trained_squares(Impl(OURS, squares), Impl(PLAIN, squares), halves, wrong, no_grad)
    row = measure.measure(case, small_effort())
    status = {impl["name"]: impl["status"] for impl in row["impls"]}
    assert status == {
        OURS: "timed",
        PLAIN: "timed",
        "halves": "timed",
        "wrong": "wrong",
        "no gradient": "failed",
    }
    assert row["shape"] == {"rows": 8, "pass": "forward + backward"} and row["bytes"] == 10240
    json.dumps(row)


def test_arguments_without_a_gradient_are_left_out():
    case = trained_squares(Impl(OURS, squares), leaves=slice(1))
    args = case.make()
    assert len(args) == 3 and args[2].shape == (8, 64)
    (grad,) = case.truth(*args)
    assert torch.allclose(grad, 2 * args[0] * args[1] * args[2])
    (grad,) = case.impls[0].call(*case.impls[0].prepare(*args))
    assert grad.shape == (8, 64)


@pytest.mark.parametrize("op", sorted({*training.trained_ops()} - {"linear_cross_entropy"}))
@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["host", "gpu"])
def test_ops_that_train_have_a_backward_case(op, device):
    found = [case for case in all_cases(op, device) if case.backward]
    assert found and all(case.shape["pass"] == "forward + backward" for case in found)
    forward = {str(case.shape): case for case in all_cases(op, device) if not case.backward}
    for case in found:
        rest = {name: size for name, size in case.shape.items() if name != "pass"}
        assert case.bytes >= 2 * forward[str(rest)].bytes


def all_cases(op: str, device: str, quick: bool = False) -> list[Case]:
    """Cases make no tensor until they are measured, so those of a GPU are there without one."""
    if reason := cases.missing(op):
        pytest.skip(reason)
    return list(cases.cases(op, Setting(torch.device(device), torch.bfloat16, quick)))


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["host", "gpu"])
@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_has_cases(op, device):
    found = all_cases(op, device)
    assert {case.op for case in found} == {op}
    assert all(case.impls[0].name == OURS for case in found)
    assert all(PLAIN in [impl.name for impl in case.impls] for case in found)
    assert len({str(case) for case in found}) == len(found)
    quick = {str(case) for case in all_cases(op, device, quick=True)}
    assert quick and quick <= {str(case) for case in found}


def test_the_benchmark_knows_every_op():
    assert set(_library.OPS) <= set(cases.OPS)


def goal_on(**changes: object) -> goals.Goal:
    values = {"what": "x", "op": "sum", "shape": {"rows": 8}, "measure": "us", "target": 1e9}
    return goals.Goal(**(values | {"dtype": "float32"} | changes))


def test_goals_are_looked_up():
    document = sample_run("cuda")
    (row,) = document["rows"]
    mine, plain = row["impls"][:2]
    assert goals.value_of(goal_on(), document) == mine["us"]["median"]
    assert goals.value_of(goal_on(measure="share"), document) == mine["share_of_floor"]
    ratio = goals.value_of(goal_on(measure="ratio", peers=("flash", "pytorch")), document)
    assert ratio == plain["ours_is_faster"]["median"]
    assert goals.value_of(goal_on(measure="time_of_other", other={"rows": 8}), document) == 1
    for elsewhere in ({"shape": {"rows": 9}}, {"dtype": "bfloat16"}, {"device": "cpu"}):
        assert goals.value_of(goal_on(**elsewhere), document) is None
    assert goals.value_of(goal_on(measure="ratio", peers=("flashinfer",)), document) is None
    assert goals.reached(goal_on(), 1e8) and not goals.reached(goal_on(), 1e10)
    assert goals.reached(goal_on(measure="ratio", target=2), 2)


@pytest.mark.parametrize("op", cases.OPS)
def test_every_goal_names_a_case_and_its_peers(op):
    about = [goal for goal in goals.GOALS if goal.op == op]
    found = {device: all_cases(op, device) for device in {goal.device for goal in about}}
    for goal in about:
        for shape in (goal.shape, goal.other):
            (case, *_) = [c for c in found[goal.device] if shape.items() <= c.shape.items()]
            for peer in goal.peers if shape is goal.shape else ():
                assert any(impl.name.startswith(peer) for impl in case.impls), (goal, peer)


def test_every_goal_of_the_model_names_a_scenario():
    for goal in [goal for goal in goals.GOALS if goal.op == "model"]:
        layers = scenario.FULL if goal.device == "cuda" else scenario.REDUCED
        device = torch.device(goal.device)
        shapes = [
            vars(one) | {"text layers": layers.text}
            for one in scenario.scenarios(device, quick=True)
        ]
        shapes += [vars(r.scenario) | r.sizes for r in quantized_model.rows(device, quick=True)]
        assert any(goal.shape.items() <= shape.items() for shape in shapes), goal


def test_tables_come_from_the_document_alone(monkeypatch):
    document = sample_run()
    text = tables.run_page(document)
    assert "`sum` rows 8" in text and "flashinfer: unavailable: not here" in text
    assert "sample: no such op" in text and document["machine"]["cpu"] in text
    assert "in the same run" in text
    monkeypatch.setattr(readme, "HEADLINES", (readme.Headline("a sum", "sum", {"rows": 8}),))
    assert "a sum" not in readme.speed([document])  # float32 is in the run's own table
    document["rows"][0]["dtype"] = "bfloat16"
    assert "| a sum, rows 8 | " in readme.speed([document])


def test_only_the_newest_complete_run_of_a_kind_counts(monkeypatch):
    runs = [
        sample_run(started="2026-01-01", file="old.json"),
        sample_run(started="2026-01-02", file="new.json"),
        sample_run(started="2026-01-03", file="part.json", parts=["model"]),
        sample_run("cuda", started="2026-01-04", file="gpu.json"),
    ]
    assert newest(runs, "cpu", "ops")["file"] == "new.json"
    assert newest(runs, "cpu", "model")["file"] == "part.json"
    assert newest(runs, "cuda", "ops")["file"] == "gpu.json"
    assert newest(runs[:2], "cuda", "ops") is None
    narrowed = sample_run(started="2026-01-05", file="avx2.json")
    narrowed["machine"]["kept_to"] = {"MLLAMA_KERNELS_CPU_ISA": "avx2"}
    assert newest([*runs, narrowed], "cpu", "ops")["file"] == "new.json"
    assert "MLLAMA_KERNELS_CPU_ISA=avx2" in tables.machine_in_words(narrowed)
    for run_, commit in zip(runs, "abcd"):
        run_["commit"], run_["rows"][0]["dtype"] = commit, "bfloat16"
    monkeypatch.setattr(readme, "HEADLINES", (readme.Headline("a sum", "sum"),))
    section = readme.speed(runs)
    assert "commit b" in section and "commit d" in section and section.count("a sum") == 2
    assert "commit a" not in section and "commit c" not in section
    assert superseded([*runs, narrowed]) == ["old.json"]


def test_goals_stand_with_the_results():
    assert report.goal_table([]).count("\n") == 1
    text = (report.RESULTS / "README.md").read_text()
    assert report.goal_table(read(committed())) in text
    assert all(f"({path.stem}.md)" in text for path in committed())


def test_the_readme_has_a_line_per_op_and_few_figures():
    text = report.README.read_text()
    lines = readme.ops().splitlines()[2:]
    assert {*_library.OPS} <= {line.split("`")[1] for line in lines} < {*mllama_kernels.__all__}
    assert all(line in text for line in lines)
    has = {op: readme.has_backward(getattr(mllama_kernels, op)) for op in _library.OPS}
    assert [op for op in _library.OPS if has[op]] == training.trained_ops()
    assert 1 <= readme.speed(read(committed())).count("x (") <= 2 * 12
    with pytest.raises(ValueError, match="expected <!-- ops: made by"):
        readme.replaced(text.replace("<!-- end of ops -->", ""), "ops", "")


def test_the_figure_has_three_bars_of_each_kind_of_device():
    """Well-formed, GPUs first, and bars as long as the ratios; a kind without the model shows ops."""
    runs = read(committed())
    cpu = newest(runs, "cpu", "ops")
    assert cpu is not None
    on_gpu = {"machine": cpu["machine"] | {"kind": "cuda", "gpu": "H200"}, "parts": ["ops"]}
    gpu = cpu | on_gpu | {"versions": cpu["versions"] | {"cuda": "13.0", "cudnn": "9"}}
    texts, lengths = [], []
    for element in ElementTree.fromstring(figure.draw([*runs, gpu])).iter():
        if element.tag.endswith("text"):
            texts.append(element.text)
        if element.get("fill") == figure.OURS:
            lengths.append(float(element.get("width")))
    ratios = [float(text.removesuffix("x")) for text in texts if re.fullmatch(r"[\d.]+x", text)]
    assert len(ratios) == len(lengths) == 2 * figure.BARS
    assert texts[1].startswith("H200") and "rotary_attention_cached" in texts
    scale = figure.LONGEST / max(ratios)
    assert lengths == pytest.approx([ratio * scale for ratio in ratios], abs=1)
    assert len(figure.draw(runs).split(f'fill="{figure.OURS}"')) == 1 + figure.BARS


def test_committed_tables_are_up_to_date(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_command_line_names_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        run.parse(["no_such_op"])
    assert "no such op: no_such_op" in capsys.readouterr().err


def test_decoding_is_held_against_reading_in_the_same_round():
    """Memory that slows down for a round slows down both; the ratio of medians would say 2/3."""
    impl = {"status": "timed", "token_rounds_ms": [10.0, 30.0, 12.0]}
    impl["read_gbps_rounds"] = [1.0, 0.3, 0.9]
    row = {"bytes_per_step": int(9e6), "impls": [impl]}
    model.add_floor(row)
    assert impl["share_of_floor"] == pytest.approx(0.9) and impl["floor_token_ms"] == 10.0
    reader = ceilings.Reader(torch.device("cpu"), torch.randn(2**20))
    assert 0.01 < reader.round() < 1e4
    reader.close()
