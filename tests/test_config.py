"""Configurations: what `transformers` writes is read, what we write it reads, nonsense is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

import mllama
from mllama.rope import RotaryEmbedding, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shared_fields(config: Any, kind: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    names -= {"extra", "semantics", "rope_theta", "rope_scaling"}
    return {name: getattr(config, name) for name in names}


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = mllama.MllamaConfig(), transformers.MllamaConfig()
    assert ours.image_token_index == ours.image_token_id == theirs.image_token_index
    for part, kind in (
        ("vision_config", mllama.MllamaVisionConfig),
        ("text_config", mllama.MllamaTextConfig),
    ):
        mine = _shared_fields(getattr(ours, part), kind)
        for name, value in mine.items():
            assert value == getattr(getattr(theirs, part), name), name


def test_folder_written_by_transformers(tmp_path: Path) -> None:
    theirs = transformers.MllamaConfig(
        text_config={
            "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
            "num_hidden_layers": 10,
        },
        vision_config={"image_size": 560},
    )
    theirs.text_config.cross_attention_layers = [3, 8]
    theirs.save_pretrained(tmp_path)
    ours = mllama.MllamaConfig.from_pretrained(tmp_path)
    assert ours.text_config.cross_attention_layers == [3, 8]
    assert ours.vision_config.num_patches == 1601
    assert ours.text_config.rope_parameters == {**LLAMA3, "rope_theta": 500000.0}


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    ours = mllama.MllamaConfig(
        text_config={
            "rope_theta": 1e4,
            "rope_scaling": LLAMA3,
            "vocab_size": 320,
            "eos_token_id": [1, 2],
        },
        vision_config={"image_size": 560, "num_global_layers": 3},
        image_token_index=320,
        semantics={"vision_taps": "output"},
    )
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = transformers.MllamaConfig.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters == {**LLAMA3, "rope_theta": 1e4}
    assert theirs.image_token_id == 320
    for part, kind in (
        ("vision_config", mllama.MllamaVisionConfig),
        ("text_config", mllama.MllamaTextConfig),
    ):
        for name, value in _shared_fields(getattr(ours, part), kind).items():
            assert value == getattr(getattr(theirs, part), name), name
    again = mllama.MllamaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict()


def test_unknown_entries_survive(tmp_path: Path) -> None:
    entries = {"model_type": "mllama", "torch_dtype": "bfloat16", "architectures": ["X"]}
    assert mllama.MllamaConfig.from_dict(entries).to_dict().items() >= entries.items()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("scaled", [False, True])
def test_rope_equals_transformers(head_dim: int, scaled: bool) -> None:
    rope = {**(LLAMA3 if scaled else {"rope_type": "default"}), "rope_theta": 500000.0}
    sizes = {"hidden_size": 8 * head_dim, "num_attention_heads": 8, "rope_parameters": rope}
    config = mllama.MllamaTextConfig(**sizes)
    theirs = MllamaRotaryEmbedding(transformers.MllamaTextConfig(**sizes))
    assert inverse_frequencies(config).equal(theirs.inv_freq)
    positions = torch.tensor([0, 1, 77, 4000, 131071])
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = RotaryEmbedding(config)(positions, dtype)
        expected_cos, expected_sin = theirs(torch.empty(0, dtype=dtype), positions[None])
        assert cos.equal(expected_cos[0, :, : head_dim // 2])
        assert sin.equal(expected_sin[0, :, : head_dim // 2])


def test_checkpoint_frequencies() -> None:
    """Values of the released models, from the specification of the checkpoint."""
    frequencies = inverse_frequencies(
        mllama.MllamaTextConfig(rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    )
    known = {0: 1.0, 28: 0.00321145, 29: 0.00216657, 34: 0.00017851, 35: 9.556e-05, 63: 3.1e-07}
    for index, value in known.items():
        assert frequencies[index].item() == pytest.approx(value, rel=0.02)


def test_old_and_new_rope_entries_agree() -> None:
    old = mllama.MllamaTextConfig(rope_theta=1e4, rope_scaling={**LLAMA3, "type": "llama3"})
    new = mllama.MllamaTextConfig(rope_parameters={**LLAMA3, "rope_theta": 1e4})
    assert old == new


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("Text", {"hidden_act": "gelu"}, "text hidden_act must be \"silu\", got 'gelu'"),
        (
            "Text",
            {"hidden_size": 100},
            "hidden_size 100 is not a multiple of num_attention_heads 32",
        ),
        ("Text", {"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of"),
        ("Text", {"cross_attention_layers": [40]}, r"within 0\.\.39, got \[40\]"),
        (
            "Text",
            {"num_hidden_layers": 1, "cross_attention_layers": [0]},
            "at least one layer must be self",
        ),
        ("Text", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be .* got 'yarn'"),
        ("Text", {"rope_parameters": {"rope_type": "llama3"}}, "llama3 rope parameters lack"),
        ("Text", {"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ("Text", {"semantics": "hf"}, "got 'hf'"),
        ("Vision", {"hidden_act": "quick_gelu"}, "vision hidden_act must be"),
        ("Vision", {"image_size": 450}, "a multiple of patch_size 14, got 450"),
        ("Vision", {"vision_output_dim": 1280}, "vision_output_dim must be 7680 .* got 1280"),
        ("Vision", {"intermediate_layers_indices": [40]}, r"within 0\.\.31, got \[40\]"),
        ("Vision", {"supported_aspect_ratios": [[3, 2]]}, r"at most 4 tiles, got \[3, 2\]"),
        ("", {"image_token_index": 200000}, "outside the embedding's 128264 rows"),
    ],
)
def test_nonsense_is_refused(kind: str, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(mllama, f"Mllama{kind}Config")(**entries)


def test_wrong_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="needs model_type \"mllama\", got 'llama'"):
        mllama.MllamaConfig.from_dict({"model_type": "llama"})
