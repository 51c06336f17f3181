"""Values of configurations: a field takes only its kind, every fault is reported, and what is set counts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of

import mllama
from mllama.config_fields import ConfigError

SHAPE = Shape(layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1, tile_side=28)
KINDS = (mllama.MllamaVisionConfig, mllama.MllamaTextConfig, mllama.MllamaConfig)
WRONG = {
    "a negative number": -1,
    "a fraction": 1.5,
    "a string": "8",
    "nothing": None,
    "a list": [8],
    "a nested list": [["8"]],
    "not a number": math.nan,
    "infinity": math.inf,
    "a flag": True,
    "an object": object(),
    "a dictionary": {"a": 1},
}
# The wrong values of above that a field takes all the same.
TAKEN = {
    "rope_parameters": {"nothing", "a dictionary"},
    "rope_scaling": {"nothing", "a dictionary"},
    "use_cache": {"a flag"},
    "output_hidden_states": {"a flag"},
    "bos_token_id": {"nothing"},
    "pad_token_id": {"nothing"},
    "eos_token_id": {"nothing", "a list"},
    "cross_attention_layers": {"nothing", "a list"},
    "intermediate_layers_indices": {"nothing"},
    "supported_aspect_ratios": {"nothing"},
    "vision_config": {"nothing", "a dictionary"},
    "text_config": {"nothing", "a dictionary"},
    "semantics": set(),
    "rope_theta": {"a fraction"},
    "rms_norm_eps": {"a fraction"},
    "norm_eps": {"a fraction"},
    "initializer_range": {"a fraction"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_refuses_every_wrong_kind_by_name(kind: type) -> None:
    for name in sorted(kind.field_names()):
        for what, value in WRONG.items():
            if what in TAKEN.get(name, set()):
                kind(**{name: value})
                continue
            with pytest.raises(ValueError) as caught:
                kind(**{name: value})
            text = str(caught.value)
            assert name in text or "the taps" in text, (name, what, text)
            assert len(text) < 400, (name, what)


def test_all_faults_of_both_towers_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        mllama.MllamaConfig(
            text_config={"hidden_size": -4096, "num_hidden_layers": "40", "rms_norm_eps": math.nan},
            vision_config={"image_size": 1.5, "supported_aspect_ratios": [[1, 2, 3]]},
            image_token_index=None,
        )
    assert caught.value.problems == [
        "image_token_index must be an integer of at least 0, got None",
        "vision_config: image_size must be an integer of at least 1, got 1.5",
        "vision_config: supported_aspect_ratios must be a list of pairs of integers of at least 1, "
        "[height, width], got [[1, 2, 3]]",
        "text_config: hidden_size must be an integer of at least 1, got -4096",
        "text_config: num_hidden_layers must be an integer of at least 1, got '40'",
        "text_config: rms_norm_eps must be a finite number of at least 0, got nan",
    ]
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_contradictions_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        mllama.MllamaTextConfig(hidden_act="gelu", num_key_value_heads=5, dropout=0.1)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": -1.0},
        {"rope_theta": "500000"},
        {"rope_theta": 1e4, "factor": 0},
        {"rope_theta": 1e4, "factor": None},
        {"rope_theta": 1e4, "original_max_position_embeddings": 1.5},
        {"rope_theta": 1e4, "low_freq_factor": 4.0},
        {"rope_theta": 1e4, "high_freq_factor": math.nan},
    ],
)
def test_rope_values_are_checked_too(rope: dict[str, Any]) -> None:
    good = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    good["original_max_position_embeddings"] = 8192
    key = list(rope)[-1]
    for entries in (
        {"rope_parameters": {**good, **rope}},
        {"rope_scaling": {**good, **rope}, "rope_theta": rope["rope_theta"]},
    ):
        with pytest.raises(ConfigError, match=key):
            mllama.MllamaTextConfig(**entries)


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = mllama.MllamaTextConfig(
        vocab_size=np.int64(96), rms_norm_eps=np.float32(1e-5), eos_token_id=(np.int32(3), 4)
    )
    assert type(config.vocab_size) is int and type(config.rms_norm_eps) is float
    assert config.eos_token_id == [3, 4]
    json.dumps(config.to_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entries", [{"output_attentions": True}, {"return_dict": False}, {"output_attentions": 1}]
)
def test_a_setting_that_is_not_met_is_refused(kind: type, entries: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(entries))} can only be"):
        kind.from_dict(entries)


def test_the_entries_of_transformers_configurations_are_taken() -> None:
    for name in ("MllamaConfig", "MllamaTextConfig", "MllamaVisionConfig"):
        theirs = getattr(transformers, name)()
        ours = getattr(mllama, name).from_dict(theirs.to_dict())
        for key in ours.field_names() - {"semantics", "vision_config", "text_config"}:
            if key not in ("rope_theta", "rope_scaling"):
                assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize("layers", [1, 2, 4, 9, 39, 41])
def test_default_cross_attention_layers_of_another_depth(layers: int, tmp_path: Path) -> None:
    """As in `transformers`: those that there are. Also from a file, where the default is spelled out."""
    theirs = transformers.MllamaTextConfig(num_hidden_layers=layers)
    expected = [i for i in theirs.cross_attention_layers if i < layers]
    theirs.save_pretrained(tmp_path)
    for ours in (
        mllama.MllamaTextConfig(num_hidden_layers=layers),
        mllama.MllamaTextConfig.from_pretrained(tmp_path),
        mllama.MllamaConfig(text_config={"num_hidden_layers": layers}).text_config,
    ):
        assert ours.cross_attention_layers == expected
        assert dataclasses.replace(ours).cross_attention_layers == expected
        assert ours.self_attention_layers == [i for i in range(layers) if i not in expected]


def test_a_text_model_without_cross_attention_layers_equals_transformers() -> None:
    sizes = SHAPE.configs()["text_config"] | {"num_hidden_layers": 2}
    del sizes["cross_attention_layers"]
    theirs = transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**sizes)).eval()
    ours = mllama.MllamaForCausalLM(mllama.MllamaTextConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert ours.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)


def _model() -> mllama.MllamaForConditionalGeneration:
    return mllama.MllamaForConditionalGeneration(
        mllama.MllamaConfig(**SHAPE.configs()), backend="reference"
    ).eval()


def test_hidden_states_that_the_configuration_asks_for() -> None:
    batch = batch_of(SHAPE, [Prompt(5, (2,), (2,))])
    text = {"input_ids": torch.randint(3, 90, (1, 4))}
    for where in (lambda c: c, lambda c: c.text_config):
        model = _model()
        assert model(**batch).hidden_states is None
        where(model.config).output_hidden_states = True
        assert len(model(**batch).hidden_states) == SHAPE.layers + 1
        assert model(**batch, output_hidden_states=False).hidden_states is None
        assert (
            len(model.model(**text).hidden_states) == SHAPE.layers
        )  # no image: without cross layers
    assert len(model.model.language_model(**text).hidden_states) == SHAPE.layers
    tower = mllama.MllamaForCausalLM(model.config)
    assert len(tower.eval()(**text).hidden_states) == SHAPE.layers


def test_parts_share_the_configuration_of_the_whole() -> None:
    model = _model()
    assert model.model.config is model.config
    assert model.model.language_model.config is model.config.text_config
    assert model.model.vision_model.config is model.config.vision_config
    model.config.text_config.use_cache = False
    assert model.model.language_model(torch.zeros(1, 2, dtype=torch.int64)).past_key_values is None


def test_get_text_config() -> None:
    config = mllama.MllamaConfig()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config
    for part in (config.text_config, config.vision_config):
        assert part.get_text_config() is part


def test_a_configuration_by_itself(tmp_path: Path) -> None:
    config = mllama.MllamaConfig(**SHAPE.configs())
    config.save_pretrained(tmp_path / "new")
    assert config.to_json_string() == (tmp_path / "new" / "config.json").read_text()
    read = mllama.MllamaConfig.from_pretrained(
        str(tmp_path / "new"), token=None, revision="main", output_hidden_states=True
    )
    assert read.name_or_path == str(tmp_path / "new") and read.output_hidden_states
    assert read.text_config == config.text_config
    text = mllama.MllamaTextConfig.from_pretrained(tmp_path / "new", use_cache=False)
    assert text.to_dict() == dataclasses.replace(config.text_config, use_cache=False).to_dict()
    assert mllama.MllamaVisionConfig.from_pretrained(tmp_path, subfolder="new").image_size == 28
    assert transformers.MllamaConfig.from_pretrained(tmp_path / "new").text_config.vocab_size == 96
    with pytest.raises(TypeError, match=r"unknown arguments \['colour'\]"):
        mllama.MllamaConfig.from_pretrained(tmp_path / "new", colour="red")
    with pytest.raises(ConfigError, match="image_size must be"):
        mllama.MllamaVisionConfig.from_pretrained(tmp_path / "new", image_size=-1)
    with pytest.raises(ConfigError, match="needs model_type \"mllama\", got 'mllama_text_model'"):
        text.save_pretrained(tmp_path / "text")
        mllama.MllamaConfig.from_pretrained(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        mllama.MllamaConfig.from_pretrained(tmp_path)


def test_a_padding_token_without_a_row_is_refused() -> None:
    config = mllama.MllamaTextConfig(
        vocab_size=96,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
    )
    with pytest.raises(ValueError, match="pad_token_id 128004 is outside the embedding's 104 rows"):
        mllama.MllamaForCausalLM(config)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize("layout", ["both", "older", "newer"])
@pytest.mark.parametrize(
    ("given", "theta", "kind", "factor"),
    [
        ({}, 7e3, "llama3", 8.0),
        ({"rope_theta": 1e6}, 1e6, "llama3", 8.0),
        ({"rope_scaling": None}, 7e3, "default", None),
        ({"rope_scaling": {**_LLAMA3, "factor": 2.0}}, 7e3, "llama3", 2.0),
        ({"rope_scaling": {**_LLAMA3, "factor": 2.0}, "rope_theta": 3.0}, 3.0, "llama3", 2.0),
        ({"rope_parameters": {"rope_type": "default"}}, 7e3, "default", None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0, "default", None),
    ],
)
def test_no_stored_rope_goes_before_a_given_one(
    tmp_path: Path, layout: str, given: dict[str, Any], theta: float, kind: str, factor: float
) -> None:
    """Three entries say it, in two layouts, and a saved configuration has all three."""
    left_out = {"both": (), "older": ("rope_parameters",), "newer": ("rope_scaling", "rope_theta")}
    stored = mllama.MllamaTextConfig(rope_scaling=_LLAMA3, rope_theta=7e3).to_dict()
    stored = {key: value for key, value in stored.items() if key not in left_out[layout]}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    rope = mllama.MllamaTextConfig.from_pretrained(tmp_path, **given).rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope.get("factor")) == (theta, kind, factor)


def test_one_thing_under_two_names_is_one_value():
    assert (
        mllama.MllamaConfig.from_dict(
            {"image_token_id": 5, "image_token_index": 5}
        ).image_token_index
        == 5
    )
    with pytest.raises(ConfigError, match="there under two names, as 5 and 6"):
        mllama.MllamaConfig.from_dict({"image_token_id": 5, "image_token_index": 6})


def test_a_head_dim_that_is_another_one_is_refused():
    """`transformers` makes the rotary frequencies of it."""
    assert (
        mllama.MllamaConfig.from_dict({"text_config": {"head_dim": 128}}).text_config.head_dim
        == 128
    )
    assert (
        mllama.MllamaConfig.from_dict({"text_config": {"head_dim": None}}).text_config.head_dim
        == 128
    )
    with pytest.raises(ConfigError, match=r"head_dim must be .* 128, got 64"):
        mllama.MllamaConfig.from_dict({"text_config": {"head_dim": 64}})
