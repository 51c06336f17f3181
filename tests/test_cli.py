"""The command line: help, exit codes, and every subcommand on the demo model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllama import cli
from mllama.commands import chat
from mllama.demo import checkpoint_path, is_right, sample_picture
from mllama_kernels import reference


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    sample_picture(3)[0].save(path)
    return str(path)


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_says_what_each_option_is(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"] if name else ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: mllama" in out
    if name is None:
        assert all(command in out for command in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["generate"], ["demo", "--backend", "fast"]])
def test_misuse_exits_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_module_and_console_entry_agree():
    out = subprocess.run(
        [sys.executable, "-m", "mllama", "info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(out.stdout)["ops"]["rms_norm"]["cpu"] == "available"


def test_demo_renders_and_answers(capsys, tmp_path):
    path = tmp_path / "shown.png"
    code, out, _ = run(capsys, "demo", "--seed", "5", "--out", str(path))
    assert code == 0 and str(path) in out
    with Image.open(path) as image:
        assert image.size == sample_picture(5)[0].size
    code, out, err = run(capsys, "demo", "--seed", "5", "--out", str(path), "--json")
    result = json.loads(out)
    assert code == 0 and result["picture"] == str(path) and str(path) in err
    shares = [answer["right"] for answer in result["answers"]]
    assert len(shares) >= 5 and sum(shares) >= len(shares) - 1


def test_demo_takes_a_picture_and_questions(capsys, picture):
    question = "How many shapes are there?"
    code, out, _ = run(capsys, "demo", "--image", picture, "--question", question, "--json")
    (answer,) = json.loads(out)["answers"]
    assert code == 0 and answer["question"] == question
    assert is_right(answer["answer"], str(len(sample_picture(3)[1].shapes))) or answer["answer"]


def test_generate_streams_what_json_reports(capsys, picture):
    base = ["generate", "--model", str(checkpoint_path()), "--image", picture, "--greedy"]
    base += ["--prompt", "Describe the picture.", "--max-new-tokens", "24", "--device", "cpu"]
    code, streamed, _ = run(capsys, *base)
    assert code == 0
    code, out, _ = run(capsys, *base, "--json")
    result = json.loads(out)
    assert code == 0 and result["text"].strip() == streamed.strip() != ""
    assert 0 < result["new_tokens"] <= 24


def test_sampling_is_repeatable_by_seed(capsys, picture):
    base = ["generate", "--model", str(checkpoint_path()), "--image", picture, "--device", "cpu"]
    base += ["--prompt", "Describe the picture.", "--temperature", "3", "--max-new-tokens", "12"]
    texts = [run(capsys, *base, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_is_greedy(capsys, monkeypatch, picture):
    base = ["generate", "--model", str(checkpoint_path()), "--image", picture, "--device", "cpu"]
    base += ["--prompt", "Describe the picture.", "--max-new-tokens", "12"]
    expected = run(capsys, *base, "--greedy")
    for extra in (["0"], ["0.0", "--greedy"], ["0", "--top-p", "0.9", "--seed", "3"]):
        assert run(capsys, *base, "--temperature", *extra) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {picture}\nDescribe the picture.\n"))
    chat = ["chat", "--model", str(checkpoint_path()), "--device", "cpu", "--max-new-tokens", "12"]
    assert run(capsys, *chat, "--temperature", "0")[:2] == (0, expected[1])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "/nowhere/at/all", "--prompt", "x"], "/nowhere/at/all"),
        (["--image", "missing.png", "--prompt", "x"], "missing.png"),
        (["--prompt", "x", "--greedy", "--top-k", "3"], "--greedy and --top-k contradict"),
        (["--prompt", "x", "--device", "warp"], "warp"),
    ],
)
def test_failures_exit_with_1_and_one_message(capsys, extra, message):
    model = [] if "--model" in extra else ["--model", str(checkpoint_path())]
    code, out, err = run(capsys, "generate", *model, *extra)
    assert code == 1 and out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "black"])
@pytest.mark.parametrize("options", [[], ["--json"], ["--question", "Which?"]], ids=str)
def test_demo_prints_nothing_before_a_bad_picture(capsys, picture, tmp_path, kind, options):
    path = tmp_path / "bad.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "cut":  # which its header does not tell
        data = Path(picture).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "black":
        Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(path)
    code, out, err = run(capsys, "demo", "--image", str(path), *options)
    assert code == 1 and out == "" and "bad.png" in err and "Traceback" not in err


@pytest.mark.parametrize("options", [("--seed", "3"), ("--out", "x.png")])
def test_demo_refuses_what_a_picture_of_your_own_leaves_unused(capsys, picture, options):
    code, out, err = run(capsys, "demo", "--image", picture, *options)
    assert (code, out) == (1, "") and f"{options[0]} is for a rendered picture" in err


def test_demo_prints_nothing_before_a_bad_question(capsys, picture):
    options = ["--question", "What?", "--question", "What is <|image|>?"]
    code, out, err = run(capsys, "demo", "--image", picture, *options)
    assert code == 1 and out == "" and "image tokens" in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_pictures_are_looked_at_before_the_model_is_loaded(capsys, command):
    asked = ["--prompt", "x"] if command == "generate" else []
    options = ["--model", "/nowhere", "--image", "missing.png", *asked]
    code, out, err = run(capsys, command, *options)
    assert code == 1 and out == "" and "missing.png cannot be read" in err


CUT = b"caf\xc3".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("prompt", [CUT, "lone \ud800", "what is <|image|>?"], ids=ascii)
@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=str)
def test_words_of_the_command_line(capsys, prompt, raw):
    base = ["generate", "--model", str(checkpoint_path()), "--greedy", "--max-new-tokens", "3"]
    base += ["--json", *raw]
    code, out, err = run(capsys, *base, "--prompt", prompt, "--escape-special-tokens")
    assert code == 0, err
    escaped = json.loads(out)
    code, out, err = run(capsys, *base, "--prompt", prompt)
    if "<|image|>" in prompt:
        assert code == 1 and out == "" and "escape_special_tokens" in err
        return
    clean = run(
        capsys, *base, "--prompt", prompt.replace("\udcc3", "\ufffd").replace("\ud800", "\ufffd")
    )
    assert code == 0 and clean[0] == 0
    for name in ("text", "prompt_tokens"):
        assert json.loads(out)[name] == json.loads(clean[1])[name] == escaped[name]


def test_a_path_may_be_of_any_bytes(capsys, picture, tmp_path):
    path = tmp_path / f"{CUT}.png"
    Path(picture).rename(path)
    code, out, _ = run(capsys, "demo", "--image", str(path), "--question", "How many shapes?")
    assert code == 0 and "caf\ufffd.png" in out
    code, out, _ = run(capsys, "demo", "--image", str(path), "--question", CUT, "--json")
    assert code == 0 and json.loads(out)["picture"].endswith("caf\ufffd.png")


def test_chat_reads_lines_of_any_bytes(capsys, monkeypatch, picture, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    lines = f"/image {bad}\n/image {picture}\nHow many caf".encode() + b"\xc3\n/quit\n"
    stdin = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    base = ["chat", "--model", str(checkpoint_path()), "--greedy", "--device", "cpu"]
    code, out, err = run(capsys, *base)
    assert code == 0 and len(out.splitlines()) == 1
    assert "bad.png is not a picture" in err


def test_chat_keeps_the_conversation(capsys, monkeypatch, picture):
    lines = (
        f"/image {picture}\nHow many shapes are there?\nDescribe the picture.\n/image nothing.png\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines + "/reset\n/what\n/quit\n"))
    code, out, err = run(
        capsys, "chat", "--model", str(checkpoint_path()), "--greedy", "--device", "cpu"
    )
    assert code == 0 and "no such file: nothing.png" in err
    assert len(out.splitlines()) == 2 and all(out.splitlines())


def test_a_turn_that_fails_leaves_no_picture_behind(capsys, monkeypatch, tmp_path):
    for seed in (3, 8):
        sample_picture(seed)[0].save(tmp_path / f"{seed}.png")
    command = ["chat", "--model", str(checkpoint_path()), "--greedy", "--device", "cpu"]
    turns = [f"/image {tmp_path / f'{seed}.png'}\nDescribe the picture.\n" for seed in (3, 8)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns[1]))
    _, expected, _ = run(capsys, *command)
    echo, left = chat.echo, ["the first answer breaks off"]

    def broken(pieces):
        if left:
            next(pieces)
            pieces.close()
            raise RuntimeError(left.pop())
        return echo(pieces)

    monkeypatch.setattr(chat, "echo", broken)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(turns)))
    code, out, err = run(capsys, *command)
    assert code == 0 and "breaks off" in err and out == expected


def test_info_of_a_checkpoint(capsys):
    code, out, _ = run(capsys, "info", "--model", str(checkpoint_path()), "--json")
    model = json.loads(out)["model"]
    assert code == 0 and model["semantics"] == "meta" and model["semantics_reason"]
    assert model["parameters"] > 100_000


def test_verify_passes(capsys):
    code, out, _ = run(capsys, "verify", "--device", "cpu", "--dtype", "float32", "--json")
    report = json.loads(out)
    assert code == 0 and report["passed"]
    assert {row["name"] for row in report["ops"]} >= {
        "rms_norm",
        "add_rms_norm",
        "swiglu",
        "rotary_attention",
        "rotary_attention_cached",
        "cross_attention",
        "vision_attention",
        "patch_embed",
    }
    assert report["layers"][-1]["name"] == "logits"


def test_verify_against_transformers(capsys):
    pytest.importorskip("transformers")
    code, out, _ = run(
        capsys,
        "verify",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--against",
        "transformers",
        "--json",
    )
    report = json.loads(out)
    assert code == 0 and report["against"]["relative_difference"] <= 1e-4


@pytest.mark.parametrize("name", ["rms_norm", "cross_attention"])
def test_verify_finds_a_broken_kernel(capsys, monkeypatch, name):
    """A kernel that is off by a thousandth in one element fails the check."""
    import mllama_kernels

    def broken(*args, **kwargs):
        out = getattr(reference, name)(*args, **kwargs).clone()
        out.view(-1)[0] += 1e-3
        return out

    monkeypatch.setattr(mllama_kernels, name, broken)
    code, out, _ = run(capsys, "verify", "--device", "cpu", "--dtype", "float32")
    assert code == 1 and "verdict: FAILED" in out
