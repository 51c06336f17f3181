"""The command line: help, exit codes, and every subcommand on the demo model."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllama import cli
from mllama.commands import chat, info, loading
from mllama.commands.common import as_json, echo
from mllama.demo import checkpoint_path, is_right, sample_picture
from mllama.limits import OWN_FILES
from mllama.training.options import TrainingOptions
from mllama_kernels import reference


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def image_path(tmp_path) -> str:
    path = tmp_path / "image.png"
    sample_picture(3)[0].save(path)
    return str(path)


# With the actions of a command that has some.
COMMANDS = [*(name for name in cli.COMMANDS if name != "ray"), "ray serve", "ray batch"]


@pytest.mark.parametrize("name", ["", "ray", *COMMANDS])
def test_help_says_what_each_option_is(capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: mllama" in out
    assert not re.search(r"default: *(None|False|\[\])|none:", out)
    if not name:
        assert all(command in out for command in cli.COMMANDS)


def test_help_has_the_groups_in_the_order_of_need(capsys):
    first = {"demo": "--image", "info": "--model", "finetune": "--model"}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([*name.split(), "--help"])
        _, _, text = capsys.readouterr().out.partition("\noptions:")
        options = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
        assert options[0] == first.get(name, "--model")
        execution = ["--dtype", "--backend", "--semantics"]
        device = (
            ["--device"] if name in ("demo", "finetune") else ["--device", "--collective-timeout"]
        )
        assert (
            name in ("info", "plan", "quantize")
            or options[-3 - len(device) :] == device + execution
        )
        if name == "finetune":
            names = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainingOptions)}
            assert names <= set(options)


def test_a_default_that_says_something_is_shown(capsys):
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "longest answer (default: 512" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["generate", "chat", "verify"])
def test_without_a_model_it_is_the_demo_model_and_says_so(capsys, monkeypatch, command):
    """One line on stderr; stdout and the exit code are those of naming the folder."""
    asked = {
        "generate": ["--prompt", "Hi.", "--greedy", "--max-new-tokens", "3", "--json"],
        "chat": ["--greedy", "--max-new-tokens", "3"],
        "verify": ["--oracle", "none", "--json"],
    }[command]
    results = []
    for model in ([], ["--model", str(checkpoint_path())]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi.\n"))
        code, out, err = run(capsys, command, *asked, *model, "--device", "cpu")
        assert code == 0
        results.append((re.sub(r'"seconds": [0-9.]+', "", out), err.splitlines()))
    (out, err), (expected, named) = results
    told = [line for line in err if "--model" in line]
    assert out == expected and len(told) == 1 and "demo model" in told[0]
    assert len(err) == len(named) + 1 and not any("--model" in line for line in named)


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


def test_demo_takes_an_image_and_questions(capsys, image_path):
    question = "How many shapes are there?"
    code, out, _ = run(capsys, "demo", "--image", image_path, "--question", question, "--json")
    (answer,) = json.loads(out)["answers"]
    assert code == 0 and answer["question"] == question
    assert is_right(answer["answer"], str(len(sample_picture(3)[1].shapes))) or answer["answer"]


def test_generate_streams_what_json_reports(capsys, image_path):
    base = ["generate", "--model", str(checkpoint_path()), "--image", image_path, "--greedy"]
    base += ["--prompt", "Describe the picture.", "--max-new-tokens", "24", "--device", "cpu"]
    code, streamed, _ = run(capsys, *base)
    assert code == 0
    code, out, _ = run(capsys, *base, "--json")
    result = json.loads(out)
    assert code == 0 and result["text"].strip() == streamed.strip() != ""
    assert 0 < result["new_tokens"] <= 24


def test_a_length_bounds_prompt_and_answer(capsys, monkeypatch, image_path):
    base = ["--image", image_path, "--greedy", "--device", "cpu"]
    ask = [*base, "--prompt", "Describe the picture.", "--json"]
    result = json.loads(run(capsys, "generate", *ask)[1])
    length, least = result["prompt_tokens"] + 5, result["prompt_tokens"] + 1
    assert result["new_tokens"] > 5
    result = json.loads(run(capsys, "generate", *ask, "--max-length", str(length))[1])
    assert result["new_tokens"] == 5
    code, out, err = run(capsys, "generate", *ask, "--max-length", str(least - 1))
    assert (code, out) == (1, "") and "--max-length is" in err and "no room for an answer" in err
    for command in (["generate", *ask], ["chat", *base], ["verify"]):
        code, out, err = run(capsys, *command, "--max-length", "2049")
        assert (code, out) == (1, "")
        assert "--max-length 2049 is beyond the model's context, 2048" in err
    code, out, err = run(capsys, "verify", "--device", "cpu", "--max-length", "5")
    assert (code, out) == (1, "") and "--max-length is 5" in err
    # The second turn of a chat has no room: it says so, and the conversation goes on.
    monkeypatch.setattr(sys, "stdin", io.StringIO("Describe the picture.\nAnd?\n/reset\nHi.\n"))
    code, out, err = run(capsys, "chat", *base, "--max-length", str(length))
    assert code == 0 and len(out.splitlines()) == 2 and err.count("no room for an answer") == 1


def test_a_length_is_planned(capsys, monkeypatch):
    asked = []

    def loaded(cls, *_, context, **__):
        asked.append(context)
        raise ValueError("that is enough")

    monkeypatch.setattr(
        loading.MllamaForConditionalGeneration, "from_pretrained", classmethod(loaded)
    )
    for command in (
        ["chat"],
        ["verify"],
        ["generate", "--prompt", "Hi.", "--max-new-tokens", "999"],
    ):
        assert run(capsys, *command, "--max-length", "700")[0] == 1
    assert asked == [700, 700, 700]


def test_sampling_is_repeatable_by_seed(capsys, image_path):
    base = ["generate", "--model", str(checkpoint_path()), "--image", image_path, "--device", "cpu"]
    base += ["--prompt", "Describe the picture.", "--temperature", "3", "--max-new-tokens", "12"]
    texts = [run(capsys, *base, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_is_greedy(capsys, monkeypatch, image_path):
    base = ["generate", "--model", str(checkpoint_path()), "--image", image_path, "--device", "cpu"]
    base += ["--prompt", "Describe the picture.", "--max-new-tokens", "12"]
    expected = run(capsys, *base, "--greedy")
    for extra in (["0"], ["0.0", "--greedy"], ["0", "--top-p", "0.9", "--seed", "3"]):
        assert run(capsys, *base, "--temperature", *extra) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {image_path}\nDescribe the picture.\n"))
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


_OBEYED = "\x1b]52;c;AAAA\x07\x1b[2J\x9b31m\u202e\r"


def _edited(folder, name, **entries):
    shutil.copytree(checkpoint_path(), folder, dirs_exist_ok=True)
    stored = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**stored, **entries}))


def _is_harmless(text):
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize("verbose", [[], ["-v"]], ids=str)
def test_a_checkpoint_writes_nothing_to_the_terminal_that_it_obeys(capsys, tmp_path, verbose):
    _edited(tmp_path, "config.json", transformers_version="4.45.0" + _OBEYED)
    code, out, err = run(capsys, *verbose, "info", "--model", str(tmp_path))
    assert code == 0 and "which is older than 4.56" in out and _is_harmless(out + err)
    _edited(tmp_path, "config.json", transformers_version="4.99.0" + "9" * 10**6)
    code, out, err = run(capsys, *verbose, "info", "--model", str(tmp_path))
    assert code == 0 and len(out + err) < 10_000


@pytest.mark.parametrize("template", ["{% " + _OBEYED + " %}", "{{ raise_exception(x * 5000) }}"])
def test_errors_of_templates_are_errors_of_the_command(capsys, tmp_path, template):
    template = template.replace("x", repr(_OBEYED))
    _edited(tmp_path, "chat_template.json", chat_template=template)
    ask = ["generate", "--model", str(tmp_path), "--prompt", "x", "--device", "cpu"]
    code, out, err = run(capsys, *ask)
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.startswith("mllama generate: ") and _is_harmless(err) and len(err) < 5000


def test_an_error_that_nobody_thought_of(capsys, monkeypatch):
    def fails(*_, **__):
        raise KeyError("\x1b[2J" + "x" * 10**6)

    monkeypatch.setattr(info, "describe_checkpoint", fails)
    code, _, err = run(capsys, "info", "--model", "x")
    assert code == 1 and err.startswith("mllama info: unexpected KeyError: ")
    assert "Traceback" not in err and _is_harmless(err) and len(err) < 5000


def test_what_is_logged_is_escaped():
    try:
        raise KeyError(_OBEYED * 10_000)
    except KeyError as error:
        caught = (KeyError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "a %s", (_OBEYED,), caught)
    said = cli._Escaped("%(name)s: %(message)s").format(record)
    assert said.startswith("x: a \\x1b]52") and "Traceback" in said and "KeyError" in said
    assert _is_harmless(said) and len(said) < 10_000


def test_answers_are_escaped_only_for_a_terminal(capsys, monkeypatch):
    pieces = ["a\tb\n", _OBEYED, "é漢"]
    echo(iter(pieces))
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text, _, _ = echo(iter(pieces))
    said = capsys.readouterr().out
    assert text == "".join(pieces)
    assert said == "a\tb\n\\x1b]52;c;AAAA\\x07\\x1b[2J\\x9b31m\u202e\\ré漢\n"
    assert _is_harmless(as_json({"x": _OBEYED.replace("\u202e", "")}))
    assert json.loads(as_json({"x": _OBEYED})) == {"x": _OBEYED}


def test_how_many_answers_there_are_is_not_the_checkpoints_choice(capsys, tmp_path):
    _edited(tmp_path, "generation_config.json", num_return_sequences=16_384, do_sample=True)
    ask = ["generate", "--model", str(tmp_path), "--prompt", "x", "--device", "cpu"]
    for more in ([], ["--json"]):
        assert run(capsys, *ask, "--max-new-tokens", "2", *more)[0] == 0


@pytest.mark.parametrize("kind", ["missing", "text", "cut", "black"])
@pytest.mark.parametrize("options", [[], ["--json"], ["--question", "Which?"]], ids=str)
def test_demo_prints_nothing_before_a_bad_image(capsys, image_path, tmp_path, kind, options):
    path = tmp_path / "bad.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "cut":  # which its header does not tell
        data = Path(image_path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "black":
        Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(path)
    code, out, err = run(capsys, "demo", "--image", str(path), *options)
    assert code == 1 and out == "" and "bad.png" in err and "Traceback" not in err


@pytest.mark.parametrize("options", [("--seed", "3"), ("--out", "x.png")])
def test_demo_refuses_what_an_image_of_your_own_leaves_unused(capsys, image_path, options):
    code, out, err = run(capsys, "demo", "--image", image_path, *options)
    assert (code, out) == (1, "") and f"{options[0]} is for a rendered image" in err


def test_demo_prints_nothing_before_a_bad_question(capsys, image_path):
    options = ["--question", "What?", "--question", "a" * (OWN_FILES.max_text + 1)]
    code, out, err = run(capsys, "demo", "--image", image_path, *options)
    assert code == 1 and out == "" and "(max_text)" in err and len(err) < 400


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_images_are_looked_at_before_the_model_is_loaded(capsys, command):
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
    if "<|image|>" in prompt and raw:
        assert code == 1 and out == "" and "escape_special_tokens" in err
        return
    clean = run(
        capsys, *base, "--prompt", prompt.replace("\udcc3", "\ufffd").replace("\ud800", "\ufffd")
    )
    assert code == 0 and clean[0] == 0
    for name in ("text", "prompt_tokens"):
        assert json.loads(out)[name] == json.loads(clean[1])[name] == escaped[name]


def test_a_path_may_be_of_any_bytes(capsys, image_path, tmp_path):
    path = tmp_path / f"{CUT}.png"
    Path(image_path).rename(path)
    code, out, _ = run(capsys, "demo", "--image", str(path), "--question", "How many shapes?")
    assert code == 0 and "caf\ufffd.png" in out
    code, out, _ = run(capsys, "demo", "--image", str(path), "--question", CUT, "--json")
    assert code == 0 and json.loads(out)["picture"].endswith("caf\ufffd.png")


def test_chat_reads_lines_of_any_bytes(capsys, monkeypatch, image_path, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    lines = f"/image {bad}\n/image {image_path}\nHow many caf".encode() + b"\xc3\n/quit\n"
    stdin = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    base = ["chat", "--model", str(checkpoint_path()), "--greedy", "--device", "cpu"]
    code, out, err = run(capsys, *base)
    assert code == 0 and len(out.splitlines()) == 1
    assert "bad.png is not an image" in err


def test_chat_keeps_the_conversation(capsys, monkeypatch, image_path):
    lines = f"/image {image_path}\nHow many shapes are there?\nDescribe the picture.\n/image nothing.png\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines + "/reset\n/what\n/quit\n"))
    code, out, err = run(
        capsys, "chat", "--model", str(checkpoint_path()), "--greedy", "--device", "cpu"
    )
    assert code == 0 and "no such file: nothing.png" in err
    assert len(out.splitlines()) == 2 and all(out.splitlines())


def test_a_turn_that_fails_leaves_no_image_behind(capsys, monkeypatch, tmp_path):
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
    assert model["parameters"] > 100_000 and model["ranks"] == [1, 2]


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


def test_verify_says_at_once_how_to_get_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(capsys, "verify", "--against", "transformers")
    assert code == 1 and "mllama-kernels[transformers]" in err and not out


def test_transformers_is_given_nothing_but_weights_and_sizes(capsys, tmp_path):
    """It would run what an attention names on the hub, and load the model that an adapter names."""
    pytest.importorskip("transformers")
    evil = {"attn_implementation": "evil/kernel", "transformers_weights": "../x.safetensors"}
    _edited(tmp_path, "config.json", **evil, auto_map={"AutoModel": "evil.Model"})
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": "evil/base",
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    ask = ["verify", "--model", str(tmp_path), "--against", "transformers", "--json"]
    code, out, err = run(capsys, *ask, "--device", "cpu", "--oracle", "none")
    assert code == 0 and json.loads(out)["against"]["passed"], err


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
