"""Checkpoint folders: reading, writing, faults. The other side is `transformers` itself."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import mllama
from mllama.checkpoints import durable, safetensors_files, saving
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.key_layout import canonical_name
from mllama.kinds import Asked

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 4,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 2,
    "image_size": 28,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
}


def _randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


@pytest.fixture(scope="module")
def theirs() -> transformers.MllamaForConditionalGeneration:
    torch.manual_seed(5)
    config = transformers.MllamaConfig(vision_config=VISION, text_config=TEXT, image_token_index=96)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    _randomise(model)
    return model


@pytest.fixture(scope="module")
def _written(theirs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_written, tmp_path) -> Path:
    """A folder that `transformers` has written, to be changed freely."""
    return Path(shutil.copytree(_written, tmp_path / "model"))


def _load(folder, cls="MllamaForConditionalGeneration", **options):
    return getattr(mllama, cls).from_pretrained(folder, backend="reference", **options)


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not actual[name].equal(expected[name])]


def _edit_json(path: Path, **entries) -> dict:
    """Set entries; a value of None removes one."""
    values = json.loads(path.read_text()) | entries
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values))
    return values


def _problems(folder, **options) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        _load(folder, **options)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


# Reading what transformers writes


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_reads_what_transformers_writes(theirs, tmp_path, shard_size):
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    model = _load(tmp_path)
    assert not model.training
    _assert_same(dict(model.state_dict()), dict(theirs.state_dict()))


def test_reads_the_in_memory_layout(theirs, folder):
    """What third-party tools write: names as in memory since transformers 4.52."""
    names = theirs.state_dict()
    assert "model.language_model.norm.weight" in names
    save_file({n: t.contiguous() for n, t in names.items()}, folder / "model.safetensors")
    _assert_same(dict(_load(folder).state_dict()), dict(names))


def test_every_published_name_has_its_in_memory_name(theirs, folder):
    stored = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in stored
    assert {canonical_name(name) for name in stored} == set(theirs.state_dict())


def test_reads_a_transformers_4_config(theirs, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope
    config["torch_dtype"] = "bfloat16"
    del config["dtype"]
    path.write_text(json.dumps(config))
    model = _load(folder)
    assert model.config.text_config.rope_parameters == TEXT["rope_parameters"]
    assert model.dtype == torch.bfloat16
    expected = {name: t.bfloat16() for name, t in theirs.state_dict().items()}
    _assert_same(dict(model.state_dict()), expected)


def test_text_only_folder(theirs, tmp_path):
    text = transformers.MllamaForCausalLM(theirs.config.text_config)
    text.save_pretrained(tmp_path)
    model = _load(tmp_path, "MllamaForCausalLM")
    _assert_same(dict(model.state_dict()), dict(text.state_dict()))
    with pytest.raises(CheckpointError, match=r"'mllama_text_model', .* needs 'mllama'"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("cls", "part"),
    [
        ("MllamaModel", lambda m: m.model),
        ("MllamaTextModel", lambda m: m.model.language_model),
        ("MllamaVisionModel", lambda m: m.model.vision_model),
    ],
)
def test_parts_of_a_model(theirs, folder, tmp_path, cls, part):
    """A class takes its part of a whole model's folder, and reads and writes a folder of its own."""
    expected = dict(part(theirs).state_dict())
    _assert_same(dict(_load(folder, cls).state_dict()), expected)
    part(theirs).save_pretrained(tmp_path / "theirs")
    model = _load(tmp_path / "theirs", cls)
    _assert_same(dict(model.state_dict()), expected)
    model.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    _assert_same(written, load_file(tmp_path / "theirs" / "model.safetensors"))


def test_causal_class_takes_the_text_part(theirs, folder):
    state = _load(folder, "MllamaForCausalLM").state_dict()
    expected = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    _assert_same(dict(state), expected)


# Dtypes


def test_dtype_none_keeps_the_stored_one_and_others_cast(theirs, folder):
    assert _load(folder).dtype == torch.float32
    for wanted in (torch.bfloat16, "float16", "torch.float64"):
        model = _load(folder, dtype=wanted)
        dtype = getattr(torch, str(wanted).removeprefix("torch."))
        assert {p.dtype for p in model.parameters()} == {dtype}
        expected = {name: t.to(dtype) for name, t in theirs.state_dict().items()}
        _assert_same(dict(model.state_dict()), expected)
    with pytest.raises(ValueError, match=r"dtype must be one of .*'bfloat16'.*, got 'int8'"):
        _load(folder, dtype="int8")


def test_dtype_of_most_bytes_where_the_config_names_none(folder):
    config = _edit_json(folder / "config.json", dtype=None)
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    mixed = {n: t if "norm" in n else t.to(torch.float16) for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    assert {p.dtype for p in _load(folder).parameters()} == {torch.float16}


# Semantics


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.45.0.dev0", "meta"),
        ("4.51.3", "meta"),
        ("4.55.4", "meta"),
        ("4.56.0", "transformers"),
        ("4.57.6", "transformers"),
        ("5.17.0", "transformers"),
        (None, "meta"),
    ],
)
def test_semantics_follow_the_version(folder, version, expected, caplog):
    _edit_json(folder / "config.json", transformers_version=version)
    with caplog.at_level(logging.INFO, logger="mllama"):
        model = _load(folder)
    assert model.semantics.name == expected
    said = [r.getMessage() for r in caplog.records if "semantics" in r.getMessage()]
    assert (
        len(said) == 1 and expected in said[0] and (version or "no transformers_version") in said[0]
    )
    assert model.semantics_reason in said[0]


def test_installed_transformers_is_recognised(folder):
    assert _load(folder).semantics.name == "transformers"


@pytest.mark.parametrize("choice", ["meta", "transformers", {"vision_taps": "output"}])
def test_our_folder_records_the_choice(folder, tmp_path, choice):
    model = _load(folder, semantics=choice)
    model.save_pretrained(tmp_path / "ours")
    again = _load(tmp_path / "ours")
    assert again.semantics == model.semantics
    assert "config.json records semantics" in again.semantics_reason
    assert _load(tmp_path / "ours", semantics="meta").semantics.name == "meta"


def test_a_folder_saved_again_by_transformers_is_theirs(folder, tmp_path):
    """`transformers` keeps our entry in config.json, but it ran its own graph on these weights."""
    _load(folder, semantics="meta").save_pretrained(tmp_path / "ours")
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["semantics"] == "meta"
    assert _load(tmp_path / "again").semantics.name == "transformers"


# Writing


def _load_theirs(folder, cls="MllamaForConditionalGeneration"):
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("shard_size", ["5GB", 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_what_we_write(theirs, folder, tmp_path, shard_size, dtype):
    model = _load(folder, dtype=dtype)
    saving.save_pretrained(model, tmp_path / "ours", shard_size)
    read = _load_theirs(tmp_path / "ours")
    assert read.dtype == dtype
    expected = {name: t.to(dtype) for name, t in theirs.state_dict().items()}
    _assert_same(dict(read.state_dict()), expected)
    _assert_same(dict(_load(tmp_path / "ours").state_dict()), expected)
    for part in ("text_config", "vision_config"):
        before, after = getattr(theirs.config, part), getattr(read.config, part)
        for key in before.to_dict().keys() - {"dtype", "architectures"}:
            assert getattr(after, key) == getattr(before, key), key
    assert read.generation_config.eos_token_id == [2, 3]


def test_same_file_names_keys_and_shapes_as_transformers(theirs, folder, tmp_path):
    _load(folder).save_pretrained(tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in folder.iterdir()}
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    _assert_same(ours, load_file(folder / "model.safetensors"))


def test_text_only_model_goes_back_to_transformers(folder, tmp_path):
    model = _load(folder, "MllamaForCausalLM")
    model.save_pretrained(tmp_path / "ours")
    read = _load_theirs(tmp_path / "ours", "MllamaForCausalLM")
    _assert_same(dict(read.state_dict()), dict(model.state_dict()))


def test_shards_keep_their_size_and_the_index_is_complete(folder, tmp_path):
    _load(folder).save_pretrained(tmp_path / "ours", "50KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 3 and {p.name for p in shards} == set(index["weight_map"].values())
    total = 0
    for path in shards:
        tensors = load_file(path)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 50_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
        total += size
    assert total == index["metadata"]["total_size"]


def test_saved_files_have_the_mode_of_any_new_file(folder, tmp_path):
    saving.save_pretrained(_load(folder), tmp_path / "ours", "50KB")
    (tmp_path / "ours" / "plain").touch()
    assert len({path.stat().st_mode for path in (tmp_path / "ours").iterdir()}) == 1


@pytest.mark.parametrize("size", [0, -1, "5 parsecs", "GB", ""])
def test_bad_shard_size(folder, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        saving.save_pretrained(_load(folder), tmp_path / "ours", size)


def test_saving_over_an_earlier_save_leaves_none_of_it(folder, tmp_path):
    model, target = _load(folder), tmp_path / "ours"
    saving.save_pretrained(model, target, "50KB")
    (target / "tokenizer.json").write_text("{}")
    saving.save_pretrained(model, target)
    names = {p.name for p in target.iterdir()}
    weights = {"model.safetensors", "config.json", "generation_config.json"}
    assert names == weights | {"tokenizer.json"}
    _assert_same(dict(_load(target).state_dict()), dict(model.state_dict()))


def test_a_save_that_fails_early_leaves_the_old_folder(folder, tmp_path, monkeypatch):
    model, target = _load(folder), tmp_path / "ours"
    saving.save_pretrained(model, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    calls = []

    def full_disk(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left")
        durable.save_file(tensors, path)

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        saving.save_pretrained(model, target, "50KB")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


@pytest.mark.parametrize("renames", [0, 1, 3, 5])
def test_a_save_that_stops_while_renaming_does_not_pass_for_complete(
    folder, tmp_path, monkeypatch, renames
):
    model, target = _load(folder), tmp_path / "ours"
    saving.save_pretrained(model, target, "50KB")
    done = []

    def replace(source, destination):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(destination)
        Path(source).rename(destination)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(saving.os, "replace", replace)
        saving.save_pretrained(model, target, "50KB")
    assert "no weights" in _problems(target)[0]
    assert not list(target.glob("*.partial"))


def test_loaded_junk_is_not_written_on(folder, tmp_path):
    code = {"auto_map": {"AutoModel": "evil.Model"}}
    _edit_json(folder / "config.json", **code, text_config={**TEXT, **code}, custom="kept")
    _load(folder).save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "auto_map" not in written and "transformers_version" not in written
    assert "auto_map" not in written["text_config"]
    assert written["custom"] == "kept"
    assert written["architectures"] == ["MllamaForConditionalGeneration"]


# Faults


def test_missing_extra_shape_and_dtype_in_one_error(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.norm.weight"]
    tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["surprise"] = torch.zeros(3)
    tensors["multi_modal_projector.bias"] = torch.zeros(63)
    tensors["vision_model.class_embedding"] = torch.zeros(32, dtype=torch.int8)
    tensors["model.vision_model.layernorm_pre.bias"] = torch.zeros(32)
    save_file(tensors, path)
    problems = _problems(folder)
    assert problems == [
        "extra: language_model.model.layers.0.self_attn.q_proj.bias (64,) in model.safetensors",
        "extra: surprise (3,) in model.safetensors",
        "missing: language_model.model.norm.weight (64,)",
        "vision_model.layernorm_pre.bias in model.safetensors and "
        "model.vision_model.layernorm_pre.bias in model.safetensors are the same parameter",
        "wrong dtype: vision_model.class_embedding in model.safetensors is I8, "
        "expected one of float32, bfloat16, float16, float64",
        "wrong shape: multi_modal_projector.bias in model.safetensors is (63,), expected (64,)",
    ]


def test_faults_of_the_files_in_one_error(theirs, folder):
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="40KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 7
    truncated, headless, absent, trailing, unlisted = (folder / name for name in shards[:5])
    truncated.write_bytes(truncated.read_bytes()[:-10])
    headless.write_bytes(headless.read_bytes()[:50])
    absent.unlink()
    trailing.write_bytes(trailing.read_bytes() + b"xx")
    save_file(load_file(unlisted) | {"stowaway": torch.zeros(1)}, unlisted)
    escapes = ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "w.bin", 7]
    entries = dict(zip((f"entry{i}" for i in range(6)), escapes, strict=True))
    index["weight_map"] |= entries
    index_path.write_text(json.dumps(index))
    text = "\n".join(_problems(folder))
    assert f"{truncated.name} is truncated" in text
    assert f"{headless.name} is truncated or not a safetensors file" in text
    assert f"{absent.name} is missing" in text
    assert f"{trailing.name} is damaged (bytes after the last tensor)" in text
    assert f"{unlisted.name} holds stowaway, which" in text
    for name in ("entry0", "entry1", "entry2"):
        assert f"the entry of {name} leaves the folder" in text
    assert "the entry of entry3 is not a file name: '..'" in text
    assert "the entry of entry4 is not a safetensors file (pickle files are never loaded)" in text
    assert "the entry of entry5 is not a file name: 7" in text
    assert "missing:" not in text  # the tensors of unreadable files are reported with the file


@pytest.mark.parametrize(("openings", "said"), [(0, "cannot be mapped"), (1, "cannot be read")])
def test_a_file_that_there_is_no_memory_for_is_not_called_damaged(
    folder, monkeypatch, openings, said
):
    """As under a limit of address space: the library raises MemoryError, with the words of the system."""
    opened, safe_open = [], safetensors_files.safe_open

    def limited(*arguments, **options):
        if len(opened) == openings:
            raise MemoryError("Cannot allocate memory (os error 12)")
        opened.append(arguments)
        return safe_open(*arguments, **options)

    monkeypatch.setattr(safetensors_files, "safe_open", limited)
    expected = f"model.safetensors {said}: Cannot allocate memory (os error 12)"
    assert _problems(folder) == [expected]


def test_index_that_points_outside_reads_nothing_there(theirs, folder, tmp_path):
    """The file outside exists and is valid: it must still be refused."""
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    names = load_file(outside)
    weight_map = dict.fromkeys(names, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    problems = _problems(folder)
    assert len([p for p in problems if "leaves the folder" in p]) == len(names)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b"[" * 100_000,
    ],
)
def test_damaged_header(folder, header):
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(content)
    assert any("damaged" in p and "model.safetensors" in p for p in _problems(folder))


def test_empty_weights_file(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert _problems(folder) == [
        "model.safetensors is truncated or not a safetensors file: its 0 bytes do not hold the header that "
        "they announce"
    ]


def test_pickle_weights_are_refused(theirs, folder):
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    problems = _problems(folder)
    assert len(problems) == 1 and "pytorch_model.bin" in problems[0] and "refused" in problems[0]


def test_quantised_checkpoint_is_refused(folder):
    _edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    assert any("quantization_config" in p for p in _problems(folder))


def test_nothing_that_a_config_names_is_executed(folder, tmp_path):
    sentinel = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Model: pass\n")
    _edit_json(
        folder / "config.json",
        auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Model"},
        trust_remote_code=True,
        architectures=["evil.Model"],
    )
    _load(folder)
    assert not sentinel.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_unreadable_config(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _load(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text_config": "large"}, "configuration is unusable"),
        ({"text_config": TEXT | {"num_hidden_layers": "four"}}, "configuration is unusable"),
        ({"vision_config": VISION | {"image_size": 30}}, "image_size must be"),
        ({"dtype": "float8_e4m3fn"}, "got 'float8_e4m3fn'"),
    ],
)
def test_unusable_config_values(folder, entries, message):
    _edit_json(folder / "config.json", **entries)
    assert any(message in problem for problem in _problems(folder))


def test_another_model_type(folder):
    _edit_json(folder / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match=r"model_type 'llama'.*needs 'mllama'"):
        _load(folder)


def test_folder_without_anything(tmp_path):
    assert "no config.json" in _problems(tmp_path)[0]


# Hub ids and paths


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "nothing", "../x/y"])
def test_a_missing_path_is_not_looked_up(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        _load(name)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(NotADirectoryError, match="expected the folder"):
        _load(folder / "config.json")


def test_hub_id_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"mllama-kernels\[hub\]"):
        _load("someone/a-model")


def test_hub_id_is_downloaded_without_pickles(theirs, folder, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder)

    library = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    _assert_same(dict(_load("someone/a-model").state_dict()), dict(theirs.state_dict()))
    ((name, patterns),) = calls
    assert name == "someone/a-model" and "*.safetensors" in patterns
    assert not any(p.endswith((".bin", ".pth", ".py", "*")) for p in patterns)


# Memory and progress

_MEASURE = """
import sys, torch, mllama
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
import mllama.checkpoints.weights, mllama.model, safetensors.torch
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
model = mllama.MllamaForCausalLM.from_pretrained(sys.argv[1], backend="reference")
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_model_and_one_shard(tmp_path):
    """Loaded in a process of its own: resident peak over start, mapped file pages included."""
    config = mllama.MllamaTextConfig(
        vocab_size=1016,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        cross_attention_layers=[1],
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = mllama.MllamaForCausalLM(config, backend="reference")
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    shard = 32_000_000
    saving.save_pretrained(model, tmp_path, shard)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    peak, size = map(int, result.stdout.split())
    print(f"model {size / 1e6:.0f} MB, shards of {shard / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert size > 8 * shard
    assert size <= peak <= size + 1.5 * shard


def test_fused_projections_are_filled_in_place(theirs, folder):
    """The published q, k and v are rows of one parameter, not copies of it."""
    model = _load(folder)
    attention = model.model.language_model.layers[0].self_attn
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    matrix = attention.qkv.kernel_weight(Asked).matrix
    assert matrix.data_ptr() == weights[0].data_ptr()
    for one, next_one in itertools.pairwise(weights):
        assert one.data_ptr() + one.nbytes == next_one.data_ptr()
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(p.numel() for p in theirs.parameters())


def test_progress_is_silent_without_a_terminal(folder, capfd):
    _load(folder)
    assert capfd.readouterr().err == ""


def test_progress_is_silent_where_stderr_is_closed(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    _load(folder)


def test_progress_line_on_a_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model = _load(folder)
    text = capsys.readouterr().err
    assert text.startswith("\rloading: ") and text.endswith("\n")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert "100%" in text and f"{tqdm.format_sizeof(size)}/{tqdm.format_sizeof(size)}" in text
