"""`.pth` files that lie, call, loop or explode: each is refused by name, soon, and within little memory."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import assert_refused, attempts
from torch_archives import Called, Stored, archive, entries, patched, pickled, tensor

from mllama.checkpoints.torch_files import BadTorchFile, load, outline

LOADING = """
import os, pathlib, sys
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.torch_files import load

folder = pathlib.Path(sys.argv[1])
os.chdir(folder)
for path in sorted((folder / "cases").iterdir()):
    place = folder / "model" / "consolidated.pth"
    place.unlink(missing_ok=True)
    os.link(path, place, follow_symlinks=False)
    attempt(path.name, lambda: MllamaForConditionalGeneration.from_pretrained(folder / "model"))
    attempt(path.name + " alone", lambda: load(path))
assert not (folder / "exploded").exists()
"""


def assert_all_refused(
    folder: Path, cases: dict[str, bytes | None], plain: tuple[str, ...] = (), **limits: Any
) -> dict[str, Any]:
    """None stands for a file that is there already; ``plain`` are those that would do elsewhere."""
    (folder / "cases").mkdir(exist_ok=True)
    (folder / "model").mkdir(exist_ok=True)
    params = {"dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 300, "norm_eps": 1e-5}
    params |= {"rope_theta": 1e4, "vision_chunk_size": 28, "vision_num_cross_attention_layers": 1}
    (folder / "model" / "params.json").write_text(json.dumps(params))
    for name, data in cases.items():
        if data is not None:
            (folder / "cases" / name).write_bytes(data)
    found = attempts(LOADING, folder, **limits)
    for name in plain:
        assert found.pop(f"{name} alone").kind == "loaded", name
    assert_refused(found, [*cases, *(f"{name} alone" for name in cases if name not in plain)])
    for name, one in found.items():
        if not name.endswith(" alone"):
            assert one.kind == "refused CheckpointError" and "consolidated.pth" in one.text, (
                name,
                one,
            )
    return found


def instructions(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


class _Executed:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def names_of(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


# Functions that run code, and those that torch's own reader would let a pickle call.
CALLED = """
os.system posix.system subprocess.Popen builtins.eval builtins.exec builtins.getattr
__builtin__.eval runpy._run_code importlib.import_module pathlib.Path.touch torch.load
torch.jit.load torch.zeros torch.Size torch.hub.load torch.device torch.float32 torch.Tensor
torch.storage._load_from_bytes torch.storage.UntypedStorage torch.serialization._get_layout
torch.ops.load_library torch._C._LegacyTensor torch.nn.Linear torch._utils._rebuild_tensor
torch._utils._rebuild_tensor_v3 torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor
torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_nested_tensor
torch._utils._rebuild_device_tensor_from_numpy torch._utils._rebuild_device_tensor_from_cpu_tensor
torch._utils._rebuild_wrapper_subclass torch._utils._rebuild_parameter_with_state
torch._utils._import_dotted_name torch._tensor._rebuild_from_type_v2 torch.nn.parameter.Parameter
torch.QInt8Storage torch.UntypedStorage collections.Counter collections.defaultdict
collections.deque _codecs.encode numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar
numpy.dtype copyreg._reconstructor functools.partial operator.attrgetter builtins.set
""".split()


def test_nothing_but_tensors_is_called(tmp_path):
    touch = pickled("touch exploded")[2:-1]
    cases = {}
    for name in CALLED:
        call = instructions(names_of(name), touch, b"\x85R")
        cases[name] = archive(call)
        cases[f"{name} within"] = archive(instructions(b"}", pickled("a")[2:-1], call[2:-1], b"s"))
    cases |= {
        "reduce": archive({"a": _Executed(os.system, "touch exploded")}),
        "inst": archive(instructions(b"(", touch, b"iposix\nsystem\n")),
        "obj": archive(instructions(b"(", names_of("posix.system"), touch, b"o")),
        "newobj": archive(instructions(names_of("subprocess.Popen"), touch, b"\x85\x81")),
        "extension": archive(instructions(b"\x82\x01", touch, b"\x85R")),
        "stack global": archive(pickled({"a": Called(os.system, "touch exploded")}, protocol=4)),
        "build": archive(instructions(names_of("collections.OrderedDict"), b")R}", touch, b"Nsb")),
        "build a class": archive(instructions(names_of("collections.OrderedDict"), b"}b")),
        "call a string": archive(instructions(touch, touch, b"\x85R")),
        "call a tensor": archive(Called(pickle.loads, tensor((1,), (1,)))),
        "call with a list": archive(instructions(names_of("collections.OrderedDict"), b"]R")),
        "call with arguments": archive(Called(collections.OrderedDict, [("a", 1)])),
        "persistent": archive(instructions(touch, b"Q")),
        "persistent text": archive(instructions(b"Ptouch exploded\n")),
        "plain": pickle.dumps({"a": _Executed(os.system, "touch exploded")}),
        "plain protocol 0": pickle.dumps({"a": _Executed(os.system, "touch exploded")}, 0),
        "hooks": archive({"a": tensor((1,), (1,), hooks=collections.OrderedDict(a=1))}),
        "name with an escape": archive(instructions(b"cos\x1b[2J\nsystem\n)R")),
        "name of a megabyte": archive(instructions(b"c" + b"o" * 10**6 + b"\nsystem\n)R")),
    }
    found = assert_all_refused(tmp_path, cases, seconds=120)
    for name in CALLED:
        assert f"holds more than weights: its pickle names {name}" in found[name].text


def test_tensors_lie_within_their_records(tmp_path):
    two = Stored(16), Stored(8, kind=torch.DoubleStorage)
    hand = {
        "size 2^40, stride 0": tensor((2**40,), (0,)),
        "size 2^62 twice": tensor((2**62, 2**62), (0, 0)),
        "size 2^63": tensor((2**63,), (1,)),
        "size 10^400": tensor((10**400,), (0,)),
        "empty and huge": tensor((0, 2**62, 2**62), (1, 1, 1)),
        "one too many": tensor((17,), (1,)),
        "stride too long": tensor((4, 4), (5, 1)),
        "stride beyond": tensor((2,), (2**62,)),
        "overlapping": tensor((4, 5), (1, 1)),
        "negative stride": tensor((4,), (-1,), offset=3),
        "negative size": tensor((-4,), (1,)),
        "negative offset": tensor((1,), (1,), offset=-1),
        "offset beyond": tensor((1,), (1,), offset=16),
        "offset 2^63": tensor((1,), (1,), offset=2**63),
        "more sizes than strides": tensor((2, 2), (1,)),
        "bool": tensor((True,), (1,)),
        "float": tensor((1.0,), (1,)),
        "text": tensor(("1",), (1,)),
        "None": tensor(None, None),
        "list": tensor([4], [1]),
        "17 dimensions": tensor((1,) * 17, (1,) * 17),
        "100000 dimensions": tensor((1,) * 10**5, (1,) * 10**5),
        "requires 1": tensor((1,), (1,), grad=1),
        "storage is a tensor": tensor((1,), (1,), storage=tensor((1,), (1,))),
        "storage larger than its record": tensor((1,), (1,), storage=Stored(17)),
        "storage of 2^60": tensor((1,), (1,), storage=Stored(2**60)),
        "storage of 10^400": tensor((1,), (1,), storage=Stored(10**400)),
        "storage of -1": tensor((1,), (1,), storage=Stored(-1)),
        "storage of 1.5": tensor((1,), (1,), storage=Stored(1.5)),
        "wider elements": tensor((16,), (1,), storage=Stored(16, kind=torch.DoubleStorage)),
        "two types": [tensor((1,), (1,), storage=s) for s in two],
        "no record": tensor((1,), (1,), storage=Stored(16, key="1")),
        "record of another folder": tensor((1,), (1,), storage=Stored(1, key="../version")),
        "key is a number": tensor((1,), (1,), storage=Stored(16, key=0)),
        "key is a megabyte": tensor((1,), (1,), storage=Stored(16, key="k\x1b" * 500_000)),
        "kind is text": tensor((1,), (1,), storage=Stored(16, kind="FloatStorage")),
        "parameter of a list": Called(torch._utils._rebuild_parameter, [1], True, None),
        "too few arguments": Called(torch._utils._rebuild_tensor_v2, Stored(16), 0),
    }  # fmt: skip
    cases = {name: archive({"a": made}) for name, made in hand.items()}
    cases["storage only"] = archive(instructions(pickled(Stored(16))[2:-1], b"]\x86"))
    assert_all_refused(tmp_path, cases, seconds=60)


def laughs(levels: int) -> bytes:
    """A tuple of two tuples of two tuples..."""
    return b")" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def test_pickles_that_are_damaged_or_explode(tmp_path):
    genuine = io.BytesIO()
    torch.save({f"weight {i}": torch.zeros(2, 3) for i in range(4)}, genuine)
    with zipfile.ZipFile(genuine) as file:
        whole = file.read("archive/data.pkl")
    cases = {f"cut at {n}": archive(whole[:n]) for n in range(0, len(whole) - 1, 23)}
    cases |= {
        "nothing": archive(b""),
        "two results": archive(instructions(b"}}")),
        "no result": archive(instructions()),
        "a mark": archive(instructions(b"(")),
        "a mark is kept": archive(instructions(b"(q\x000")),
        "a mark in a tuple": archive(instructions(b"(\x85")),
        "no mark": archive(instructions(b"t")),
        "memo of nothing": archive(instructions(b"h\x05")),
        "memo of an empty stack": archive(instructions(b"q\x00")),
        "append to a number": archive(instructions(b"K\x01Na")),
        "set an item of a list": archive(instructions(b"]NNs")),
        "unhashable key": archive(instructions(b"}]Ns")),
        "tuple as a key": archive(instructions(b"})Ns")),
        "odd items": archive(instructions(b"}(NNNu")),
        "nested lists": archive(instructions(b"]" * 50_000 + b"a" * 49_999)),
        "nested tuples": archive(instructions(b")" + b"\x85" * 400_000)),
        "a list in itself": archive(instructions(b"]q\x00h\x00a")),
        "a dictionary in itself": archive(instructions(b"}q\x00K\x01h\x00s")),
        "laughs": archive(instructions(laughs(11))),
        "many laughs": archive(instructions(laughs(60))),
        "wide laughs": archive(instructions(b")q\x00" + (b"(" + b"h\x00" * 5000 + b"tq\x00") * 3)),
        "memo of 2^31": archive(instructions(b"}r\xff\xff\xff\x7fK\x01Ns")),
        "string of 2^32": archive(instructions(b"X\xff\xff\xff\xff", b"a" * 1000)),
        "integer of 2^31 bytes": archive(instructions(b"\x8b\xff\xff\xff\x7f")),
        "bytes of 2^63": archive(instructions(b"\x96", struct.pack("<Q", 2**63 - 1))),
        "frame of 2^63": archive(b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b"}."),
        "digits": archive(instructions(b"I" + b"9" * 10**6 + b"\n")),
        "too many": archive(instructions(b"(" + b"N" * 500_001 + b"t")),
        "9 MB": archive(instructions(b"N" * 9_000_000)),
        "protocol 5": archive(pickled({}, protocol=5)),
        "protocol 255": archive(b"\x80\xff}."),
        "not a dictionary": archive([tensor((1,), (1,))]),
        "no tensors": archive({"a": 1, "b": "x" * 10**6}),
        "numbers for names": archive({1: tensor((1,), (1,))}),
        "a key twice": archive(instructions(b"}(K\x01NK\x01Nu")),
        "control characters": archive({"\x1b[31m\r\n" * 1000: 5}),
        "half of a pair": archive({"\ud800": 5}),
        "colliding keys": archive({i * (2**61 - 1): None for i in range(50_000)}),
    }
    plain = ("laughs", "memo of 2^31", "not a dictionary", "no tensors", "numbers for names")
    plain += ("control characters", "half of a pair")
    assert_all_refused(tmp_path, cases, plain, seconds=120)


def local(data: bytes, name: bytes) -> int:
    """Where the header of a record begins."""
    return data.index(name) - 30


def with_end64(data: bytes, **lies: int) -> bytes:
    """A file whose end is of the larger form too, with other numbers in it."""
    end = data.rindex(b"PK\5\6")
    count, length, start = struct.unpack_from("<HII", data, end + 10)
    values = {
        "rest": 44,
        "disk": 0,
        "here": count,
        "count": count,
        "length": length,
        "start": start,
    }
    values |= {"place": end, "disks": 1} | lies
    v = collections.namedtuple("V", values)(**values)
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", v.rest, 45, 45, v.disk, 0, v.here, v.count, v.length, v.start
    )
    return data[:end] + end64 + struct.pack("<4sIQI", b"PK\6\7", 0, v.place, v.disks) + data[end:]


def test_zip_files_that_lie(tmp_path):
    good = archive({"a": tensor((4,), (1,))})
    assert isinstance(outline_of(tmp_path, good), dict)
    assert isinstance(outline_of(tmp_path, with_end64(good)), dict)
    end, places = good.rindex(b"PK\5\6"), entries(good)
    pkl, order, zero, _ = places
    half = struct.unpack_from("<I", good, order + 42)[0]
    secret = archive({"a": tensor((4,), (1,), storage=Stored(16, key="1"))}, {"data/1": bytes(64)})
    inflated = archive(b"\x80\x02" + b"N" * 2**28 + b".", method=zipfile.ZIP_DEFLATED)
    cases = {
        "inflates to 256 MiB": inflated,
        "storage inflates": archive({}, {"data/0": bytes(2**28)}, zipfile.ZIP_DEFLATED),
        "bzip2": archive({}, method=zipfile.ZIP_BZIP2),
        "lzma": archive({}, method=zipfile.ZIP_LZMA),
        "compressed only in its header": patched(good, local(good, b"archive/data.pkl") + 8, "<H", 8),
        "encrypted": patched(good, pkl + 8, "<H", 1),
        "strongly encrypted": patched(good, pkl + 8, "<H", 0x41),
        "masked": patched(good, pkl + 8, "<H", 0x2000),
        "encrypted only in its header": patched(good, local(good, b"archive/data.pkl") + 6, "<H", 1),
        "larger than the file": patched(patched(good, zero + 20, "<I", 2**31), zero + 24, "<I", 2**31),
        "two sizes": patched(good, zero + 24, "<I", 2**20),
        "size of 64 bits that is not there": patched(good, zero + 24, "<I", 2**32 - 1),
        "place of 64 bits that is not there": patched(good, zero + 42, "<I", 2**32 - 1),
        "place beyond": patched(good, zero + 42, "<I", 2**31),
        "place of the directory": patched(good, zero + 42, "<I", pkl),
        "place of another": patched(good, zero + 42, "<I", half),
        "overlapping": patched(patched(good, order + 20, "<I", 70), order + 24, "<I", 70),
        "the same record twice": good.replace(b"archive/byteorder", b"archive/data.pkl\0"),
        "a name in another case": archive({}, {"DATA.PKL": b"}."}),
        "a name twice": twice(),
        "two folders": good.replace(b"archive/version", b"brchive/version"),
        "no folder": good.replace(b"archive/", b"archive_"),
        "name with NUL": good.replace(b"archive/version", b"archive/vers\0on"),
        "name with a backslash": good.replace(b"archive/version", b"archive\\version"),
        "name of other letters": good.replace(b"archive/version", b"archive/\xff\xfersion"),
        "name with an escape": good.replace(b"archive/version", b"archive/\x1b[31mon"),
        "name of its header": good.replace(b"archive/version", b"archive/Version", 1),
        "no data.pkl": good.replace(b"data.pkl", b"data.pkm"),
        "checksum": patched(good, pkl + 16, "<I", 1),
        "content": good.replace(b"storage", b"storagf", 1),
        "big-endian": good.replace(b"little", b"big   "),
        "comment": good[:-2] + b"\5\0hello",
        "after the end": good + b"hello",
        "before the beginning": b"#!/bin/sh\n" + good,
        "a file before it": b"PK\3\4" + good,
        "two archives": good + secret,
        "count too small": patched(patched(good, end + 8, "<H", 2), end + 10, "<H", 2),
        "count too large": patched(patched(good, end + 8, "<H", 9), end + 10, "<H", 9),
        "counts differ": patched(good, end + 8, "<H", 2),
        "count of 65535": patched(patched(good, end + 8, "<H", 65535), end + 10, "<H", 65535),
        "length too small": patched(good, end + 12, "<I", 10),
        "length of 4 GB": patched(good, end + 12, "<I", 2**32 - 1),
        "directory elsewhere": patched(good, end + 16, "<I", 0),
        "another disk": patched(good, end + 4, "<H", 1),
        "64: count": with_end64(good, count=2**40, here=2**40),
        "64: length": with_end64(good, length=2**62),
        "64: start": with_end64(good, start=2**63),
        "64: other start": with_end64(good, start=4),
        "64: place": with_end64(good, place=2**64 - 1),
        "64: place of another": with_end64(good, place=0),
        "64: disks": with_end64(good, disks=7),
        "64: rest": with_end64(good, rest=2**62),
        "empty": b"",
        "cut": good[: len(good) // 2],
        "an empty zip file": b"PK\5\6" + bytes(18),
        "zeros": bytes(10**6),
        "older format": older({"a": torch.zeros(3)}),
        "older format of code": older({"a": _Executed(os.system, "touch exploded")}),
        "a module that was compiled": scripted(),
        "60000 records": archive({}, {f"data/{i}": b"" for i in range(60_000)}),
    }  # fmt: skip
    found = assert_all_refused(tmp_path, cases, seconds=120)
    assert "compressed" in found["inflates to 256 MiB"].text
    assert "no zip archive, as torch writes since 1.6" in found["older format"].text


def twice() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in ("archive/data.pkl", "archive/data.pkl"):
            file.writestr(name, pickled({}))
    return data.getvalue()


def older(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def scripted() -> bytes:
    data = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), data)
    return data.getvalue()


def outline_of(folder: Path, data: bytes) -> Any:
    (folder / "file.pth").write_bytes(data)
    return outline(folder / "file.pth")


def test_what_is_no_file(tmp_path):
    (tmp_path / "cases").mkdir()
    os.mkfifo(tmp_path / "cases" / "pipe")
    for name, target in {
        "zero": "/dev/zero",
        "environment": "/proc/self/environ",
        "gone": "gone",
    }.items():
        (tmp_path / "cases" / name).symlink_to(target)
    found = assert_all_refused(
        tmp_path, {"pipe": None, "zero": None, "environment": None, "gone": None}, seconds=30
    )
    assert "not a regular file" in found["pipe"].text


# What torch itself writes is read


def genuine() -> dict[str, Any]:
    whole = torch.arange(24.0).view(2, 3, 4)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
    kinds += (torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)
    return {
        "views": {"whole": whole, "turned": whole.transpose(0, 2), "part": whole[1, :, 1:3]},
        "one storage": {"a": whole, "b": whole},
        "state": module.state_dict(),
        "parameters": {"a": torch.nn.Parameter(whole.bfloat16())},
        "kinds": {str(k): torch.ones(5).to(k) for k in kinds},
        "shapes": {str(s): torch.ones(s) for s in ((), (0,), (3, 0, 2), (1, 1, 1))},
        "buffers": {"a": torch.zeros(100)[3:7], "b": torch.zeros(1)},
        "nothing": {},
        "many": {f"layers.{i}": torch.full((1,), float(i)) for i in range(2000)},
        "umlauts": {"größe\U0001f600": torch.zeros(1)},
    }


@pytest.mark.parametrize("name", genuine())
def test_what_torch_writes_is_read(tmp_path, name):
    content = genuine()[name]
    torch.save(content, tmp_path / "file.pth")
    found, loaded = outline(tmp_path / "file.pth"), load(tmp_path / "file.pth")
    assert list(found) == list(loaded) == list(content)
    for key, tensor_ in content.items():
        made = found[key].outline()
        assert loaded[key].equal(tensor_) and made.is_meta
        for one in (made, loaded[key]):
            assert (one.shape, one.dtype) == (tensor_.shape, tensor_.dtype)
            assert one.stride() == tensor_.stride()


def test_states_of_optimizers_are_read(tmp_path):
    module = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    content = {"step": 1, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save(content, tmp_path / "state.pt")
    loaded = load(tmp_path / "state.pt")
    assert loaded["rng"].equal(content["rng"]) and loaded["step"] == 1
    assert loaded["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


def test_a_file_that_only_torch_refuses(tmp_path, monkeypatch):
    """What torch finds beyond our own checks is an error of the same kind."""
    torch.save({"a": torch.zeros(3)}, tmp_path / "file.pth")
    for error in (
        MemoryError(),
        RecursionError("deep"),
        OverflowError(),
        struct.error(),
        AttributeError(),
    ):

        def raising(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(torch, "load", raising)
        with pytest.raises(BadTorchFile, match=r"file\.pth is truncated or not a torch archive"):
            load(tmp_path / "file.pth")
