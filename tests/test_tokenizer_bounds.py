"""Files of a tokenizer: how much of them is read, which are opened, and that every field is checked."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from mllama.demo import checkpoint_path
from mllama.processing.tokenizer import MllamaTokenizer

DEMO = Path(checkpoint_path())
PLAIN = json.loads((DEMO / "tokenizer.json").read_text())


def changed(**changes):
    return json.dumps({**PLAIN, **changes})


BAD_SIZES = {
    "tokens": (
        lambda: changed(model={**PLAIN["model"], "vocab": {f"{i}": i for i in range(2**20 + 1)}}),
        "it has 1048577 tokens; at most 1048576",
    ),
    "merges": (
        lambda: changed(model={**PLAIN["model"], "merges": [["a", "b"]] * (2**21 + 1)}),
        r"it has 20971\d\d lists; at most 2097152",
    ),
    "old merges": (
        lambda: changed(model={**PLAIN["model"], "merges": [""] * (2**23 + 1)}),
        r"it has \d+ entries; at most 8388608",
    ),
    "added tokens": (
        lambda: changed(added_tokens=[{"content": "a"}] * (2**16 + 1)),
        "it has 65537 added tokens",
    ),
    "the text of added tokens": (
        lambda: changed(added_tokens=[{"content": f"{i:0>400}"} for i in range(2622)]),
        "its added tokens have 1048800 characters; at most 1048576",
    ),
    "an id": (
        lambda: changed(model={**PLAIN["model"], "vocab": {"a": 0, "b": 2**31}}),
        "its token 'b' has id 2147483648; at most 2097152 is read",
    ),
    "a token": (
        lambda: changed(model={**PLAIN["model"], "vocab": {"a" * 10**6: 0}}),
        r"its token 'a+'\.\.\. \(1000000 characters\) has 1000000 characters; at most 512",
    ),
    "lists": (lambda: "[" * 10**6, "it is no JSON: it is nested too deeply"),
    "a list": (lambda: "[]", "it holds a list and no tokenizer"),
    "rubbish": (lambda: "\x00\x01", "it is no JSON"),
    "keys": (
        lambda: '{"model": {}, "model": {}}',
        "it is no JSON: an object has the same key twice",
    ),
    "numbers": (
        lambda: '{"model": ' + "9" * 10_000 + "}",
        "it is no JSON: a number has too many digits",
    ),
    "size": (lambda: " " * (64 * 2**20 + 1), "it has 67108865 bytes; at most 67108864"),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_sizes_are_bounded(name, tmp_path):
    make, text = BAD_SIZES[name]
    (tmp_path / "tokenizer.json").write_text(make())
    start = time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer: " + text) as caught:
        MllamaTokenizer.from_pretrained(tmp_path)
    assert time.process_time() - start < 10 and len(str(caught.value)) < 500


def test_other_files_are_not_opened(tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name
        folder.mkdir()
        for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.mkdir()):
            path = folder / name
            make(path)
            with pytest.raises(ValueError, match=r"it is not a regular file"):
                MllamaTokenizer.from_pretrained(folder)
            path.rmdir() if path.is_dir() else path.unlink()


def lines(*tokens):
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            lines(b"a" * 513),
            "line 1 is not a base64 token and its rank, or the token has more than",
        ),
        (lines(b"a" * 10**6), "line 1 is not a base64 token"),
        (lines(b""), "line 1 is not a base64 token"),
        (b"YQ== " + b"9" * 5000, "line 1 is not a base64 token"),
        (b"YQ== 0\nYQ== 1\n", "its ranks do not count from 0"),
        (b"\n" * (2**20 + 1), "it has 1048577 lines"),
        (
            lines(
                *{
                    bytes(97 + (i >> b & 1) for b in range(n))
                    for n in range(1, 19)
                    for i in range(2**n)
                }
            ),
            "tokens have 8912898 bytes; at most 4194304",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiktoken_files_are_bounded(content, text, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.model .*" + text) as caught:
        MllamaTokenizer.from_pretrained(tmp_path)
    assert time.process_time() - start < 20 and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        (file, name, value)
        for file in ("tokenizer_config.json", "special_tokens_map.json")
        for name, value in (
            ("bos_token", 5),
            ("bos_token", {"content": 5}),
            ("bos_token", {"no content": "x"}),
            ("bos_token", ["<|eot_id|>"]),
            ("bos_token", "a" * 10**6),
            ("x_token", 5),
            ("extra_special_tokens", 5),
            ("extra_special_tokens", "abc"),
            ("extra_special_tokens", [5]),
            ("extra_special_tokens", [None]),
            ("extra_special_tokens", {"a_token": 5}),
            ("additional_special_tokens", [["x"]]),
            ("additional_special_tokens", ["x"] * 10**5),
        )
    ]
    + [
        ("tokenizer_config.json", name, value)
        for name, value in (
            ("model_max_length", "x"),
            ("model_max_length", float("nan")),
            ("model_max_length", float("-inf")),
            ("model_max_length", -1),
            ("model_max_length", [1]),
            ("model_max_length", True),
            ("padding_side", "x"),
            ("padding_side", 5),
            ("padding_side", None),
            ("truncation_side", ["left"]),
            ("split_special_tokens", "yes"),
            ("split_special_tokens", 1),
            ("chat_template", 5),
            ("chat_template", [{"name": [1], "template": 2}]),
            ("chat_template", [{"name": "a"}]),
            ("chat_template", {"a": 5}),
        )
    ],
    ids=lambda value: str(value)[:30],
)
def test_fields_are_checked_and_named(file, name, value, tmp_path):
    shutil.copytree(DEMO, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "folder" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    shown = name if not isinstance(value, dict) or "a_token" not in value else "a_token"
    with pytest.raises(ValueError, match=rf"{file}: {shown} must be ") as caught:
        MllamaTokenizer.from_pretrained(path.parent)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("value", "length"),
    [
        (float("inf"), int(1e30)),
        (1e30, int(1e30)),
        (10**400, int(1e30)),
        (77.0, 77),
        (0, int(1e30)),
    ],
)
def test_lengths_that_mean_something(value, length, tmp_path):
    shutil.copytree(DEMO, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "folder" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "model_max_length": value, "add_bos_token": True}
    path.write_text(json.dumps(config))
    assert MllamaTokenizer.from_pretrained(path.parent).model_max_length == length
