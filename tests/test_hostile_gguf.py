"""GGUF files that lie: each is refused by name, soon, within little memory, or is what it was."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf_writer
import pytest
import torch
from attempts import Attempt, assert_refused, attempts
from gguf_writer import as_type, write_split, write_unified

from mllama import MllamaConfig, MllamaProcessor
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama.checkpoints.gguf.container import BadGguf, GgufFile
from mllama.checkpoints.gguf.header import BadHeader, read_header
from mllama.demo import checkpoint_path

DEMO = Path(checkpoint_path())
OPENING = """
import pathlib, sys
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama import MllamaProcessor
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    attempt(path.name, lambda: GgufCheckpoint(path, with_vision=False))
"""
STRING, ARRAY, UINT32 = 8, 9, 4
LONG = "\x1b[2J" + "n" * 400  # what a terminal obeys, and nobody reads to its end


def text(value: bytes | str, length: int | None = None) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str = "a",
    shape: tuple[int, ...] = (8,),
    kind: int = 0,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


def file_of(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = bytes(32),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    numbers = (len(tensors), len(entries)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *numbers) + b"".join([*entries, *tensors])
    return header + bytes(-len(header) % alignment) + data


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "three letters": (b"GGU", "truncated"),
    "no magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (file_of(version=1), "GGUF version 1; 2 and 3 are read"),
    "version 4": (file_of(version=4), "GGUF version 4"),
    "version 2^32 - 1": (file_of(version=2**32 - 1), "GGUF version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^63 tensors": (file_of(counts=(2**63, 0)), "tensors; at most"),
    "2^63 entries": (file_of(counts=(0, 2**63)), "entries; at most"),
    "50,000 tensors that are not there": (file_of(data=b"", counts=(50_000, 0)), "truncated"),
    "a key of 2^63 bytes": (file_of([text(b"k", 2**63)]), "a key has"),
    "a key beyond the file": (file_of([text(b"k", 500)]), "truncated"),
    "a text beyond the file": (file_of([entry("k", STRING, text(b"v", 2**20))]), "truncated"),
    "a text of 2^63 bytes": (file_of([entry("k", STRING, text(b"v", 2**63))]), "at most"),
    "a key that is no UTF-8": (
        file_of([entry("k", UINT32, bytes(4)).replace(b"k", b"\xff")]),
        "UTF-8",
    ),
    "a text that is no UTF-8": (file_of([entry("k", STRING, text(b"\xff"))]), "UTF-8"),
    "an entry of an unknown type": (file_of([entry("k", 13, bytes(8))]), "unknown type 13"),
    "an entry twice": (file_of([entry("k", UINT32, bytes(4))] * 2), "the entry k twice"),
    "an array of 2^63 numbers": (file_of([entry("k", ARRAY, array(UINT32, 2**63))]), "elements"),
    "an array beyond the file": (file_of([entry("k", ARRAY, array(10, 2**20))]), "truncated"),
    "texts beyond the file": (
        file_of([entry("k", ARRAY, array(STRING, 2**20, text(b"", 2**62)))]),
        "truncated",
    ),
    "more texts than there are": (
        file_of([entry("k", ARRAY, array(STRING, 2**21, text(b"a")))]),
        "truncated",
    ),
    "an array of arrays": (
        file_of([entry("k", ARRAY, array(ARRAY, 1, array(UINT32, 0)))]),
        "array of arrays",
    ),
    "an array of an unknown type": (file_of([entry("k", ARRAY, array(77, 1))]), "has type 77"),
    "alignment 0": (file_of([entry("general.alignment", UINT32, bytes(4))]), "general.alignment"),
    "alignment 3": (
        file_of([entry("general.alignment", UINT32, struct.pack("<I", 3))]),
        "general.alignment is 3",
    ),
    "an alignment that is text": (
        file_of([entry("general.alignment", STRING, text("32"))]),
        "general.alignment is '32'",
    ),
    "10,000 dimensions": (
        file_of((), [tensor(shape=(1,) * 10_000)]),
        "10,000 dimensions, expected 1 to 4",
    ),
    "2^32 - 1 dimensions": (file_of((), [tensor(dimensions=2**32 - 1)]), "dimensions"),
    "no dimension": (file_of((), [tensor(shape=())]), "0 dimensions"),
    "a size of 0": (file_of((), [tensor(shape=(0, 2**62))]), "impossible shape"),
    "2^63 elements": (file_of((), [tensor(shape=(2**63,))]), "impossible shape"),
    "a product of 2^128": (file_of((), [tensor(shape=(2**32,) * 4)]), "impossible shape"),
    "a product that wraps to 8": (file_of((), [tensor(shape=(2**61 + 1, 8))]), "impossible shape"),
    "an unknown element type": (file_of((), [tensor(kind=99)]), "unknown type 99"),
    "a type that is gone": (file_of((), [tensor(kind=4)]), "unknown type 4"),
    "a row of half a block": (file_of((), [tensor(shape=(48,), kind=8)]), "no whole blocks of 32"),
    "data beyond the file": (file_of((), [tensor(shape=(2**40,))]), "truncated: a ends at"),
    "an offset beyond the file": (file_of((), [tensor(offset=2**62)]), "is said to begin at"),
    "an offset of 2^64 - 32": (file_of((), [tensor(offset=2**64 - 32)]), "is said to begin at"),
    "two tensors in one place": (file_of((), [tensor("a"), tensor("b")]), "data of b is said"),
    "a gap before a tensor": (file_of((), [tensor(offset=32)], bytes(96)), "data of a is said"),
    "a tensor twice": (file_of((), [tensor(), tensor(offset=32)], bytes(64)), "tensor a twice"),
    "a name of 2^40 bytes": (file_of((), [text(b"a", 2**40)]), "name has"),
    "a long name twice": (file_of((), [tensor(LONG), tensor(LONG, offset=32)], bytes(64)), "twice"),
    "a long key twice": (file_of([entry(LONG, UINT32, bytes(4))] * 2), "twice"),
    "no tensor": (file_of(), "projector file"),
    "another architecture": (
        file_of(
            [entry("general.architecture", STRING, text("\x1b[31m" + "x" * 2**20))], [tensor()]
        ),
        "expected 'mllama'",
    ),
    "an architecture that is a list": (
        file_of([entry("general.architecture", ARRAY, array(UINT32, 0))], [tensor()]),
        "expected 'mllama'",
    ),
}


def found(folder: Path, cases: dict[str, bytes], **limits: Any) -> dict[str, Attempt]:
    folder.mkdir()
    for number, data in enumerate(cases.values()):
        (folder / f"{number:04d}").write_bytes(data)
    ended = attempts(OPENING, folder, **limits)
    return {name: ended[f"{number:04d}"] for number, name in enumerate(cases)}


def test_lies_are_refused_by_name(tmp_path):
    """And in few words, none of which a terminal obeys: `attempts` sees to that."""
    cases = found(tmp_path / "cases", {name: data for name, (data, _) in HOSTILE.items()})
    assert_refused(cases, HOSTILE)
    for name, one in cases.items():
        assert HOSTILE[name][1] in one.text, (name, one.text)
        assert one.seconds < 1, (name, one)


@pytest.mark.parametrize("size", [2**18])
def test_a_header_of_many_texts_is_passed_over(size, tmp_path):
    """Which is what a vocabulary is: nothing of it is kept before it is asked for."""
    tokens = entry("tokenizer.ggml.tokens", ARRAY, array(STRING, size, text(b"ab") * size))
    (tmp_path / "m").write_bytes(file_of([tokens], [tensor()]))
    file = GgufFile(tmp_path / "m")
    assert file.array("tokenizer.ggml.tokens") == ["ab"] * size


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", Path("/proc/self/maps")):
        with pytest.raises(BadGguf, match="cannot be read"):
            GgufFile(path)


def test_every_cut_is_noticed(tmp_path):
    """A file that ends early, wherever it does."""
    whole = write_unified(DEMO, tmp_path / "model.gguf", as_type("Q8_0")).read_bytes()
    path = tmp_path / "cut.gguf"
    end = len(whole) - 32  # after the last tensor there may be padding
    for length in (*range(0, 200, 7), *random.sample(range(200, end), 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf cannot be read: it is"):
            GgufCheckpoint(path)


def test_a_header_that_is_cut_while_it_is_read():
    """It is read and not mapped, which would end the process; nor does another error get out."""
    tokens = entry("tokens", ARRAY, array(STRING, 9, text(b"ab") * 9))
    numbers = entry("numbers", ARRAY, array(UINT32, 5, bytes(20)))
    whole = file_of([tokens, numbers, entry("k", STRING, text("v"))], [tensor()])
    assert set(read_header(io.BytesIO(whole), len(whole))[0]) == {"tokens", "numbers", "k"}
    header = len(whole) - 32 - 31  # the data, and at most so much before it
    for length in range(header):
        with pytest.raises(
            BadHeader, match=f"cut while it was read: {length} of its {len(whole)} bytes"
        ):
            read_header(io.BytesIO(whole[:length]), len(whole))


def test_a_header_is_read_in_parts_of_any_length(monkeypatch):
    whole = file_of(
        [
            entry("a", ARRAY, array(STRING, 40, b"".join(text("x" * n) for n in range(40)))),
            entry("b", ARRAY, array(UINT32, 50, bytes(200))),
            entry("c", STRING, text("y" * 99)),
        ],
        [tensor(f"t{n}", offset=32 * n) for n in range(4)],
        bytes(128),
    )
    expected = read_header(io.BytesIO(whole), len(whole))
    for size in (1, 7, 8, 64, 333):
        monkeypatch.setattr("mllama.checkpoints.gguf.header._AT_ONCE", size)
        assert read_header(io.BytesIO(whole), len(whole)) == expected


@pytest.mark.parametrize("kind", [STRING, UINT32])
def test_an_array_that_changes_while_it_is_read(kind, tmp_path, monkeypatch):
    elements = text(b"ab") * 9 if kind == STRING else bytes(range(1, 37))
    whole = file_of([entry("k", ARRAY, array(kind, 9, elements))], [tensor()])
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    file, changes = GgufFile(path), []
    at = whole.index(elements)
    for place in range(at, at + len(elements)):
        changed = bytearray(whole)
        changed[place] ^= 0x80
        changes.append(bytes(changed))
    for data in changes:
        path.write_bytes(data)
        try:
            assert len(file.array("k")) == 9
        except BadGguf as error:
            assert "m.gguf" in str(error) and kind == STRING
    # Cut after its length was compared.
    path.write_bytes(whole)
    before = path.stat()
    monkeypatch.setattr(os, "fstat", lambda _: before)
    path.write_bytes(whole[: at + 20])
    with pytest.raises(BadGguf, match=r"m\.gguf was changed .*: of k 20 bytes are there, expected"):
        file.array("k")
    with pytest.raises(BadGguf, match=r"m\.gguf was cut .*: of a 0 bytes are there, expected 32"):
        file.read(file.tensors["a"])


def opened(*files: Path) -> tuple[Any, ...] | None:
    """All that a model is made of; None where an error says that there is none."""
    try:
        checkpoint = GgufCheckpoint(*files)
        config = MllamaConfig.from_dict(checkpoint.config)
        if checkpoint.problems or checkpoint.config_problems(config):
            return None
        values = dict(checkpoint.read(list(checkpoint.tensors)))
    except ValueError:
        return None
    return config.to_dict(), checkpoint.tensors, values


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return torch.equal(one.blocks(), other.blocks())


@pytest.mark.parametrize("dialect", ["unified", "split"])
def test_flipped_bytes_are_errors_or_stay_where_they_are(dialect, tmp_path):
    """Of the header: an error, another configuration, or what it was. Of the data: its own tensor."""
    if dialect == "unified":
        files = [write_unified(DEMO, tmp_path / "model.gguf", as_type("Q8_0"))]
    else:
        names = (tmp_path / "text.gguf", tmp_path / "projector.gguf")
        files = list(write_split(DEMO, *names, as_type("Q4_0")))
    expected = opened(*files)
    assert expected is not None
    for file in files:
        whole = bytearray(file.read_bytes())
        tensors = GgufFile(file).tensors.values()
        data = min(one.begin for one in tensors)
        places = [*random.sample(range(data), 40), *random.sample(range(data, len(whole)), 8)]
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << random.randrange(8)
            file.write_bytes(flipped)
            result = opened(*files)
            if result is None or result[:2] != expected[:2]:
                assert place < data or result is None, place
                continue
            changed = {n for n, v in result[2].items() if not equal(v, expected[2][n])}
            hit = {one.name for one in tensors if 0 <= place - one.begin < one.nbytes}
            stored = {expected[1][name].stored_name for name in changed}
            assert stored <= hit, (place, changed, hit)
            assert place < data or len(changed) <= 1
        file.write_bytes(whole)


def test_flipped_bytes_of_a_vocabulary(tmp_path):
    """A processor, or an error that names the file; never one of another library."""
    path = write_unified(DEMO, tmp_path / "model.gguf")
    whole = path.read_bytes()
    begin = whole.index(b"tokenizer.chat_template")
    end = whole.index(b"v.class_embd")
    for _ in range(80):
        flipped = bytearray(whole)
        flipped[random.randrange(begin, end)] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        try:
            processor = MllamaProcessor.from_pretrained(path)
        except ValueError as error:
            assert "model.gguf" in str(error) or "the tokenizer has no image token" in str(error)
            continue
        processor.tokenizer.encode("How many red circles are there? <|image|>")


def test_vocabularies_that_lie(tmp_path):
    weights, config = gguf_writer.stored(DEMO)
    entries = gguf_writer.text_entries(DEMO, config, pre="llama-bpe")
    entries |= gguf_writer.vision_entries(config)
    # One of each half, so that the file passes for a whole model.
    small = weights["vision_model.class_embedding"].float().numpy()
    tensors = {"v.x": small, "output_norm.weight": small}
    tokens, kinds = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]

    def refused(problem: str, **changes: Any) -> None:
        changed = {**entries, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()}}
        changed = {key: value for key, value in changed.items() if value is not None}
        path = gguf_writer.write(tmp_path / "m.gguf", changed, tensors)
        with pytest.raises(ValueError, match=problem):
            MllamaProcessor.from_pretrained(path)

    refused("tokenizer.ggml.model is 'llama'; only gpt2 is read", model="llama")
    refused("tokenizer.ggml.pre is 'qwen2'; only llama-bpe, smaug-bpe is read", pre="qwen2")
    refused("tokenizer.ggml.pre is None", pre=None)
    refused("must be lists of strings", tokens=None)
    refused("must be lists of strings", tokens=[1, 2, 3])
    refused("tokenizer.ggml.tokens must be an array", tokens="words")
    refused("a number for each of 451 tokens", token_type=kinds[:-1])
    refused("do not follow the words", token_type=[*kinds[:-1], 1])
    refused("different ones of at most 512", tokens=[*tokens[:-1], tokens[0]])
    refused("different ones of at most 512", tokens=[*tokens[:-1], "x" * 513])
    refused("different ones of at most 512", tokens=["", *tokens[1:]])
    refused("the merge 'r nowhere' is none", merges=["r nowhere"])
    refused("the merge 're' is none", merges=["re"])
    refused("the merge 'r e e' is none", merges=["r e e"])
    refused("bos_token_id must be a token below 451, got 451", bos_token_id=451)
    refused("eos_token_id must be a token below 451, got 'x'", eos_token_id="x")
