"""Configurations that somebody else wrote: refused as a whole, by name, before anything is built for them."""

from __future__ import annotations

import re

import pytest
from hostile_folders import outcomes, refused
from meta_writer import PARAMS
from model_helpers import Shape

import mllama
from mllama.checkpoints.expected import expected_shapes
from mllama.checkpoints.key_layout import KeyLayout
from mllama.checkpoints.meta_params import config_from_params
from mllama.config_fields import ConfigError
from mllama.shapes import text_parameters, vision_parameters

SIZES = (
    *("text__hidden_size text__vocab_size text__intermediate_size text__num_hidden_layers".split()),
    *("text__num_attention_heads text__num_key_value_heads text__max_position_embeddings".split()),
    *("vision__hidden_size vision__image_size vision__patch_size vision__max_num_tiles".split()),
    *("vision__attention_heads vision__num_hidden_layers vision__num_global_layers".split()),
    *("vision__num_channels vision__intermediate_size vision__vision_output_dim".split()),
)


def test_sizes_that_cannot_be() -> None:
    values = "[10**18, 10**400, -8, 1.5, float('nan'), float('inf'), 'x', True, [1], {'a': 1}]"
    found = outcomes(
        f"""
for name in {SIZES!r}:
    for value in {values}:
        config_case(f"{{name}}={{str(value)[:20]}}", **{{name: value}})
"""
    )
    refused(found, len(SIZES) * 10)
    for outcome in found:
        assert outcome.name.split("=")[0].split("__")[1] in outcome.text, outcome


def test_sizes_that_are_not_those_of_the_file_are_told_before_a_module_is_built() -> None:
    """In milliseconds, and with memory for nothing else."""
    changes = {
        "text__num_hidden_layers": 9_999,
        "vision__num_hidden_layers": 10_000,
        "vision__num_global_layers": 10_000,
        "text__hidden_size": 256,
        "text__intermediate_size": 2**20,
        "text__vocab_size": 2**20,
        "vision__image_size": 14 * 4000,
        "vision__intermediate_size": 2**20,
        "vision__num_channels": 1024,
    }
    found = outcomes(
        f"""
for name, value in {changes!r}.items():
    config_case(name, **{{name: value}})
config_case("cross", text__cross_attention_layers=[0, 2])
config_case("many cross", text__num_hidden_layers=10_000, text__cross_attention_layers=list(range(9_000)))
config_case("ratios", vision__supported_aspect_ratios=[[1, 1]])
""",
    )
    assert len(found) == len(changes) + 3
    for outcome in found:
        assert "CheckpointError" in outcome.kind and outcome.modules == 0, outcome
        told = ("wrong shape", "missing", "tensors of layers, the files have")
        assert any(words in outcome.text for words in told), outcome
        assert outcome.seconds < 2 and outcome.length < 100_000, outcome


def test_values_of_other_kinds() -> None:
    """Every one loads as before or is refused by name; none is another error, slow or large."""
    names = (
        "text__rope_scaling text__rope_parameters text__rope_theta text__rms_norm_eps "
        "text__cross_attention_layers text__eos_token_id text__bos_token_id text__pad_token_id "
        "text__hidden_act text__dropout text__tie_word_embeddings text__use_cache "
        "vision__intermediate_layers_indices vision__supported_aspect_ratios vision__norm_eps "
        "vision__hidden_act image_token_index text_config vision_config model_type semantics "
        "dtype torch_dtype transformers_version quantization_config architectures output_attentions"
    ).split()
    values = (
        "[float('nan'), -1, 1.5, 'x', 'x' * 10**6, None, True, [1], [[1]], {'a': 1}, {}, [], 10**400, "
        "[0] * 10**5, [[10**9, 10**9]], {'rope_type': 'llama3', 'factor': 'x'}, {'rope_type': ['x']}, "
        "{'rope_type': 'yarn', 'factor': 2}, {'preset': {'preset': 'meta'}}]"
    )
    found = outcomes(
        f"""
for name in {names!r}:
    for value in {values}:
        config_case(f"{{name}}={{str(value)[:20]}}", **{{name: value}})
""",
        seconds=120,
    )
    assert len(found) == len(names) * 19
    for outcome in found:
        assert not outcome.kind or "ValueError" in outcome.kind, outcome
        # Another configuration's tensors are named, as far as the list goes.
        whole = re.match(r"(text|vision)_config=(None|\{)", outcome.name)
        assert outcome.seconds < 2 and outcome.length < (100_000 if whole else 4000), outcome
    loaded = {outcome.name for outcome in found if not outcome.kind}
    for name in ("rope_theta=nan", "rope_theta=-1", "rope_theta=x", "rms_norm_eps=-1", "dtype={}"):
        assert not any(case.split("__")[-1] == name for case in loaded), name


def test_all_faults_in_one_error() -> None:
    (found,) = outcomes(
        """
config_case("all", text__rope_theta="x", text__rms_norm_eps=-1.0, text__num_attention_heads=-1,
            text__num_hidden_layers=10**5, vision__norm_eps=float("nan"), vision__patch_size=0,
            image_token_index=10**400)
"""
    )
    for name in (
        *("rope_theta", "rms_norm_eps", "num_attention_heads", "num_hidden_layers"),
        *("norm_eps", "patch_size", "image_token_index"),
    ):
        assert name in found.text
    assert "7 problems" in found.text


def test_files_that_are_no_json_or_no_files() -> None:
    found = outcomes(
        r"""
path = FOLDER / "config.json"
text = path.read_text()
for name, data in {
    "lists": b"[" * 200_000, "objects": b'{"a":' * 200_000, "bom": b"\xef\xbb\xbf" + text.encode(),
    "utf-16": b"\xff\xfe{}", "digits": b'{"model_type":' + b"9" * 5000 + b"}", "nul": b"\0" * 100,
    "twice": text.replace('"model_type"', '"model_type": "mllama", "model_type"', 1).encode(),
    "list": b"[]", "empty": b"", "megabytes": b'{"a": "' + b"x" * (64 << 20) + b'"}',
    "half": b'{"model_type": "\\ud800"}', "cut": text[:-5].encode(),
}.items():
    path.write_bytes(data)
    case(name, load)
    case(name + " config", lambda: MllamaConfig.from_pretrained(FOLDER))
    case(name + " given", lambda: Model.from_pretrained(SOURCE, config=FOLDER))
for name, make in {"zero": lambda: os.symlink("/dev/zero", path), "pipe": lambda: os.mkfifo(path),
                   "proc": lambda: os.symlink("/proc/self/mem", path), "folder": path.mkdir}.items():
    path.unlink()
    make()
    case(name, load)
    case(name + " config", lambda: MllamaConfig.from_pretrained(FOLDER))
    if name == "folder":
        path.rmdir()
        path.touch()
"""
    )
    refused(found, 12 * 3 + 4 * 2)


def test_configurations_made_in_python_and_overrides() -> None:
    found = outcomes(
        """
for name, entries in {
    "layers": {"num_hidden_layers": 10**5}, "width": {"hidden_size": 10**12},
    "layers of the vocabulary": {"vocab_size": 10**400},
    "parameters": {"hidden_size": 2**20, "intermediate_size": 2**20, "num_hidden_layers": 10_000},
    "cross": {"num_hidden_layers": 10_000, "cross_attention_layers": [0] * 10**6},
    "range": {"cross_attention_layers": range(10**12)}, "twice": {"cross_attention_layers": [3, 3]},
    "eos": {"eos_token_id": list(range(10**6))}, "theta": {"rope_theta": 10**400},
    "digits": {"vocab_size": 10**5000},
}.items():
    case(name, lambda: MllamaTextConfig(**entries))
    case(name + " whole", lambda: Model(MllamaConfig(text_config=entries)))
    case(name + " override", lambda: Model.from_pretrained(SOURCE, text_config=entries))
    case(name + " given", lambda: Model.from_pretrained(SOURCE, config={**RAW, "text_config": entries}))
case("unknown", lambda: MllamaConfig.from_pretrained(SOURCE, **{f"x{i}": 1 for i in range(10**5)}))
case("preset", lambda: MllamaConfig(semantics={"preset": {"preset": {}}}))
"""
    )
    refused(found, 4 * 10 + 2)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("semantics", ["meta", "transformers"])
def test_the_shapes_are_those_of_the_models(layers: int, semantics: str) -> None:
    """The table that files are compared with is the models' own state, for every class."""
    shape = Shape(
        layers=layers, cross=(1,), local_layers=2, global_layers=1, taps=(0, 1), tile_side=28
    )
    config = mllama.MllamaConfig(**shape.configs(), semantics=semantics)
    for name, part in (
        ("MllamaForConditionalGeneration", config),
        ("MllamaModel", config),
        ("MllamaForCausalLM", config.text_config),
        ("MllamaTextModel", config.text_config),
        ("MllamaVisionModel", config.vision_config),
    ):
        model = getattr(mllama, name)(part, backend="reference")
        state = {key: tuple(x.shape) for key, x in model.state_dict().items()}
        assert expected_shapes(part, KeyLayout(name)) == state, name
    tower = mllama.MllamaForCausalLM(config.text_config)
    assert text_parameters(config.text_config) == sum(p.numel() for p in tower.parameters())
    vision = mllama.MllamaVisionModel(config.vision_config)
    assert vision_parameters(config.vision_config) == sum(p.numel() for p in vision.parameters())


def test_the_published_sizes_are_far_within_the_bounds() -> None:
    config = mllama.MllamaConfig()
    assert 9e9 < text_parameters(config.text_config) < 1e10
    big = {"hidden_size": 8192, "num_hidden_layers": 100, "intermediate_size": 28672}
    mllama.MllamaTextConfig(**big, num_attention_heads=64, cross_attention_layers=[3, 8, 98])


OPTIONAL_PARAMS = (
    *("n_kv_heads", "ffn_dim_multiplier", "multiple_of"),
    *("use_scaled_rope", "vision_max_num_chunks"),
)


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_the_entries_of_metas_params(name: str) -> None:
    config_from_params(PARAMS, 1280)
    for value in (-1, 10**400, 10**9, float("nan"), "x", [1], {"a": 1}, True):
        if value is True and name == "use_scaled_rope":
            continue
        if value == 10**9 and name == "rope_theta":
            continue
        with pytest.raises(ConfigError, match=f"params.json: {name} must be") as caught:
            config_from_params(PARAMS | {name: value}, 1280)
        assert len(str(caught.value)) < 300
    rest = {other: value for other, value in PARAMS.items() if other != name}
    if name in OPTIONAL_PARAMS:
        config_from_params(rest, 1280)
    else:
        with pytest.raises(ConfigError, match=f"lacks '{name}'"):
            config_from_params(rest, 1280)
