"""Files of requests in OpenAI's batch format: lines, wrong ones, and `mllama generate --batch`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from grammar_helpers import demo_compiler
from server_helpers import EchoEngine

from mllama import cli
from mllama.commands import engines
from mllama.demo import sample_picture
from mllama.server.app import create_app
from mllama.server.batches import Ask, Wrong, answer_batch, answered, read_batch
from mllama.server.settings import Settings

MOST = 10_000


def asked(custom_id: Any, text: str = "one two", **others: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **others}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "asked.jsonl"
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(rows) + "\n")
    return path


def answers_of(
    path: Path, at_once: int = 3, engine: Any = None, found: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    found = [] if found is None else found
    settings = Settings(models=("echo",), version="1")
    app = create_app(engine or EchoEngine(), settings, demo_compiler(), True)
    asyncio.run(answer_batch(app, read_batch(path, MOST), found.append, at_once))
    return found


# Lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "it is no JSON"),
        ('{"a": 1, "a": 2}', "the same key twice"),
        ("[1]", "expected an object, got an array of 1 value"),
        ({"method": "POST"}, "custom_id is missing"),
        (asked(7), "custom_id must be a string of 1 to 512 characters, got 7"),
        (asked(""), "custom_id must be"),
        ({**asked("a"), "method": "GET"}, 'method must be POST, got "GET"'),
        ({**asked("a"), "url": "/v1/embeddings"}, "url must be /v1/chat/completions or"),
        ({**asked("a"), "url": ["x"]}, "url must be"),
        ({**asked("a"), "body": "x"}, 'body must be an object, got "x"'),
        (asked("a", stream=True), "body.stream asks for a stream"),
        (asked("a", "x" * 80_000), f"more than the {MOST} bytes"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_is_no_request_says_why_with_its_number(tmp_path, line, reason):
    path = written(tmp_path, asked("first"), "", line, asked("last"))
    first, wrong, last = read_batch(path, MOST)
    assert isinstance(first, Ask) and isinstance(last, Ask) and (first.line, last.line) == (1, 4)
    assert isinstance(wrong, Wrong) and wrong.line == 3
    assert wrong.reason.startswith("line 3: ") and reason in wrong.reason


def test_an_id_is_given_once(tmp_path):
    path = written(tmp_path, asked("a"), asked("b"), asked("a"))
    *_, wrong = read_batch(path, MOST)
    assert isinstance(wrong, Wrong) and wrong.custom_id == "a"
    assert wrong.reason == 'line 3: custom_id "a" is that of line 1, too'


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl cannot be read"):
        list(read_batch(tmp_path / "nowhere.jsonl", MOST))


# Answers


def test_answers_are_those_of_the_server_and_wrong_lines_stop_no_other(tmp_path):
    path = written(
        tmp_path,
        asked("chat", "a b c", model="echo", max_tokens=2),
        "nonsense",
        asked("no model", model="another"),
        asked("bad", temperature=9),
        asked("fails", "!fail a b c"),
        {**asked("text"), "url": "/v1/completions", "body": {"prompt": ["a b", "c"]}},
        asked("picture", "x"),
    )
    found = {line["custom_id"]: line for line in answers_of(path)}
    assert len(found) == 7 and len({line["id"] for line in found.values()}) == 7
    chat = found["chat"]["response"]
    assert chat["status_code"] == 200 and chat["request_id"].startswith("req_")
    assert chat["body"]["choices"][0]["message"]["content"] == "a b"
    assert chat["body"]["choices"][0]["finish_reason"] == "length"
    assert found["chat"]["error"] is None
    assert found[None]["response"] is None
    assert found[None]["error"]["line"] == 2 and "line 2: " in found[None]["error"]["message"]
    for name, status, said in (
        ("no model", 404, "another"),
        ("bad", 400, "temperature must be a number from 0 to 2, got 9"),
        ("fails", 500, "not finite"),
    ):
        response = found[name]["response"]
        assert response["status_code"] == status and found[name]["error"] is None
        assert said in response["body"]["error"]["message"]
    texts = [choice["text"] for choice in found["text"]["response"]["body"]["choices"]]
    assert texts == ["a b", "c"]


def test_no_more_are_open_than_asked_for(tmp_path):
    engine, ended, most = EchoEngine(), [], 0
    submit = engine.submit

    async def counted(work: Any) -> Any:
        nonlocal most
        most = max(most, len(engine.works) + 1 - len(ended))
        return await submit(work)

    engine.submit = counted
    path = written(tmp_path, *(asked(str(i), "!slow a b") for i in range(7)))
    answers_of(path, 3, engine, ended)
    assert len(ended) == 7 and most == 3


def test_a_full_queue_is_asked_again(tmp_path):
    engine = EchoEngine()
    submit, refused = engine.submit, []

    async def first_full(work: Any) -> Any:
        if not refused:
            refused.append(work)
            work.messages[-1]["content"] = "!full"
        return await submit(work)

    engine.submit = first_full
    (line,) = answers_of(written(tmp_path, asked("a")), 1, engine)
    assert refused and line["response"]["status_code"] == 200


def test_an_engine_that_has_failed_ends_it(tmp_path):
    engine = EchoEngine()
    engine.state = "dead"
    path = written(tmp_path, *(asked(str(i)) for i in range(9)))
    with pytest.raises(RuntimeError, match="the engine has failed"):
        answers_of(path, 2, engine)


def test_what_was_answered_is_known_and_what_was_cut_off_is_not(tmp_path):
    def line(custom_id: str | None, status: int | None) -> str:
        response = None if status is None else {"status_code": status, "body": {}}
        return json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": None})

    path = tmp_path / "out.jsonl"
    rows = [line("a", 200), line("b", 400), line(None, None), line("c", 200)]
    path.write_text("\n".join(rows) + "\n" + line("d", 200)[:-5])
    assert list(answered(path)) == ["a", "c"]
    path.write_text("what is this\n")
    with pytest.raises(ValueError, match=r"out\.jsonl cannot be gone on with: line 1"):
        answered(path)


# The command


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["generate", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batch a --temperature 1", "--temperature does not go with --batch"),
        ("--batch a --image b", "--image does not go with --batch"),
        ("--batch a --greedy", "--greedy does not go with --batch"),
        ("--batch a --no-escape-special-tokens", "--no-escape-special-tokens does not go"),
        ("--batch a --top-k 0", "--top-k must be above zero, got 0"),
        ("--batch a --resume", "--resume goes on with the file of --output"),
        ("--prompt a --output b", "--output does not go with --prompt"),
        ("--prompt a --max-batch-size 3", "--max-batch-size does not go with --prompt"),
        ("--batch a --dtype float32 --quantization-encoding bfloat16", "contradict each other"),
    ],
)
def test_options_without_effect_exit_with_2(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(engines, "load_weights", None)
    code, out, err = run(capsys, *arguments.split())
    assert code == 2 and out == "" and said in err


@pytest.mark.parametrize("arguments", ["", "--batch a --prompt b"])
def test_a_prompt_or_a_file(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *arguments.split()])
    assert stop.value.code == 2


def test_files_are_looked_at_before_the_model_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "load_weights", None)
    path = written(tmp_path, asked("a"))
    code, _, err = run(capsys, "--batch", str(tmp_path / "none.jsonl"))
    assert code == 1 and "none.jsonl cannot be read" in err
    code, _, err = run(capsys, "--batch", str(path), "--output", str(tmp_path / "no" / "x"))
    assert code == 1 and "there is no folder" in err
    code, _, err = run(capsys, "--batch", str(path), "--output", str(path))
    assert code == 2 and "is there already: --resume goes on with it" in err
    empty = written(tmp_path, "")
    code, _, err = run(capsys, "--batch", str(empty))
    assert code == 1 and "has no request" in err


def test_too_little_memory_is_refused_with_the_numbers(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "load_weights", None)
    monkeypatch.setattr(engines, "free_bytes", lambda device: 10**6)
    code, _, err = run(capsys, "--batch", str(written(tmp_path, asked("a"))))
    assert code == 1 and "GB are missing" in err and "--force loads it all the same" in err
    assert "memory: weights" in err  # told before


def test_a_file_is_answered_and_gone_on_with(capsys, tmp_path):
    """Through the engine; then as after a kill, with an output that lacks the last answer."""
    picture, scene = sample_picture(186)
    picture.save(file := io.BytesIO(), "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "How many shapes are there?"},
    ]
    path = written(
        tmp_path,
        asked("picture", parts, max_tokens=40, temperature=0),
        "nonsense",
        asked("text", "Hi.", max_tokens=5),
    )
    out = tmp_path / "out.jsonl"
    base = ["--batch", str(path), "--output", str(out), "--max-batch-size", "2"]
    code, printed, err = run(capsys, *base, "--max-length", "512")
    assert code == 1 and printed == "" and "1 of 3 requests were not answered" in err
    assert "context: 512 tokens" in err
    found = {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    body = found["picture"]["response"]["body"]
    assert body["model"] == "mllama-demo" and body["choices"][0]["finish_reason"] == "stop"
    assert str(len(scene.shapes)) in body["choices"][0]["message"]["content"]
    assert 0 < found["text"]["response"]["body"]["usage"]["completion_tokens"] <= 5
    assert found[None]["error"]["line"] == 2

    path.write_text(path.read_text().replace("nonsense\n", ""))
    out.write_text(json.dumps(found["picture"]) + "\n" + json.dumps(found["text"])[:-9])
    code, _, err = run(capsys, *base, "--resume")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and "answering 1 of 2" in err
    assert lines[0] == found["picture"] and [e["custom_id"] for e in lines] == ["picture", "text"]
    assert lines[1]["id"] != found["text"]["id"]
    code, _, err = run(capsys, *base, "--resume")
    assert code == 0 and "all of 2 requests are answered already" in err
