"""The metadata of GGUF files, as the `config.json` and the `generation_config.json` that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllama.checkpoints.gguf.container import BadGguf, GgufFile
from mllama.checkpoints.gguf.files import ARCHITECTURE, without_vision
from mllama.checkpoints.gguf.header import GgufArray
from mllama.config_fields import ConfigError, Kind, integer, list_of, number, value_problem
from mllama.wording import quoted

_WIDTH, _LAYERS, _HEADS = integer(1, 2**20), integer(1, 5000), integer(1, 2**16)
_PLACE = integer(0, 5000)
_EPSILON = number(0, 1000)
# What an entry must be, without the architecture before it.
_TEXT: dict[str, Kind] = {
    "block_count": _LAYERS,
    "context_length": integer(1, 2**31 - 1),
    "embedding_length": _WIDTH,
    "feed_forward_length": _WIDTH,
    "attention.head_count": _HEADS,
    "attention.head_count_kv": _HEADS,
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.cross_attention_layers": list_of(_PLACE, "a list of layers", most=5000),
    "rope.freq_base": number(0, 1e30, above=True),
}
_VISION: dict[str, Kind] = {
    "vision.block_count": _LAYERS,
    "vision.global.block_count": _LAYERS,
    "vision.intermediate_layers_indices": list_of(_PLACE, "a list of layers", most=5000),
    "vision.embedding_length": _WIDTH,
    "vision.feed_forward_length": _WIDTH,
    "vision.attention.head_count": _HEADS,
    "vision.attention.layer_norm_epsilon": _EPSILON,
    "vision.image_size": integer(1, 2**16),
    "vision.patch_size": integer(1, 2**12),
    "vision.max_num_tiles": integer(1, 64),
    "vision.num_channels": integer(1, 64),
}
# Llama 3's own, which files do not hold: `rope_freqs` has what follows from them.
_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ENDS_OF_TURNS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
IMAGE_TOKEN = "<|image|>"


class Vocabulary:
    """What the metadata say about tokens: their texts, and ids by name."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Raises: BadGguf for an array of anything else."""
        tokens = self._file.array("tokenizer.ggml.tokens")
        if not all(isinstance(token, str) for token in tokens):
            raise BadGguf(f"{self._file.name}: tokenizer.ggml.tokens must hold strings")
        return tokens

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def named(self, name: str) -> int | None:
        """The id of "bos", "eos" or "padding". Raises: BadGguf for one that no token has."""
        key = f"tokenizer.ggml.{name}_token_id"
        index = self._file.metadata.get(key)
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise BadGguf(
                f"{self._file.name}: {key} must be below {len(self.tokens)}, got {quoted(index)}"
            )
        return index

    def ends(self) -> list[int]:
        """The tokens that end an answer: those the file lists, or of an instruct model all that end turns."""
        listed = self._file.array("tokenizer.ggml.eos_token_ids")
        if listed:
            if all(type(index) is int and 0 <= index < len(self.tokens) for index in listed):
                return listed
            raise BadGguf(
                f"{self._file.name}: tokenizer.ggml.eos_token_ids must be below {len(self.tokens)}, got "
                f"{quoted(listed)}"
            )
        end = self.named("eos")
        if end is None:
            return []
        if not self.is_instruct:
            return [end]
        turns = [index for token in _ENDS_OF_TURNS if (index := self.id_of(token)) is not None]
        return sorted({end, *turns})

    @property
    def is_instruct(self) -> bool:
        """Whether an answer ends as a turn does."""
        end = self.named("eos")
        return end is not None and self.tokens[end] in ("<|eot_id|>", "<|eom_id|>")


def text_entries(file: GgufFile, vocab_size: int, vocabulary: Vocabulary) -> dict[str, Any]:
    """The `text_config` of a file.

    Args:
        vocab_size: rows of the head.
    Raises: ConfigError that lists every entry that is lacking or cannot be; BadGguf for the vocabulary.
    """
    values = _checked(file, _TEXT)
    base = values["rope.freq_base"]
    return {
        "model_type": "mllama_text_model",
        "vocab_size": vocab_size,
        "hidden_size": values["embedding_length"],
        "intermediate_size": values["feed_forward_length"],
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": values["attention.head_count"],
        "num_key_value_heads": values["attention.head_count_kv"],
        "cross_attention_layers": values["attention.cross_attention_layers"],
        "rope_parameters": {**_rope(file), "rope_theta": base},
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": values["context_length"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.named("bos"),
        "eos_token_id": vocabulary.ends() or None,
        "pad_token_id": vocabulary.named("padding"),
    }


def vision_entries(file: GgufFile) -> dict[str, Any]:
    """The `vision_config` of a file. Raises: ConfigError as :func:`text_entries`."""
    values = _checked(file, _VISION)
    tiles, taps = values["vision.max_num_tiles"], values["vision.intermediate_layers_indices"]
    sides = range(1, tiles + 1)
    width = values["vision.embedding_length"]
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": width,
        "intermediate_size": values["vision.feed_forward_length"],
        "num_hidden_layers": values["vision.block_count"],
        "num_global_layers": values["vision.global.block_count"],
        "attention_heads": values["vision.attention.head_count"],
        "num_channels": values["vision.num_channels"],
        "patch_size": values["vision.patch_size"],
        "image_size": values["vision.image_size"],
        "max_num_tiles": tiles,
        "supported_aspect_ratios": [[h, w] for h in sides for w in sides if h * w <= tiles],
        "intermediate_layers_indices": taps,
        "vision_output_dim": (len(taps) + 1) * width,
        "hidden_act": "gelu",
        "norm_eps": values["vision.attention.layer_norm_epsilon"],
    }


def image_options(file: GgufFile) -> dict[str, Any]:
    """Tile side and number of tiles, as an image processor takes them.

    Raises: ConfigError, also for a text file, which does not say.
    """
    if f"{ARCHITECTURE}.vision.image_size" not in file.metadata:
        raise ConfigError(file.name, [without_vision(file)])
    values = _checked(file, {k: _VISION[k] for k in ("vision.image_size", "vision.max_num_tiles")})
    side = values["vision.image_size"]
    return {
        "size": {"height": side, "width": side},
        "max_image_tiles": values["vision.max_num_tiles"],
    }


def generation_entries(vocabulary: Vocabulary) -> dict[str, Any]:
    """The defaults of `generate`: tokens, and for an instruct model the published sampling."""
    tokens = {
        "bos_token_id": vocabulary.named("bos"),
        "eos_token_id": vocabulary.ends() or None,
        "pad_token_id": vocabulary.named("padding"),
    }
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {**tokens, **(sampling if vocabulary.is_instruct else {})}


def _rope(file: GgufFile) -> dict[str, Any]:
    """The scaling: Llama 3's, unless the file says that there is none. Raises: ConfigError for others."""
    prefix = f"{ARCHITECTURE}.rope.scaling."
    kind = file.metadata.get(prefix + "type", "llama3")
    if kind == "none":
        return {"rope_type": "default"}
    if kind != "llama3":
        raise ConfigError(file.name, [f"{prefix}type is {quoted(kind)}, which is not supported"])
    stored = {
        "factor": file.metadata.get(prefix + "factor"),
        "original_max_position_embeddings": file.metadata.get(prefix + "original_context_length"),
    }
    return {**_ROPE, **{name: value for name, value in stored.items() if value is not None}}


def _checked(file: GgufFile, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    values = {}
    for name in kinds:
        key = f"{ARCHITECTURE}.{name}"
        if key in file.metadata:
            value = file.metadata[key]
            values[name] = file.array(key) if isinstance(value, GgufArray) else _shortest(value)
    problems = [f"it lacks {ARCHITECTURE}.{name}" for name in kinds if name not in values]
    for name in list(values):
        problems += [f"{ARCHITECTURE}.{p}" for p in value_problem(name, kinds[name], values)]
    if problems:
        raise ConfigError(file.name, problems)
    return values


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it: 1e-05 is stored as 9.999999747378752e-06."""
    if isinstance(value, float) and abs(value) <= np.finfo(np.float32).max:
        return float(str(np.float32(value)))
    return value
