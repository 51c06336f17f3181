"""Which weight gets which encoding, and what models take then."""

from __future__ import annotations

import math

import pytest

from mllama import MllamaConfig
from mllama.checkpoints.expected import expected_shapes
from mllama.checkpoints.key_layout import KeyLayout
from mllama.quantization.plan import named_config, weight_bytes
from mllama.quantization.policy import (
    MADE,
    MODEL_ENCODINGS,
    assign,
    check_overrides,
    fitting_encoding,
    kind_of,
)
from mllama_kernels.encodings import ENCODINGS

LAYOUT = KeyLayout("MllamaForConditionalGeneration")
GIGABYTES = {
    "11b": {"int8": 11.57, "fp8": 11.57, "q8_0": 11.41, "q6_k": 9.04, "q4_k_m": 7.03, "q4_k": 6.68},
    "90b": {"int8": 89.56, "fp8": 89.56, "q8_0": 94.20, "q6_k": 72.97, "q4_k_m": 54.19},
}
GIGABYTES["90b"]["q4_k"] = 50.73


def assigned(encoding: str, name: str = "11b", overrides: dict[str, str] | None = None):
    config = named_config(name)
    found = assign(config, LAYOUT, expected_shapes(config, LAYOUT), encoding, overrides)
    assert found.fallbacks == []
    return {LAYOUT.published_name(n): e for n, e in found.encodings.items()}


@pytest.mark.parametrize("name", ["11b", "90b"])
def test_models_take_what_was_promised(name: str) -> None:
    for encoding, expected in GIGABYTES[name].items():
        assert weight_bytes(named_config(name), encoding) / 1e9 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("encoding", MODEL_ENCODINGS)
def test_what_is_never_quantised(encoding: str) -> None:
    for name in assigned(encoding):
        assert name.endswith(".weight")
        for never in ("norm", "gate.", "embedding.", "class_", "position", "tile", "patch"):
            assert never not in name.replace("embed_tokens", ""), name


def test_the_table() -> None:
    language = "language_model.model.layers"
    for encoding, self_q, cross_k, head, embedding, vision in (
        ("q4_k", "q4_k", "q6_k", "q6_k", "q4_k", "q8_0"),
        ("q4_0", "q4_0", "q6_k", "q6_k", "q4_0", "q8_0"),
        ("q4_k_m", "q4_k", "q6_k", "q6_k", "q4_k", "q8_0"),
        ("q6_k", "q6_k", "q6_k", "q6_k", "q6_k", "q8_0"),
        ("q8_0", "q8_0", "q8_0", "q8_0", "q8_0", "q8_0"),
        ("int8", "int8", "int8", "int8", "int8", None),
        ("fp8", "fp8", "fp8", "fp8", "fp8", None),
    ):
        own = assigned(encoding)
        assert own[f"{language}.0.self_attn.q_proj.weight"] == self_q
        assert own[f"{language}.3.cross_attn.k_proj.weight"] == cross_k
        assert own["language_model.lm_head.weight"] == head
        assert own["language_model.model.embed_tokens.weight"] == embedding
        assert own.get("vision_model.transformer.layers.0.mlp.fc1.weight") == vision
        assert own.get("multi_modal_projector.weight") == vision


def test_the_mix_keeps_more_bits_of_half_the_layers() -> None:
    own = assigned("q4_k_m")
    down = [own[f"language_model.model.layers.{i}.mlp.down_proj.weight"] for i in range(40)]
    # The first and last eighth, and every third between.
    kept = [i for i in range(40) if i < 5 or i >= 35 or (i - 5) % 3 == 2]
    assert [i for i, encoding in enumerate(down) if encoding == "q6_k"] == kept
    attended = [i for i in range(40) if i % 5 != 3]
    v = [own[f"language_model.model.layers.{i}.self_attn.v_proj.weight"] for i in attended]
    kept = [i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    assert [i for i, encoding in enumerate(v) if encoding == "q6_k"] == kept
    assert own["language_model.model.layers.3.cross_attn.o_proj.weight"] == "q6_k"
    assert own["language_model.model.layers.3.cross_attn.q_proj.weight"] == "q4_k"


def test_the_first_override_that_matches_counts() -> None:
    overrides = {"*.layers.0.mlp.down_proj.weight": "q8_0", "*.down_proj.weight": "q6_k"}
    overrides |= {"vision_model.*": "bfloat16"}
    own = assigned("q4_k", overrides=overrides)
    assert own["language_model.model.layers.0.mlp.down_proj.weight"] == "q8_0"
    assert own["language_model.model.layers.1.mlp.down_proj.weight"] == "q6_k"
    assert not any(name.startswith("vision_model.") for name in own)
    assert own["multi_modal_projector.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"*.down_porj.weight": "q6_k"}, "down_porj.weight' matches no weight.*down_proj"),
        ({"*.input_layernorm.weight": "q6_k"}, "matches no weight that can be quantised"),
        ({"*.down_proj.weight": "q5_k"}, "must be one of .*got 'q5_k'"),
        ({"*.down_proj.weight": "nf4"}, "got 'nf4'; it is only read"),
        ({"vision_model.*": "float32"}, "is float32, but what is not quantised has .*bfloat16"),
    ],
)
def test_an_override_that_means_nothing_is_refused(overrides: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assigned("q4_k", overrides=overrides)


def test_overrides_of_other_types_are_refused() -> None:
    for given in ([("*", "q8_0")], {"*": 4}, {1: "q8_0"}):
        with pytest.raises(TypeError, match="mapping of patterns to encodings"):
            check_overrides(given)


def test_an_unknown_encoding_is_refused() -> None:
    for given in ("q5_k", "int4", None, 4):
        with pytest.raises(ValueError, match="quantization must be one of"):
            assigned(given)


def test_rows_that_are_no_whole_blocks_fall_back() -> None:
    assert fitting_encoding("q4_k", 512) == "q4_k"
    assert fitting_encoding("q4_k", 160) == "q4_0"
    assert fitting_encoding("q6_k", 160) == "q8_0"
    assert fitting_encoding("q8_0", 80) is None
    assert fitting_encoding("int8", 7) == "int8"
    config = MllamaConfig(
        text_config={"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"intermediate_size": 176, "num_hidden_layers": 2, "cross_attention_layers": [1]},
        vision_config={"hidden_size": 64, "attention_heads": 1, "vision_output_dim": 384},
    )
    found = assign(config, LAYOUT, expected_shapes(config, LAYOUT), "q4_k", None, "float16")
    assert set(found.encodings.values()) == {"q4_0", "q8_0"}
    (down,) = (line for line in found.fallbacks if "176" in line)
    assert "2 weights with rows of 176 are no whole blocks of q4_k: float16" in down
    assert not any(name.endswith("down_proj.weight") for name in found.encodings)


def test_sizes_of_encodings_are_those_of_their_blocks() -> None:
    for name in MADE:
        bits = ENCODINGS[name].nbytes(1024, 4096) * 8 / (1024 * 4096)
        expected = {"q8_0": 8.5, "q6_k": 6.5625, "q4_k": 4.5, "q4_0": 4.5, "int8": 8, "fp8": 8}
        assert math.isclose(bits, expected[name], rel_tol=1e-2)


def test_kinds_have_names() -> None:
    assert kind_of("lm_head.weight").name == "lm_head"
    assert kind_of("model.language_model.layers.3.cross_attn.o_proj.weight").name == "cross o_proj"
    assert kind_of("model.vision_model.transformer.layers.1.mlp.fc1.weight").name == "vision fc1"
    assert kind_of("model.language_model.norm.weight") is None
    assert kind_of("model.vision_model.transformer.layers.1.mlp.fc1.bias") is None
