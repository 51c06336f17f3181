"""The call of the model card with only the import changed: arguments count, are accepted, or are refused."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of, hf_model
from safetensors.torch import load_file, save_file

import mllama
from mllama.checkpoints import placement, published_call
from mllama.checkpoints.checkpoint import CheckpointError

SHAPE = Shape(
    layers=2, cross=(1,), local_layers=1, global_layers=1, taps=(0,), tile_side=28, head_dim=32
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf_model(SHAPE).save_pretrained(folder)
    return folder


def _load(folder: Any, **options: Any) -> mllama.MllamaForConditionalGeneration:
    return mllama.MllamaForConditionalGeneration.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.bfloat16, "device_map": "auto"},
        {"torch_dtype": "auto"},
        {"dtype": "auto", "torch_dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}, "device": "cpu"},
        {"device_map": torch.device("cpu")},
        {"device_map": "balanced"},
        {"device_map": None, "max_memory": None, "offload_folder": "offload"},
        {"low_cpu_mem_usage": True, "attn_implementation": "sdpa", "use_safetensors": True},
        {"attn_implementation": {"text_config": "flash_attention_2"}, "use_safetensors": None},
        {"trust_remote_code": True, "token": None, "revision": None, "cache_dir": None},
        {"token": "secret", "revision": "main", "local_files_only": True, "force_download": True},
        {"quantization_config": None, "load_in_4bit": False, "load_in_8bit": False},
        {"variant": None, "subfolder": "", "weights_only": True, "ignore_mismatched_sizes": False},
        {"output_attentions": False, "return_dict": True},
        {"output_loading_info": False, "key_mapping": None, "proxies": None, "tp_plan": None},
    ],
)
def test_what_asks_for_nothing_else_loads(folder: Path, options: dict[str, Any]) -> None:
    model = _load(folder, **options)
    wanted = options.get("torch_dtype", "auto")
    assert model.dtype == (torch.float32 if wanted == "auto" else wanted)
    assert model.device == torch.device("cpu") and not model.training
    assert model.name_or_path == model.config.name_or_path == str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"model": 0, "lm_head": 1}}, "CUDA devices|names 2 devices"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "cannot stay on the disk"),
        ({"device_map": {}}, "names 0 devices"),
        ({"device_map": "everywhere"}, "a device must be .* got 'everywhere'"),
        ({"device_map": 1.5}, "got 1.5"),
        ({"device_map": True}, "got True"),
        ({"device_map": "meta"}, "the meta device holds no weights"),
        ({"device": "meta"}, "the meta device holds no weights"),
        ({"device": "cuda:97"}, "'cuda:97' was asked for, but there are"),
        ({"device_map": 97}, "was asked for, but there are"),
        ({"use_safetensors": False}, "use_safetensors=False: pickle files are never loaded"),
        ({"from_tf": True}, "from_tf=True"),
        ({"variant": "fp16"}, "variant='fp16': .*rename"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit together"),
        ({"load_in_4bit": 1}, "load_in_4bit=1"),
        ({"quantization_config": {"bits": 8}}, "quantization_config.bits=8"),
        ({"max_memory": {0: "10GiB"}}, "max_memory=.*one device as a whole"),
        ({"tp_plan": "auto", "gguf_file": "x.gguf"}, "tp_plan='auto'.*gguf_file='x.gguf'"),
        ({"ignore_mismatched_sizes": True}, "resize_token_embeddings"),
        ({"output_loading_info": True}, "nothing to report"),
        ({"state_dict": {}}, "call load_state_dict"),
        ({"dtype": torch.float16, "torch_dtype": "bfloat16"}, "contradict each other"),
        ({"dtype": "auto", "torch_dtype": "bfloat16"}, "contradict each other"),
        ({"torch_dtype": "int8"}, "dtype must be one of"),
        ({"torch_dtype": {"text_config": "bfloat16"}}, "dtype must be one of"),
        ({"subfolder": "../other"}, "subfolder must be a path below"),
        ({"subfolder": "/etc"}, "subfolder must be a path below"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _load(folder, **options)


def test_unknown_arguments_are_named(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"unknown arguments \['colour', 'use_cache'\]"):
        _load(folder, colour="red", use_cache=False, trust_remote_code=True)
    with pytest.raises(FileNotFoundError, match="has no folder missing"):
        _load(folder, subfolder="missing")


def test_dtypes_of_either_name(folder: Path) -> None:
    for wanted in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert _load(folder, torch_dtype=wanted).dtype == torch.bfloat16
        assert _load(folder, dtype=wanted, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert _load(folder, torch_dtype=None, dtype="float16").dtype == torch.float16


def test_every_argument_of_transformers_is_known() -> None:
    """What its from_pretrained names itself or takes out of its keyword arguments."""
    theirs = transformers.PreTrainedModel.from_pretrained
    names = {
        name
        for name, parameter in inspect.signature(theirs).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    source = inspect.getsource(theirs)
    names |= {part.split('"')[1] for part in source.split("kwargs.pop(")[1:] if '"' in part[:3]}
    assert {"torch_dtype", "device_map", "token", "variant"} <= names
    ours = inspect.signature(mllama.MllamaForConditionalGeneration.from_pretrained).parameters
    known = set(ours) | published_call._WITHOUT_MEANING | published_call._UNMET.keys()
    known |= mllama.checkpoints.hub.DOWNLOAD_OPTIONS
    known |= set(published_call.QUANTIZING)
    assert names - known == set()


def test_every_argument_of_saving_is_known() -> None:
    names = set(inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters)
    known = set(inspect.signature(mllama.MllamaModel.save_pretrained).parameters) | {"kwargs"}
    known |= published_call._WITHOUT_MEANING_IN_SAVING | published_call._UNMET_BY_SAVING.keys()
    assert names - known == set()


# Devices


class _TwoGpus:
    @pytest.fixture(autouse=True)
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)


class TestDevices(_TwoGpus):
    @pytest.mark.parametrize(
        ("device", "device_map", "expected"),
        [
            (None, "auto", "cuda:1"),
            (None, "sequential", "cuda:1"),
            ("cuda", None, "cuda:1"),
            ("cuda:0", None, "cuda:0"),
            (0, None, "cuda:0"),
            (None, 0, "cuda:0"),
            (None, "cuda:0", "cuda:0"),
            (None, {"": 0}, "cuda:0"),
            (None, {"": "cuda:1"}, "cuda:1"),
            (None, {"model": 0, "lm_head": "cuda:0"}, "cuda:0"),
            ("cuda:0", {"": 0}, "cuda:0"),
            (None, "cpu", "cpu"),
            (None, None, "cpu"),
        ],
    )
    def test_one_device_however_it_is_named(
        self, device: Any, device_map: Any, expected: str
    ) -> None:
        assert placement.resolve_device(device, device_map) == torch.device(expected)

    @pytest.mark.parametrize("device_map", [{"a": 0, "b": 1}, {"a": 0, "b": "cpu"}])
    def test_several_are_refused(self, device_map: Any) -> None:
        with pytest.raises(ValueError, match=r"names 2 devices: .*tensor_parallel=True"):
            placement.resolve_device(None, device_map)

    @pytest.mark.parametrize(("device", "device_map"), [("cpu", "auto"), ("cuda:0", {"": 1})])
    def test_two_that_differ_are_refused(self, device: Any, device_map: Any) -> None:
        with pytest.raises(ValueError, match="are different devices"):
            placement.resolve_device(device, device_map)

    def test_a_gpu_without_the_room(self) -> None:
        placement.check_room(torch.device("cuda", 0), 4 * 10**9)
        with pytest.raises(
            ValueError, match=r"takes 22.0 GB, cuda:0 has 4.0 GB free; .*tensor_parallel=True"
        ):
            placement.check_room(torch.device("cuda", 0), 22 * 10**9)


@pytest.mark.parametrize("setting", ["context", "default"])
def test_inside_the_meta_device(folder: Path, setting: str) -> None:
    """Without weights is never what loading means: refused, unless another device is named."""
    try:
        if setting == "default":
            torch.set_default_device("meta")
        with torch.device("meta") if setting == "context" else torch.no_grad():
            with pytest.raises(ValueError, match="the meta device holds no weights"):
                _load(folder)
            models = [_load(folder, device="cpu"), _load(folder, device_map="auto")]
    finally:
        torch.set_default_device(None)
    expected = _load(folder).state_dict()
    for model in models:
        assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state", ["float64", "bfloat16", "inference", "no_grad", "cpu"])
def test_inside_other_settings_of_torch(folder: Path, state: str) -> None:
    """A model loaded there is the model loaded anywhere."""
    batch = batch_of(SHAPE, [Prompt(5, (1,), (2,))])
    with torch.no_grad():
        expected = _load(folder)(**batch).logits
    before = torch.get_default_dtype()
    contexts = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    try:
        if state.startswith(("float", "bfloat")):
            torch.set_default_dtype(getattr(torch, state))
        with contexts.get(state, lambda: torch.device("cpu"))():
            model = _load(folder)
    finally:
        torch.set_default_dtype(before)
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    with torch.no_grad():
        assert model(**batch).logits.equal(expected)
    model(**batch, use_cache=False).logits.sum().backward()


# The configuration


def test_fields_of_the_configuration_replace_stored_ones(folder: Path) -> None:
    model = _load(folder, output_hidden_states=True)
    assert model.config.output_hidden_states
    text = mllama.MllamaForCausalLM.from_pretrained(folder, use_cache=False)
    assert not text.config.use_cache
    with pytest.raises(CheckpointError, match="use_cache must be True or False"):
        mllama.MllamaForCausalLM.from_pretrained(folder, use_cache="no")
    with pytest.raises(CheckpointError, match="output_attentions can only be False, got True"):
        _load(folder, output_attentions=True)


def test_the_other_fields_of_a_tower_stay(folder: Path) -> None:
    """As in transformers, a dictionary names what is changed. Most of a tower's fields change no shape, so
    that the weights would load with the defaults in their place, too."""
    given = {
        "text_config": {"use_cache": False, "rms_norm_eps": 0.001},
        "vision_config": {"norm_eps": 0.1, "num_attention_heads": 1},
    }
    read = (_load(folder, **given).config, mllama.MllamaConfig.from_pretrained(folder, **given))
    theirs = transformers.MllamaConfig.from_pretrained(folder, **given)
    stored = mllama.MllamaConfig.from_pretrained(folder).text_config
    for config in read:
        assert config.text_config.rope_parameters == stored.rope_parameters
        assert config.text_config.rope_parameters["rope_type"] == "llama3"
        assert not config.text_config.use_cache
        assert config.text_config.rms_norm_eps == theirs.text_config.rms_norm_eps == 0.001
        assert config.vision_config.norm_eps == theirs.vision_config.norm_eps == 0.1
        assert config.vision_config.attention_heads == 1
        assert config.vision_config.hidden_size == theirs.vision_config.hidden_size


def test_a_configuration_that_is_given(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "model.safetensors", bare)
    with pytest.raises(
        CheckpointError, match=r"no config.json beside the weights.*Trainer.*config="
    ):
        _load(bare)
    expected = _load(folder)
    given = [
        folder,
        str(folder),
        folder / "config.json",
        json.loads((folder / "config.json").read_text()),
        transformers.MllamaConfig.from_pretrained(folder),
        expected.config,
        mllama.MllamaConfig.from_pretrained(folder),
    ]
    for config in given:
        for place in (bare, folder):
            model = _load(place, config=config)
            assert model.semantics == expected.semantics, config
            assert all(a.equal(b) for a, b in zip(model.parameters(), expected.parameters()))
    chosen = mllama.MllamaConfig(**SHAPE.configs(), semantics="meta")
    for place in (bare, folder):
        assert _load(place, config=chosen).semantics.name == "meta"
        assert (
            _load(place, config=chosen, semantics="transformers").semantics.name == "transformers"
        )
    undecided = mllama.MllamaConfig(**SHAPE.configs())
    assert _load(folder, config=undecided).semantics.name == "transformers"
    assert _load(bare, config=undecided).semantics.name == "meta"
    with pytest.raises(TypeError, match="config must be a configuration, its entries or a folder"):
        _load(folder, config=3)
    with pytest.raises(CheckpointError, match="wrong shape"):
        _load(folder, config=mllama.MllamaConfig(**(SHAPE.configs() | {"text_config": None})))


def test_the_given_configuration_does_not_decide_the_dtype(folder: Path, tmp_path: Path) -> None:
    """Weights that were trained in float32 are not rounded since the first model was bfloat16."""
    base = _load(folder, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "trained").mkdir()
    save_file(load_file(folder / "model.safetensors"), tmp_path / "trained" / "model.safetensors")
    assert _load(tmp_path / "trained", config=tmp_path / "base").dtype == torch.float32


def test_a_generation_config_that_is_given(folder: Path) -> None:
    theirs = transformers.GenerationConfig(do_sample=True, top_k=7)
    for given in (theirs, {"do_sample": True, "top_k": 7}, mllama.GenerationConfig(top_k=7)):
        assert _load(folder, generation_config=given).generation_config.top_k == 7


def test_an_adapter_instead_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it holds an adapter and no model: .*PeftModel"):
        _load(tmp_path)


# The hub


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(folder)

    library = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return calls


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ({}, {}),
        ({"token": None, "revision": None, "force_download": False, "cache_dir": None}, {}),
        ({"token": "secret", "revision": "abc123"}, {"token": "secret", "revision": "abc123"}),
        ({"token": True}, {"token": True}),
        ({"token": False}, {"token": False}),
        (
            {"cache_dir": "/x", "local_files_only": True},
            {"cache_dir": "/x", "local_files_only": True},
        ),
        ({"force_download": True, "device_map": "cpu"}, {"force_download": True}),
    ],
)
def test_what_goes_to_the_hub(hub: list, options: dict[str, Any], passed: dict[str, Any]) -> None:
    model = _load("owner/name", **options)
    ((name, given),) = hub
    patterns = given.pop("allow_patterns")
    assert name == "owner/name" and given == passed and "*.safetensors" in patterns
    assert model.name_or_path == "owner/name"
    mllama.MllamaConfig.from_pretrained(
        "owner/name", **{k: v for k, v in options.items() if k in passed}
    )
    assert {k: v for k, v in hub[1][1].items() if k != "allow_patterns"} == {
        k: v for k, v in passed.items() if k in options
    }


def test_a_configuration_on_the_hub_is_fetched_as_the_model_is(hub: list, folder: Path) -> None:
    _load(folder, config="owner/name", token="secret", revision="abc", subfolder="")
    ((name, given),) = hub
    assert name == "owner/name" and given["token"] == "secret" and given["revision"] == "abc"


def test_a_subfolder_on_the_hub(hub: list, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no folder inner"):
        _load("owner/name", subfolder="inner")
    assert "inner/config.json" in hub[0][1]["allow_patterns"]
    shutil.copytree(folder, tmp_path / "inner")
    assert _load(tmp_path, subfolder="inner").config.text_config.vocab_size == SHAPE.vocab


# Saving


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safe_serialization": False}, "only written as safetensors"),
        ({"push_to_hub": True}, "upload it with huggingface_hub"),
        ({"variant": "fp16"}, "variant='fp16'"),
        ({"state_dict": {}}, "state_dict must hold the model's tensors"),
        ({"max_shard_size": True}, "max_shard_size"),
    ],
)
def test_saving_refuses_what_cannot_be_met(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _load(folder).save_pretrained(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_call_of_training_libraries_saves(folder: Path, tmp_path: Path) -> None:
    model = _load(folder)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(
        tmp_path,
        is_main_process=True,
        save_function=torch.save,
        state_dict=state,
        safe_serialization=True,
        push_to_hub=False,
        token=None,
    )
    again = _load(tmp_path).state_dict()
    assert all(again[name].equal(value) for name, value in state.items())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(TypeError, match=r"unknown arguments \['colour'\]"):
        model.save_pretrained(tmp_path, colour="red")
