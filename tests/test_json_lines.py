"""Data for fine-tuning, and logs: lines that end at line feeds, strict JSON, faults with their numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from attempts import assert_refused, attempts
from PIL import Image

from mllama.json_lines import read_lines
from mllama.strict_json import parse_json
from mllama.training.conversations import MAX_LINE_BYTES, DataError, read_conversations
from mllama.training.folder import RunFolder, fingerprint
from mllama.training.log import Log, read_log


def line(user: str = "hi", assistant: str = "hello", **more: Any) -> str:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages, **more}, ensure_ascii=False)


def written(folder: Path, data: bytes | str) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def problems(path: Path, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_conversations(path, **options)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 30_000
    return caught.value.problems


# What a line is


@pytest.mark.parametrize(
    "separator",
    ["\u2028", "\u2029", "\x85", "\x7f", "\ufeff", "\u2003", "\U0001f600"],
)
def test_only_line_feeds_end_a_line(tmp_path, separator):
    words = f"before{separator}after"
    one, two = read_conversations(written(tmp_path, line(words) + "\n" + line("b", words) + "\n"))
    assert one.messages[0]["content"] == two.messages[1]["content"] == words


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\n \t\r\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_endings_blank_lines_and_byte_order_marks(tmp_path, ending, mark):
    path = written(tmp_path, mark + line("a") + (ending or "\n") + line("b") + ending)
    found = read_conversations(path)
    assert [c.messages[0]["content"] for c in found] == ["a", "b"]
    blank = max(ending.count("\n"), 1)
    assert [c.line for c in found] == [1, 1 + blank]


def test_carriage_returns_between_values_are_blanks(tmp_path):
    (found,) = read_conversations(written(tmp_path, line().replace(", ", ",\r")))
    assert found.messages[0]["content"] == "hi"


def test_lines_are_cut_at_their_bound(tmp_path):
    path = written(tmp_path, b"abc\nabcd\nabcde\n" + b"x" * 3_000_000 + b"\nabcd")
    assert list(read_lines(path, 4)) == [b"abc\n", b"abcd\n", None, None, b"abcd"]
    assert list(read_lines(path, 5))[2] == b"abcde\n"
    path.write_bytes(b"abcde")
    assert list(read_lines(path, 4)) == [None] and list(read_lines(path, 5)) == [b"abcde"]
    path.write_bytes(b"")
    assert list(read_lines(path, 4)) == []


# Faults


DEEP = 100_000
FAULTS: dict[str, tuple[bytes, str]] = {
    "nested lists": (b"[" * DEEP, "nested too deeply"),
    "nested objects": (b'{"a":' * DEEP, "nested too deeply"),
    "nested and whole": (b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
    "half of a pair": (line("\\ud800").replace("\\\\", "\\").encode(), "half of a surrogate pair"),
    "the other half": (line("\\uDfff").replace("\\\\", "\\").encode(), "half of a surrogate pair"),
    "a pair the wrong way": (line("\\ude00\\ud83d").replace("\\\\", "\\").encode(), "surrogate pair"),
    "half in a key": (b'{"\\ud800": 1}', "half of a surrogate pair"),
    "half as UTF-8": (b'{"messages": "\xed\xa0\x80"}', "not UTF-8"),
    "NaN": (line(weight=float("nan")).encode(), "NaN is no number"),
    "Infinity": (line(weight=float("inf")).encode(), "Infinity is no number"),
    "-Infinity": (line(weight=-float("inf")).encode(), "-Infinity is no number"),
    "a key twice": (b'{"messages": [], ' + line().encode()[1:], "the same key twice"),
    "a key twice within": (line().replace('"content"', '"role"', 1).encode(), "the same key twice"),
    "digits": (b'{"messages": ' + b"9" * 5000 + b"}", "too many digits"),
    "NUL": (line().encode() + b"\0", "not JSON"),
    "NUL in a string": (line("a\0b").replace("\\u0000", "\0").encode(), "not JSON: Invalid control"),
    "only NULs": (bytes(1000), "not JSON"),
    "tab in a string": (line("a\tb").replace("\\t", "\t").encode(), "not JSON: Invalid control"),
    "return in a string": (line("a\rb").replace("\\r", "\r").encode(), "not JSON: Invalid control"),
    "Latin-1": (line("café").encode("latin-1"), "not UTF-8"),
    "UTF-16": (line().encode("utf-16"), "not UTF-8"),
    "overlong": (b'{"messages": "\xc0\xaf"}', "not UTF-8"),
    "two values": (line().encode() * 2, "not JSON: Extra data"),
    "cut": (line().encode()[:-3], "not JSON"),
    "a number": (b"1e999", "expected"),
    "a string": (b'"' + b"a" * 10**6 + b'"', "expected"),
    "a role of a megabyte": (line().replace("user", "u" * 10**6).encode(), "needs a role"),
    "a kind of a megabyte": (
        json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "t" * 10**6}]}]}
        ).encode(),
        "has a part that is neither",
    ),
    "a path of a megabyte": (
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": "p" * 10**6}]},
                    {"role": "assistant", "content": "x"},
                ]
            }
        ).encode(),
        "characters)",
    ),
    "too long": (b'"' + b"a" * MAX_LINE_BYTES + b'"', "longer than 4,194,304 bytes"),
}  # fmt: skip


def test_faults_have_their_line_numbers(tmp_path):
    path = written(
        tmp_path, b"".join(data + b"\n\n" for data, _ in FAULTS.values()) + line().encode()
    )
    found = problems(path)
    assert len(found) == len(FAULTS)
    for number, (name, (_, reason)) in enumerate(FAULTS.items()):
        fault = found[number]
        assert fault.startswith(f"line {2 * number + 1}: ") and reason in fault, (name, fault[:300])
        assert len(fault) < 1200 and fault.isprintable(), name


def test_many_faults_are_counted(tmp_path):
    path = written(tmp_path, "{\n" * 50_000)
    with pytest.raises(DataError, match=r"and 49980 more$") as caught:
        read_conversations(path)
    assert len(caught.value.problems) == 1000 and len(str(caught.value)) < 3000


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n\t\n"])
def test_files_without_a_line(tmp_path, data):
    assert problems(written(tmp_path, data)) == [
        "it is empty: one conversation per line is expected"
    ]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "environment").symlink_to("/proc/self/environ")
    names = ("pipe", "zero", "environment", "gone", ".")
    code = """
import pathlib, sys
from mllama.training.conversations import read_conversations
from mllama.training.folder import fingerprint
from mllama.training.log import read_log
for name in sys.argv[2:]:
    path = pathlib.Path(sys.argv[1]) / name
    attempt(name, lambda: read_conversations(path))
    attempt(f"fingerprint {name}", lambda: fingerprint(path))
    if name != "gone":
        attempt(f"log {name}", lambda: read_log(path))
"""
    found = attempts(code, tmp_path, *names)
    expected = [*names, *(f"fingerprint {n}" for n in names), *(f"log {n}" for n in names)]
    assert_refused(found, [name for name in expected if name != "log gone"], seconds=5)
    assert read_log(tmp_path / "gone") == []


def test_a_line_of_gigabytes_takes_no_memory(tmp_path):
    """A sparse file: a line of 3 GB of NULs, and after it one that is good and one that is not."""
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(3 << 30)
        file.write(b"\n" + line().encode() + b"\n{\n")
    code = """
import pathlib, sys
from mllama.training.conversations import read_conversations
attempt("long", lambda: read_conversations(pathlib.Path(sys.argv[1])))
"""
    found = attempts(code, path, seconds=120, peak=700)
    assert_refused(found, ["long"], seconds=60)
    assert "line 1: longer than" in found["long"].text and "line 3: not JSON" in found["long"].text
    assert "line 2:" not in found["long"].text


# Images of somebody else's data


def with_image(path: str) -> str:
    messages = [
        {"role": "user", "content": [{"type": "image", "path": path}]},
        {"role": "assistant", "content": "x"},
    ]
    return json.dumps({"messages": messages})


def test_images_are_inside_the_folder_of_the_data(tmp_path):
    folder = tmp_path / "data"
    (folder / "photos").mkdir(parents=True)
    for place in (folder / "photos" / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (8, 8)).save(place)
    (folder / "photos" / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "photos" / "inner.png").symlink_to("in.png")
    inside = (
        "photos/in.png",
        "photos/inner.png",
        "photos/../photos/in.png",
        str(folder / "photos/in.png"),
    )
    outside = (
        "../out.png",
        "photos/link.png",
        str(tmp_path / "out.png"),
        "/etc/passwd",
        "../gone.png",
    )
    read_conversations(written(folder, "\n".join(map(with_image, inside))))
    path = written(folder, "\n".join(map(with_image, outside)))
    found = problems(path)
    assert len(found) == len(outside) and all("not inside" in fault for fault in found)
    path = written(folder, "\n".join(map(with_image, (*inside, *outside[:3]))))
    assert len(read_conversations(path, tmp_path)) == 7
    assert len(problems(path, folder=tmp_path / "gone")) == 7
    odd = ("a\0b", "\x1b[2J", "n" * 5000, "data:image/png;base64,aaaa", "http://x/y.png", "")
    found = problems(written(folder, "\n".join(map(with_image, odd))))
    assert len(found) == len(odd) and all(fault.isprintable() for fault in found)


# Logs and records of runs


def test_a_log_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in range(4):
        log.write(step=step, note="a\u2028b\x85c", loss=float("nan") if step == 3 else 0.5)
    log.close()
    path.write_bytes(path.read_bytes() + '{"step": 4, "note": "a\u2028b"}\n{"step": 5'.encode())
    entries = read_log(path)
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4]
    assert {entry["note"].partition("\u2028")[0] for entry in entries} == {"a"}
    Log(path, 2).close()
    assert [entry["step"] for entry in read_log(path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"step": 1}\n[]\n', "line 2 has no step"),
        (b'{"step": 1}\n{"step": null}\n', "line 2 has no step"),
        (b'{"loss": 1}\n', "line 1 has no step"),
        (b"\n", "line 1: Expecting value"),
        (b"[" * 60_000 + b"\n", "line 1: it is nested too deeply"),
        (b"\xff\n", "line 1 is no UTF-8"),
        (b"a" * 10**6, "line 1 has more than"),
    ],
)
def test_a_log_that_is_none(tmp_path, data, reason):
    path = written(tmp_path, data)
    with pytest.raises(ValueError, match=reason) as caught:
        Log(path, 1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"[]", b"{", b"\xff", b"[" * 10**5, b" " * 10**6, b'{"a": 1, "a": 2}']
)
def test_a_record_of_a_run_that_is_none(tmp_path, data):
    (tmp_path / "run.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunFolder(tmp_path, {"seed": 1}, resume=True)


def test_differences_from_another_run_are_short(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({f"\x1b{i}": "x" * 1000 for i in range(200)}))
    with pytest.raises(ValueError, match=r"another run: .* and 161 more") as caught:
        RunFolder(tmp_path, {"seed": 1}, resume=True)
    assert len(str(caught.value)) < 10_000 and str(caught.value).isprintable()


def test_a_fingerprint_is_of_the_whole_content(tmp_path):
    import hashlib

    data = os.urandom(3_000_000)
    assert fingerprint(written(tmp_path, data)) == hashlib.sha256(data).hexdigest()


# JSON itself


def test_json_of_which_nothing_is_guessed():
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", null, true]}')["a"][2] == "\U0001f600"
    assert parse_json("NaN", constants=True) != 0 and parse_json("-Infinity", constants=True) < 0
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', '"\\udfff"', "NaN", "[" * 10**5):
        with pytest.raises(ValueError):
            parse_json(text)
    with pytest.raises(ValueError) as caught:
        parse_json('{"secret": "hunter2", }')
    assert "hunter2" not in str(caught.value) and "secret" not in str(caught.value)
