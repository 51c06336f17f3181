"""Meta's params.json: its entries checked, and the `config.json` that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mllama.config_fields import (
    FLAG,
    NOTHING,
    ConfigError,
    Kind,
    either,
    integer,
    number,
    value_problem,
)

PARAMS = "params.json"
# Fixed in Meta's code, absent from params.json.
_PATCH, _CHANNELS = 14, 3
_VISION_HEADS, _VISION_LAYERS, _GLOBAL_LAYERS, _MLP_RATIO = 16, 32, 8, 4
_TAPS = [3, 7, 15, 23, 30]
_MAX_POSITIONS = 131072

_WIDTH, _LAYERS, _HEADS = integer(1, 2**20), integer(1, 5000), integer(1, 2**16)
# What an entry must be; and of those that may be absent, what stands for them.
_KINDS: dict[str, Kind] = {
    "vocab_size": integer(1, 2**24),
    "n_layers": _LAYERS,
    "vision_num_cross_attention_layers": _LAYERS,
    "dim": _WIDTH,
    "n_heads": _HEADS,
    "norm_eps": number(0, 1000),
    "rope_theta": number(0, 1e30, above=True),
    "vision_chunk_size": integer(1, 2**16),
    "n_kv_heads": either(_HEADS, NOTHING),
    "ffn_dim_multiplier": either(number(0, 1000, above=True), NOTHING),
    "multiple_of": _WIDTH,
    "use_scaled_rope": either(FLAG, NOTHING),
    "vision_max_num_chunks": integer(1, 1024),
}
_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None,
    "ffn_dim_multiplier": None,
    "multiple_of": 256,
    "use_scaled_rope": None,
    "vision_max_num_chunks": 4,
}


def params_entries(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The entries on the model in the content of a params.json."""
    entries = stored.get("model", stored)
    return dict(entries) if isinstance(entries, Mapping) else {"model": entries}


def _checked(params: Mapping[str, Any]) -> dict[str, Any]:
    values = {**_DEFAULTS, **params}
    problems = [f"{PARAMS} lacks {name!r}" for name in _KINDS if name not in values]
    for name in _KINDS.keys() & values.keys():
        problems += [f"{PARAMS}: {p}" for p in value_problem(name, _KINDS[name], values)]
    if problems:
        raise ConfigError(PARAMS, sorted(problems))
    return values


def feed_forward_size(width: int, multiplier: float | None, multiple_of: int) -> int:
    """The feed-forward width that Meta's code computes from params.json."""
    size = int(2 * 4 * width / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def cross_attention_layers(self_layers: int, cross_layers: int) -> list[int]:
    """Positions of the cross-attention layers in the merged list of layers (Meta's schedule)."""
    step = math.ceil(self_layers / cross_layers)
    before = list(range(self_layers))[::-1][::step][:cross_layers][::-1]
    return [layer + index for index, layer in enumerate(before)]


def config_from_params(params: dict[str, Any], vision_width: int) -> dict[str, Any]:
    """The `config.json` dictionary that Meta's params.json stands for.

    Args:
        params: the content of params.json, or of its entry "model".
        vision_width: width of the vision tower, from the length of its class embedding.
    Raises: ConfigError that lists every entry that is lacking or cannot be.
    """
    params = _checked(params)
    vocabulary = params["vocab_size"]
    # Llama 3's 256 special tokens end the vocabulary; the image token is the first row after it.
    special = vocabulary - 256
    self_layers, cross_layers = params["n_layers"], params["vision_num_cross_attention_layers"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    if params["use_scaled_rope"]:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    tiles = params["vision_max_num_chunks"]
    sides = range(1, tiles + 1)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": vocabulary,
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": vocabulary,
            "hidden_size": params["dim"],
            "intermediate_size": feed_forward_size(
                params["dim"], params["ffn_dim_multiplier"], params["multiple_of"]
            ),
            "num_hidden_layers": self_layers + cross_layers,
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params["n_kv_heads"] or params["n_heads"],
            "cross_attention_layers": cross_attention_layers(self_layers, cross_layers),
            "rope_parameters": rope,
            "rms_norm_eps": params["norm_eps"],
            "max_position_embeddings": _MAX_POSITIONS,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": special,
            "eos_token_id": [special + 1, special + 8, special + 9],
            "pad_token_id": special + 4,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": vision_width,
            "intermediate_size": _MLP_RATIO * vision_width,
            "num_hidden_layers": _VISION_LAYERS,
            "num_global_layers": _GLOBAL_LAYERS,
            "attention_heads": _VISION_HEADS,
            "num_channels": _CHANNELS,
            "patch_size": _PATCH,
            "image_size": params["vision_chunk_size"],
            "max_num_tiles": tiles,
            "supported_aspect_ratios": [[h, w] for h in sides for w in sides if h * w <= tiles],
            "intermediate_layers_indices": list(_TAPS),
            "vision_output_dim": (len(_TAPS) + 1) * vision_width,
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
        },
    }
