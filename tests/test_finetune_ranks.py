"""`mllama finetune` with several processes: they do what one does with their batches together, go on after a
kill as if there had been none, with their number or another, and one of them speaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_worker import own_script
from free_ports import reserved
from safetensors.torch import load_file

from mllama import MllamaForConditionalGeneration, cli
from mllama.demo import checkpoint_path, sample_picture
from mllama.training.log import read_log

ROOT = Path(__file__).parents[1]
MODEL = str(checkpoint_path())
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)

# Rows without images and with, of few targets and of many: groups of four, and one alone.
ANSWERS = ("blue", "a small red cross, and a blue one", "two", "b", "green")
WITH_IMAGE = (True, True, False, False, True)
ADAPTERS, FEW = ["--lora-rank", "2", "--learning-rate", "0.01"], ["--max-steps", "3"]
WHOLE = ["--lora-rank", "0", "--learning-rate", "1e-4"]
STEPS = {
    "adapters": ADAPTERS,
    "adapters, images too": [*ADAPTERS, *FEW, "--lora-vision", "--gradient-checkpointing"],
    "quantised": [*ADAPTERS, *FEW, "--quantization-encoding", "q8_0"],
    "packed": [*ADAPTERS, *FEW, "--packing", "--max-length", "64"],
    "all weights": WHOLE,
    "all weights, recomputed": [*WHOLE, *FEW, "--gradient-checkpointing"],
    "all weights, bfloat16": [*WHOLE, *FEW, "--dtype", "bfloat16"],
}
# Before the first state, between two, while one is written, and after the last.
STOPS = ("step 1", "step 3", "state 4", "saved 4")
BRIEF = ["--max-steps", "4", "--save-every", "2"]
RESUMED = {
    "adapters": [*ADAPTERS, *BRIEF, "--lora-dropout", "0.3"],
    "all weights": [*WHOLE, *BRIEF],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `data.jsonl`, and all but its first line as `less.jsonl`."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = []
    for i, (answer, with_image) in enumerate(zip(ANSWERS, WITH_IMAGE)):
        sample_picture(i)[0].save(folder / f"{i}.png")
        asked: list[Any] = [{"type": "text", "text": "What do you see?"}]
        if with_image:
            asked.insert(0, {"type": "image", "path": f"{i}.png"})
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "less.jsonl").write_text("".join(lines[1:]))
    return folder


def options(folder: Path, output: str, rows: int, *more: str) -> list[str]:
    named = ["--model", MODEL, "--data", str(folder / "data.jsonl")]
    named += ["--eval-data", str(folder / "data.jsonl"), "--output", str(folder / output)]
    named += ["--device", "cpu", "--dtype", "float32", "--batch-size", str(rows)]
    return [*named, "--accumulate", "2", "--save-every", "20", "--max-steps", "20", *more]


def alone(folder: Path, output: str, rows: int, *more: str) -> Path:
    """A run of one process."""
    torch.set_num_threads(1)
    if not (folder / output).exists():
        assert cli.main(["finetune", *options(folder, output, rows, *more)]) == 0
    return folder / output


def launched(folder: Path, ranks: int, runs: list[dict[str, Any]]) -> list[list[list[Any]]]:
    """By rank and run, how it ended and what it printed."""
    given, work = folder / f"runs-{ranks}.json", folder / f"ended-{ranks}"
    given.write_text(json.dumps(runs))
    work.mkdir()
    script = str(ROOT / "tests" / "finetune_worker.py")
    subprocess.run(
        [*LAUNCH, str(ranks), script, str(given), str(work)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=550,
    )
    return [json.loads((work / f"ended-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[list[Any]]]:
    """What two ranks did: by name, how each ended and what it printed."""
    runs: dict[str, dict[str, Any]] = {}
    for name, more in STEPS.items():
        runs[name] = {"options": options(folder, f"two {name}", 2, *more)}
    for name, more in RESUMED.items():
        runs[f"whole {name}"] = {"options": options(folder, f"whole {name}", 2, *more)}
        killed = options(folder, f"killed {name}", 2, *more)
        for number, stop in enumerate(STOPS):
            resume = ["--resume"] * bool(number)
            runs[f"stopped {name} {stop}"] = {"options": [*killed, *resume], "stop": stop}
        runs[f"killed {name}"] = {"options": [*killed, "--resume"]}
        for number in (1, 4):
            left = options(folder, f"left to {number} {name}", 2, *more, "--lora-dropout", "0")
            runs[f"left to {number} {name}"] = {"options": left, "stop": "step 3"}
    plain = options(folder, "refused", 2, "--lora-rank", "2")
    runs["both wrong"] = {"options": [*plain, "--warmup", "2"]}
    runs["one wrong"] = {"options": [*plain], "on_last": ["--data", str(folder / "gone.jsonl")]}
    runs["other data"] = {"options": [*plain], "on_last": ["--data", str(folder / "less.jsonl")]}
    plain[plain.index("cpu")] = "cuda:1"
    runs["a device for all"] = {"options": plain}
    data, output = str(folder / "data.jsonl"), str(folder / "script")
    runs["script"] = {"script": {"data": data, "output": output, "rows": 1}}
    found = launched(folder, 2, list(runs.values()))
    return {name: [rank[i] for rank in found] for i, name in enumerate(runs)}


@pytest.fixture(scope="module")
def four(folder: Path, two: Any) -> dict[str, list[list[Any]]]:
    """What four ranks did, of which one has a row in each step, or goes on with what two began."""
    runs: dict[str, dict[str, Any]] = {}
    for name in ("adapters", "all weights"):
        more = [*STEPS[name], *FEW]
        runs[name] = {"options": options(folder, f"four {name}", 1, *more)}
        left = options(folder, f"left to 4 {name}", 2, *RESUMED[name], "--lora-dropout", "0")
        runs[f"left to 4 {name}"] = {"options": [*left, "--resume"]}
    found = launched(folder, 4, list(runs.values()))
    return {name: [rank[i] for rank in found] for i, name in enumerate(runs)}


def weights(output: Path) -> dict[str, torch.Tensor]:
    (path,) = output.glob("*model.safetensors")
    return load_file(path)


def entries(output: Path) -> list[dict[str, Any]]:
    """The log without the times and the number of ranks."""
    left_out = ("seconds", "ranks", "parallel")
    found = [e for e in read_log(output / "log.jsonl") if "parallel" not in e]
    return [{k: v for k, v in entry.items() if k not in left_out} for entry in found]


def assert_equal_up_to_rounding(
    found: Path, expected: Path, of_losses: float = 1e-5, of_weights: float = 1e-4
) -> None:
    one, other = entries(found), entries(expected)
    assert [e.keys() for e in one] == [e.keys() for e in other]
    for a, b in zip(one, other):
        assert (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        kind = "loss" if "loss" in a else "eval_loss"
        assert a[kind] == pytest.approx(b[kind], rel=of_losses), a
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert (weight.float() - b[name].float()).norm() <= of_weights * b[name].float().norm(), (
            name
        )


@pytest.mark.parametrize("name", STEPS)
def test_two_ranks_do_what_one_does_with_both_batches(name: str, folder: Path, two: Any) -> None:
    assert [code for code, _ in two[name]] == [0, 0], two[name]
    expected = alone(folder, f"one {name}", 4, *STEPS[name])
    # bfloat16 keeps 8 bits of weights and activations, in whose rounding the two differ.
    tolerances = (2**-6, 2**-8) if "bfloat16" in name else ()
    assert_equal_up_to_rounding(folder / f"two {name}", expected, *tolerances)
    assert {p.name for p in expected.iterdir()} == {
        p.name for p in (folder / f"two {name}").iterdir()
    }


@pytest.mark.parametrize("name", ["adapters", "all weights"])
def test_four_ranks_of_which_some_have_nothing(name: str, folder: Path, four: Any) -> None:
    assert [code for code, _ in four[name]] == [0] * 4, four[name]
    expected = alone(folder, f"one of four {name}", 4, *STEPS[name], *FEW)
    assert_equal_up_to_rounding(folder / f"four {name}", expected)


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_ends_with_the_bits_of_another(name: str, folder: Path, two: Any) -> None:
    for stop in STOPS:
        assert [code for code, _ in two[f"stopped {name} {stop}"]] == ["stopped"] * 2
    assert [code for code, _ in two[f"killed {name}"]] == [0, 0], two[f"killed {name}"]
    whole, killed = folder / f"whole {name}", folder / f"killed {name}"
    assert entries(whole) == entries(killed)
    one, other = weights(whole), weights(killed)
    assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
    assert {p.name for p in whole.iterdir()} == {p.name for p in killed.iterdir()}


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", RESUMED)
def test_another_number_of_ranks_goes_on(
    name: str, ranks: int, folder: Path, two: Any, capfd: Any, request: Any
) -> None:
    plain = [*RESUMED[name], "--lora-dropout", "0"]
    left = options(folder, f"left to {ranks} {name}", 2, *plain)
    capfd.readouterr()
    if ranks == 1:
        assert cli.main(["finetune", *left, "--resume"]) == 0
        said = capfd.readouterr().err
    else:
        (code, said), *others = request.getfixturevalue("four")[f"left to 4 {name}"]
        assert code == 0 and [end for end, _ in others] == [0] * 3, (said, others)
    assert f"goes on after step 2 of 2 ranks with {ranks}" in said, said
    output = folder / f"left to {ranks} {name}"
    assert [(e["step"], e["ranks"]) for e in read_log(output / "log.jsonl") if "ranks" in e] == [
        (0, 2),
        (2, ranks),
    ]
    assert_equal_up_to_rounding(output, alone(folder, f"resumed {name}", 4, *plain))


def test_a_trainer_of_ones_own_counts_tokens_too(folder: Path, two: Any) -> None:
    (_, one), (_, other) = two["script"]
    expected = own_script(str(folder / "data.jsonl"), str(folder / "script"), 2)
    assert one == other == pytest.approx(expected, rel=1e-5)


def test_the_first_rank_speaks(folder: Path, two: Any) -> None:
    for name in ("adapters", "all weights"):
        (_, first), (_, second) = two[name]
        kind = "data parallel (DDP)" if name == "adapters" else "sharded (FSDP2)"
        assert f"{kind} over 2 ranks" in first and "written to" in first
        assert "written to" not in second and "Warning" not in first + second
    log = read_log(folder / "two all weights" / "log.jsonl")
    assert log[0] == {"step": 0, "ranks": 2, "parallel": "fsdp2"}


def test_what_is_wrong_is_said_once(folder: Path, two: Any) -> None:
    for name, said in {
        "both wrong": "warmup must be at least 0 and below 1",
        "one wrong": "rank 1: ",
        "other data": "rank 1: data here, and something else on rank 0",
        "a device for all": "every rank has a device of its own, 'cuda:1' is one for all",
    }.items():
        (code, first), (other, second) = two[name]
        assert (code, other, second) == (1, 1, "") and said in first, two[name]
        assert first.count("\n") == 1 and not (folder / "refused").exists()
    assert "gone.jsonl" in two["one wrong"][0][1]


def test_a_sharded_run_leaves_a_checkpoint(folder: Path, two: Any) -> None:
    output = folder / "two all weights"
    model = MllamaForConditionalGeneration.from_pretrained(output, backend="reference")
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MllamaForConditionalGeneration"]
    assert model.dtype == torch.float32 and (output / "tokenizer.json").exists()


# `mllama`, which does not come to the end of its 20 steps.
ENDLESS = """
import sys, time
from mllama import cli
from mllama.training.log import Log
write = Log.write
def held(self, **entry):
    entry["step"] < 20 or time.sleep(600)
    write(self, **entry)
Log.write = held
sys.exit(cli.main(sys.argv[1:]))
"""


def started(
    ranks: int, port: int, options: list[str], program: Sequence[str] = ("-m", "mllama")
) -> list[subprocess.Popen[bytes]]:
    """The command on so many ranks, which meet on a port, as torchrun starts them, but for its process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program, "finetune", *options]
    return [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(ranks)
    ]


def test_sigkill_of_all_at_any_moment(folder: Path, two: Any) -> None:
    killed, more = folder / "killed for good", RESUMED["adapters"]
    asked = [*options(folder, "killed for good", 2, *more), "--resume"]
    with reserved() as port:
        group, deadline = started(2, port, asked, ("-c", ENDLESS)), time.monotonic() + 300
        while group[0].poll() is None and time.monotonic() < deadline:
            if sum("loss" in entry for entry in read_log(killed / "log.jsonl")) >= 3:
                break
            time.sleep(0.002)
        for process in group:
            process.kill()
        assert [process.wait() for process in group] == [-signal.SIGKILL] * 2
    with reserved() as port:
        assert [process.wait(timeout=300) for process in started(2, port, asked)] == [0, 0]
    assert entries(killed) == entries(folder / "whole adapters")
    one, other = weights(killed), weights(folder / "whole adapters")
    assert all(one[name].equal(other[name]) for name in one)
