"""Checkpoint folders that lie: each is refused by name, soon, within little memory, and quotes no file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Attempt, assert_refused, attempts
from meta_writer import write_original
from safetensors.torch import load_file

from mllama.checkpoints.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_NAME,
    MAX_TENSORS,
    BadHeader,
    read_header,
)
from mllama.demo import checkpoint_path

LOADING = """
import os, pathlib, shutil, sys
from mllama import MllamaForConditionalGeneration
from mllama.training.adapters import use_adapter

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
model = folder / "model"
for path in sorted((folder / "cases").iterdir()):
    place = model / name
    place.unlink(missing_ok=True)
    os.link(path, place, follow_symlinks=False)
    attempt(path.name, lambda: MllamaForConditionalGeneration.from_pretrained(model))
    if name == "model.safetensors":
        os.replace(place, folder / "adapter" / "adapter_model.safetensors")
        attempt(f"{path.name} as an adapter", lambda: use_adapter(None, folder / "adapter"))
"""
SECRET = "hunter2-TOPSECRET"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the demo checkpoint in `model`, an adapter without weights, and a secret beside them."""
    shutil.copytree(checkpoint_path(), tmp_path / "model")
    for name in ("cases", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path


def ended(folder: Path, name: str, cases: dict[str, bytes], **limits: Any) -> dict[str, Attempt]:
    for case, data in cases.items():
        (folder / "cases" / case).write_bytes(data)
    found = attempts(LOADING, folder, name, **limits)
    for case, one in found.items():
        assert SECRET not in one.text and "hunter2" not in one.text, case
    return found


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: Any = 0, end: Any = 4, shape: Any = (1,), dtype: Any = "F32", **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def one(data: bytes = bytes(4), **fields: Any) -> bytes:
    return file_of({"a": entry() | fields}, data)


HEADERS: dict[str, bytes] = {
    "length 2^63": file_of(b"", length=2**63),
    "length 2^64 - 1": file_of(b"{}", length=2**64 - 1),
    "length beyond": file_of(b"{}", length=3),
    "length of the secret": SECRET.encode(),
    "empty": b"",
    "seven bytes": b"1234567",
    "no tensors": file_of({}),
    "no tensors but data": file_of({}, bytes(4)),
    "a list": file_of(b"[]"),
    "a number": file_of(b"5"),
    "nothing": file_of(b""),
    "blanks": file_of(b" " * 1000),
    "zeros": bytes(1000),
    "a number for a tensor": file_of(b'{"a":1}'),
    "a float for a tensor": file_of({"a": 5.5}),
    "a list for a tensor": file_of({"a": []}),
    "an empty tensor entry": file_of({"a": {}}),
    "overlap": file_of({"a": entry(), "b": entry()}, bytes(4)),
    "half an overlap": file_of({"a": entry(), "b": entry(2, 6)}, bytes(6)),
    "inside": file_of({"a": entry(0, 12, (3,)), "b": entry(4, 8)}, bytes(12)),
    "gap": file_of({"a": entry(), "b": entry(8, 12)}, bytes(12)),
    "gap in front": file_of({"a": entry(4, 8)}, bytes(8)),
    "backwards": one(data_offsets=[4, 0]),
    "offsets of 2^63": one(data_offsets=[0, 2**63]),
    "offsets of 2^64": one(data_offsets=[2**64 - 4, 2**64]),
    "offsets beyond": one(data_offsets=[1000, 1004]),
    "offsets negative": one(data_offsets=[-4, 0]),
    "offsets of 10^400": one(data_offsets=[0, 10**400]),
    "one offset": one(data_offsets=[0]),
    "three offsets": one(data_offsets=[0, 4, 8]),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "offsets are a string": one(data_offsets="04"),
    "offsets are floats": one(data_offsets=[0.0, 4.0]),
    "offsets are bools": one(data_offsets=[False, 4]),
    "offsets are an object": one(data_offsets={"0": 4}),
    "truncated": one(bytes(3)),
    "too much": one(bytes(5)),
    "shape of 2^62 x 4": one(shape=[2**62, 4], data_offsets=[0, 0]),
    "shape of 0 x 2^62 x 2^62": one(b"", shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "shape of 10^40": one(shape=[10**40]),
    "shape with a bool": one(shape=[True]),
    "shape with a float": one(shape=[1.0]),
    "shape with a negative": one(shape=[-1, -1]),
    "shape with NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "shape with null": one(shape=[None]),
    "shape is a string": one(shape="1"),
    "shape is an object": one(shape={}),
    "shape is missing": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "shape of 17 dimensions": one(shape=[1] * 17),
    "shape of 100000 dimensions": one(shape=[1] * 10**5),
    "shape that does not fit": one(shape=[2]),
    "digits": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "dtype is a list": one(dtype=["F32"]),
    "dtype is null": one(dtype=None),
    "dtype F4": one(dtype="F4"),
    "dtype unknown": one(dtype="F33"),
    "dtype in small letters": one(dtype="f32"),
    "dtype of a megabyte": one(dtype="F\x1b" * 10**6),
    "dtype of half a pair": one(dtype="\ud800"),
    "a key twice": file_of(
        b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)
    ),
    "a field twice": file_of(
        b'{"a":{"dtype":"F32","dtype":"I8","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "nested lists": file_of(b"[" * 100_000),
    "nested objects": file_of(b'{"a":' * 100_000),
    "metadata with numbers": file_of({"__metadata__": {"a": 5}}),
    "metadata is a list": file_of({"__metadata__": []}),
    "metadata is null": file_of({"__metadata__": None}),
    "metadata nested": file_of({"__metadata__": {"a": {"b": "c"}}}),
    "metadata of 300000": file_of({"__metadata__": {str(i): "" for i in range(300_000)}}),
    "name of half a pair": file_of({"\ud800": entry()}, bytes(4)),
    "name of control characters": file_of({"\x1b[31m\r\n\u202e": entry()}, bytes(4)),
    "name of a megabyte": file_of({"n" * 10**6: entry()}, bytes(4)),
    "name with NUL": file_of({"a\0b": entry()}, bytes(4)),
    "no name": file_of({"": entry()}, bytes(4)),
    "no UTF-8": file_of(b"\xff\xfe{}"),
    "after a byte-order mark": file_of(b"\xef\xbb\xbf{}"),
    "UTF-16": file_of("{}".encode("utf-16")),
    "cut JSON": file_of(b'{"a":'),
    "two values": file_of(b"{}{}"),
    "a pickle": b"\x80\x02}q\x00.",
    "a zip file": b"PK\3\4" + bytes(100),
    "100000 tensors": file_of(
        {str(i): entry(0, 0, (0,)) for i in range(100_000)}
    ),
    "40000 tensors that nobody wants": file_of(
        {f"\x1b{i}": entry(0, 0, (0,)) for i in range(40_000)}
    ),
    "9 MB": file_of(b" " * 9_000_000),
    "8 MB of lists": file_of(b'{"a":[' + b",".join([b"[]"] * 2_700_000) + b"]}"),
    "8 MB of objects": file_of(b'{"a":[' + b",".join([b"{}"] * 2_700_000) + b"]}"),
    "8 MB of names": file_of(b"{" + b",".join(b'"%x":0' % i for i in range(700_000)) + b"}"),
}  # fmt: skip


def test_headers_that_lie(folder):
    found = ended(folder, "model.safetensors", HEADERS, seconds=180, longest=40_000)
    # What only a model finds out: that the names are others than its own.
    fine = {"no tensors", "name of control characters", "name with NUL", "no name"}
    fine |= {"40000 tensors that nobody wants", "dtype unknown", "dtype in small letters"}
    adapters = {f"{name} as an adapter" for name in HEADERS}
    for name in fine:
        del found[f"{name} as an adapter"]
    assert_refused(found, [*HEADERS, *(adapters - {f"{name} as an adapter" for name in fine})])
    for name in HEADERS:
        assert found[name].kind == "refused CheckpointError", (name, found[name])
        assert "model.safetensors" in found[name].text or name in fine, (name, found[name])


def test_a_header_of_a_million_tensors(folder):
    """99 MB of header: 23 s and 2.4 GB before its length was looked at."""
    entries = (
        b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_500_000)
    )
    cases = {"million": file_of(b"{" + b",".join(entries) + b"}")}
    found = ended(folder, "model.safetensors", cases, peak=800)
    assert_refused(found, ["million", "million as an adapter"])  # the second imports PEFT
    assert found["million"].seconds < 1


def test_bounds_leave_room(tmp_path):
    """What is read has many times the tensors, and names many times as long, as any real checkpoint."""
    path = tmp_path / "model.safetensors"
    many = {f"{i:0{MAX_NAME}}": entry(4 * i, 4 * i + 4) for i in range(3000)}
    path.write_bytes(file_of(many, bytes(12_000)))
    assert len(read_header(path).tensors) == 3000 and read_header(path).problem is None
    assert MAX_TENSORS >= 20 * 1700 and MAX_HEADER_BYTES >= 20 * 200_000
    path.write_bytes(file_of({"a" * (MAX_NAME + 1): entry()}, bytes(4)))
    with pytest.raises(BadHeader, match="at most 512"):
        read_header(path)


NAMES: list[Any] = [
    "../a.safetensors", "/etc/passwd", "..\\a.safetensors", "a.safetensors/", ".", "..", "", "\0",
    "a\0.safetensors", " .safetensors", "x.bin", "C:a.safetensors", "C:\\a.safetensors",
    "\\\\host\\a.safetensors", "\ud800.safetensors", "a" * 300 + ".safetensors",
    "a" * 10**6 + ".safetensors", 5, None, True, 1.5, ["a.safetensors"], {"a": 1}, "~/a.safetensors",
    "$HOME.safetensors", "file:a.safetensors", "http://x/a.safetensors", "a.safetensors\n",
    "\x1b[2J.safetensors", "sub/a.safetensors", "./a.safetensors", "../secret", "a.SAFETENSORS",
    "model.safetensors.index.json", "config.json", "a.safetensors.bin", "%2e%2e%2fa.safetensors",
]  # fmt: skip


def index_of(weight_map: Any, **more: Any) -> bytes:
    return json.dumps({"weight_map": weight_map, **more}).encode()


def test_indexes_that_lie(folder):
    whole = folder / "model" / "model.safetensors"
    names = list(read_header(whole).tensors)
    whole.rename(folder / "model" / "a.safetensors")
    cases = {f"name {i:02}": index_of({names[0]: name}) for i, name in enumerate(NAMES)}
    everything = dict.fromkeys(names, "a.safetensors")
    cases |= {
        "a list": b"[]",
        "a list for the map": index_of([]),
        "a string for the map": index_of("a.safetensors"),
        "nothing": index_of({}),
        "no map": b"{}",
        "nested": b'{"weight_map":' * 50_000,
        "a key twice": b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}',
        "no UTF-8": b"\xff\xfe{}",
        "half a map": index_of(dict.fromkeys(names[::2], "a.safetensors")),
        "tensors that are not there": index_of(everything | {"\x1b[31m" * 80: "a.safetensors"}),
        "long names": index_of(everything | {"n" * 10**6: "a.safetensors"}),
        "9 MB": b" " * 9_000_000,
        "100000 tensors": index_of({str(i): "a.safetensors" for i in range(100_000)}),
        "3000 files": index_of({str(i): f"{i}.safetensors" for i in range(3000)}),
        "1900 files that are not there": index_of(
            {f"{i}": f"\x1b{i % 1900}.safetensors" for i in range(40_000)}
        ),
    }
    found = ended(folder, "model.safetensors.index.json", cases, seconds=120, longest=40_000)
    assert_refused(found, cases)
    for name, one in found.items():
        assert one.kind == "refused CheckpointError", (name, one)
    good = {
        "a total of nonsense": index_of(everything, metadata={"total_size": -(10**400)}),
        "a total of a string": index_of(everything, metadata={"total_size": "x"}),
        "metadata of nonsense": index_of(everything, metadata=[[[]]]),
    }
    for path in (folder / "cases").iterdir():
        path.unlink()
    found = ended(folder, "model.safetensors.index.json", good)
    assert {name: one.kind for name, one in found.items()} == dict.fromkeys(good, "loaded")


def test_shards_that_are_no_files(folder):
    model = folder / "model"
    name = next(iter(read_header(model / "model.safetensors").tensors))
    (model / "model.safetensors").rename(model / "a.safetensors")
    os.mkfifo(model / "pipe.safetensors")
    (model / "folder.safetensors").mkdir()
    links = {"zero": "/dev/zero", "in": "/dev/stdin", "outside": folder / "secret", "gone": "gone"}
    links |= {
        "environment": "/proc/self/environ",
        "memory": "/proc/self/mem",
        "loop": "loop.safetensors",
    }
    links |= {"setting": "/sys/kernel/mm/transparent_hugepage/enabled", "passwd": "/etc/passwd"}
    for link, target in links.items():
        (model / f"{link}.safetensors").symlink_to(target)
    cases = {n: index_of({name: f"{n}.safetensors"}) for n in ("pipe", "folder", *links)}
    found = ended(folder, "model.safetensors.index.json", cases, seconds=60)
    assert_refused(found, cases, seconds=5)
    assert all(f"{n}.safetensors" in one.text for n, one in found.items())


def test_one_file_under_many_names_is_read_once(folder):
    """A small folder of links would else take as long as one of gigabytes."""
    model = folder / "model"
    (model / "model.safetensors").unlink()
    entry = {"dtype": "F32", "shape": [1]}
    header = {
        f"{i:05}" + "z" * 60: {**entry, "data_offsets": [4 * i, 4 * i + 4]} for i in range(45_000)
    }
    text = json.dumps(header).encode()
    (model / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(180_000))
    for i in range(900):
        (model / f"link{i}.safetensors").symlink_to("a.safetensors")
        os.link(model / "a.safetensors", model / f"hard{i}.safetensors")
    cases = {
        kind: index_of({n: f"{kind}{i % 900}.safetensors" for i, n in enumerate(header)})
        for kind in ("link", "hard")
    }
    text = json.dumps({"a": {**entry, "data_offsets": [0, 4]}}).encode()
    (model / "small.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    (model / "tiny.safetensors").symlink_to("small.safetensors")
    cases["two"] = index_of({"a": "small.safetensors", "b": "tiny.safetensors"})
    found = ended(folder, "model.safetensors.index.json", cases, seconds=120, longest=200_000)
    assert_refused(found, cases, seconds=15)
    assert "tiny.safetensors and small.safetensors are one file" in found["two"].text


def test_other_files_that_are_none(folder):
    """Every file of a folder that is read by name, in the place of which is something else."""
    code = """
import os, pathlib, shutil, sys
from mllama import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor
folder = pathlib.Path(sys.argv[1])
for name in ("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors"):
    for target in ("/dev/zero", "/proc/self/environ", folder / "secret", "pipe", "large"):
        model = folder / f"copy-{name}-{pathlib.Path(target).name}"
        shutil.copytree(folder / "model", model)
        (model / name).unlink()
        os.mkfifo(model / "pipe")
        with open(model / "large", "wb") as file:
            file.truncate(1 << 40)
        (model / name).symlink_to(target)
        case = f"{name} {pathlib.Path(target).name}"
        if name == "preprocessor_config.json":
            attempt(case, lambda: MllamaImageProcessor.from_pretrained(model))
        elif (name, str(target)) != ("generation_config.json", "pipe"):
            attempt(case, lambda: MllamaForConditionalGeneration.from_pretrained(model))
        if name == "config.json":
            attempt("alone " + case, lambda: MllamaConfig.from_pretrained(model))
        shutil.rmtree(model)
"""
    found = attempts(code, folder, seconds=120)
    # What is no regular file is not there: the defaults are taken, as without generation_config.json.
    left_out = {
        n for n, one in found.items() if n.startswith("generation") and one.kind == "loaded"
    }
    assert left_out <= {"generation_config.json zero"}
    for name, attempt in found.items():
        assert name in left_out or attempt.kind.startswith("refused "), (name, attempt)
        assert "hunter2" not in attempt.text and attempt.seconds < 5, (name, attempt)


def test_a_file_that_changes_is_reported(folder):
    code = """
import pathlib, sys
import mllama.checkpoints.filling as filling
from mllama import MllamaForConditionalGeneration
model = pathlib.Path(sys.argv[1]) / "model"
path, materialise = model / "model.safetensors", filling._materialise
def changing(*arguments):
    change()
    return materialise(*arguments)
filling._materialise = changing
data = path.read_bytes()
for name, change in {
    "cut": lambda: path.write_bytes(data[:-1000]),
    "longer": lambda: path.write_bytes(data + bytes(1000)),
    "gone": lambda: path.unlink(),
    "another": lambda: path.write_bytes(bytes(len(data))),
}.items():
    path.write_bytes(data)
    attempt(name, lambda: MllamaForConditionalGeneration.from_pretrained(model))
"""
    found = attempts(code, folder)
    assert_refused(found, ["cut", "longer", "gone", "another"])


# Mutations of genuine files

MUTATING = """
import json, os, pathlib, random, sys
from mllama import MllamaForConditionalGeneration
from mllama.training.conversations import read_conversations
from mllama.checkpoints import meta_params

folder, count, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
meta_params._VISION_LAYERS, meta_params._GLOBAL_LAYERS, meta_params._TAPS = 4, 2, [0, 2, 3]
rng = random.Random(seed)
WORDS = [b"0", b"-1", b"18446744073709551616", b"9" * 400, b"1e999", b"NaN", b"null", b"true", b"{}", b"[]",
         b'"', b"\\\\ud800", b"[" * 2000, b"../", b"\\0", b"\\xff", b"\\x1b[2J", b"F32",
         b"PK\\1\\2", b"PK\\5\\6",
         b"cos\\nsystem\\n", b"R", b"h\\x00", b"r\\xff\\xff\\xff\\x7f", b"\\x8b", b"\\x80\\x02", b"."]

def mutated(data, head):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        # most of a file of weights are numbers, which may be any: its ends are what is read
        place = rng.randrange(min(len(data), head)) if rng.random() < 0.7 else rng.randrange(len(data))
        if rng.random() < 0.3:
            place = max(0, len(data) - 1 - rng.randrange(head))
        kind = rng.randrange(7)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del data[place : place + rng.choice((1, 2, 8, 100, len(data)))]
        elif kind == 3:
            data[place:place] = rng.choice(WORDS)
        elif kind == 4:
            word = rng.choice(WORDS)
            data[place : place + len(word)] = word
        elif kind == 5:
            other = rng.randrange(len(data))
            data[place : place + 16] = data[other : other + 16]
        else:
            data[place:place] = data[place : place + rng.choice((4, 64))]
        if not data:
            break
    return bytes(data)

def load(kind):
    if kind == "data/talks.jsonl":
        return read_conversations(folder / kind)
    return MllamaForConditionalGeneration.from_pretrained((folder / kind).parent, backend="reference")

FILES = {"model/model.safetensors": 12000, "sharded/model.safetensors.index.json": 12000,
         "meta/consolidated.pth": 30000, "meta/params.json": 500, "data/talks.jsonl": 1000}
genuine = {name: (folder / name).read_bytes() for name in FILES}
tally = {}
for name, head in FILES.items():
    for number in range(count):
        data = mutated(genuine[name], head)
        (folder / name).write_bytes(data)
        try:
            load(name)
            ended = "loaded"
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            ended = "refused"
            assert len(text) < 200_000, (name, number, len(text))
            assert text.replace("\\n", "").isprintable(), (name, number, ascii(text[:300]))
        except BaseException as error:
            (folder / "failed").write_bytes(data)
            raise AssertionError((name, number, type(error).__name__, str(error)[:500])) from error
        key = f"{name} {ended}"
        tally[key] = tally.get(key, 0) + 1
    (folder / name).write_bytes(genuine[name])
print("tally", json.dumps(tally))
"""


def fuzz(folder: Path, count: int, seed: int, seconds: float) -> dict[str, int]:
    from confinement import confined

    model = folder / "model"
    shutil.copytree(model, folder / "sharded")
    tensors = read_header(model / "model.safetensors").tensors
    (folder / "sharded" / "model.safetensors").rename(folder / "sharded" / "a.safetensors")
    (folder / "sharded" / "model.safetensors.index.json").write_bytes(
        index_of(dict.fromkeys(tensors, "a.safetensors"))
    )
    write_small_original(folder / "meta")
    (folder / "data").mkdir()
    talk = [{"role": "user", "content": "hi \u2028"}, {"role": "assistant", "content": "x"}]
    lines = [json.dumps({"messages": talk, "n": i}, ensure_ascii=i % 2 == 0) for i in range(8)]
    (folder / "data" / "talks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ended = confined(MUTATING, folder, count, seed, seconds=seconds, mebibytes=4096)
    assert ended.kind == "ok", (ended.kind, ended.out[-500:], ended.err[-3000:])
    assert ended.peak < 1200, ended.peak
    return json.loads(ended.out.rpartition("tally ")[2].splitlines()[0])


def write_small_original(folder: Path) -> None:
    """Meta's layout of random weights, with the small tower that the child asks for."""
    from test_meta_layout import CONFIG, _consistent_rows
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    config = MllamaConfig(**CONFIG)
    with torch.device("meta"):
        names = MllamaForConditionalGeneration(config).state_dict()
    weights = {}
    for name, tensor in names.items():
        value = torch.zeros(tensor.shape)
        if name.endswith("tile_embedding.weight"):
            value = _consistent_rows(5, 128)
        elif name.endswith("tile_positional_embedding.embedding.weight"):
            value = _consistent_rows(1, 128)
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        weights[name.replace("lm_head", "language_model.lm_head")] = value.bfloat16()
    write_original(folder, weights, config.to_dict())


def assert_both_ways(tally: dict[str, int], count: int) -> None:
    """Mutations that find nothing, or everything, would test nothing."""
    assert sum(tally.values()) == 5 * count
    kinds = ("model.safetensors", "index.json", "consolidated.pth", "params.json", "talks.jsonl")
    for kind in kinds:
        refused = sum(n for key, n in tally.items() if f"{kind} refused" in key)
        assert count // 4 < refused, tally
    assert sum(n for key, n in tally.items() if key.endswith("loaded")) > count // 10, tally


def test_mutated_files(folder):
    assert_both_ways(fuzz(folder, 60, 20, 240), 60)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_many_mutated_files(folder, seed):
    assert_both_ways(fuzz(folder, 500, seed, 1800), 500)


def test_the_demo_itself_is_as_announced():
    path = checkpoint_path() / "model.safetensors"
    header, tensors = read_header(path), load_file(path)
    assert header.problem is None and header.size == path.stat().st_size
    assert {n: shape for n, (_, shape) in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
