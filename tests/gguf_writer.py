"""Writes GGUF files of a published-layout folder as the two converters do: the inverse of the reader.

Its own tables and transforms, and the `gguf` package's writer, so that a mistake in the package is not
repeated here.

- `write_unified`: as Ollama's converter (convert_mllama.go, since 0.7.1): one file, entries sorted by key,
  vision norms `attn_norm` and `ffn_norm`, q and k of every attention interleaved.
- `write_split`: as Ollama published it in 2024: a text file of llama.cpp's converter, and a projector
  file with the names of `clip.cpp` (`ln1`, `attn_out`, fc1 `ffn_down`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Quantise = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]
_TYPES = gguf.GGMLQuantizationType
_TEXT = [
    (r"language_model\.lm_head", "output"),
    (r"language_model\.model\.embed_tokens", "token_embd"),
    (r"language_model\.model\.norm", "output_norm"),
    (r"language_model\.model\.layers", "blk"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"cross_attn\.([qkvo]_proj|[qk]_norm)", r"cross_attn_\1"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
]
_VISION = [
    (r"multi_modal_projector", "mm.0"),
    (r"vision_model\.", "v."),
    (r"gated_positional_embedding\.embedding$", "position_embd.weight"),
    (r"gated_positional_embedding\.tile_embedding", "tile_position_embd"),
    (r"gated_positional_embedding", "position_embd"),
    (r"(pre|post)_tile_positional_embedding\.embedding", r"\1_tile_position_embd"),
    (r"(pre|post)_tile_positional_embedding", r"\1_tile_position_embd"),
    (r"class_embedding", "class_embd"),
    (r"patch_embedding", "patch_embd"),
    (r"layernorm_(pre|post)", r"\1_ln"),
    (r"global_transformer\.layers", "global.blk"),
    (r"transformer\.layers", "blk"),
    (r"gate_attn", "attn_gate"),
    (r"gate_ffn", "ffn_gate"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
]
_UNIFIED = [
    (r"self_attn\.o_proj", "attn_output"),
    (r"mlp\.fc1", "ffn_up"),
    (r"mlp\.fc2", "ffn_down"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
]
_SPLIT = [
    (r"self_attn\.o_proj", "attn_out"),
    (r"mlp\.fc1", "ffn_down"),
    (r"mlp\.fc2", "ffn_up"),
    (r"input_layernorm", "ln1"),
    (r"post_attention_layernorm", "ln2"),
]
# What converters leave in float32 whatever the file's type is.
_FLOAT32 = re.compile(
    r"v\.(tile_position|pre_tile_position|post_tile_position)_embd\.weight|.*\.bias"
)


def as_float32(name: str, values: np.ndarray) -> tuple[np.ndarray, _TYPES]:
    return values.astype(np.float32), _TYPES.F32


def as_type(kind: str, keep: str = "F16") -> Quantise:
    """Matrices in a type of the `gguf` package, where their rows are whole blocks; others as ``keep``."""
    wanted, kept = _TYPES[kind], _TYPES[keep]

    def quantise(name: str, values: np.ndarray) -> tuple[np.ndarray, _TYPES]:
        block = gguf.GGML_QUANT_SIZES[wanted][0]
        fits = values.ndim == 2 and values.shape[1] % block == 0
        is_matrix = fits and not _FLOAT32.fullmatch(name) and "position_embd" not in name
        chosen = wanted if is_matrix else kept
        return gguf.quants.quantize(values.astype(np.float32), chosen), chosen

    return quantise


def _renamed(name: str, *tables: list[tuple[str, str]]) -> str:
    for table in tables:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
    return name


def _pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    result = torch.empty_like(weight)
    dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            for half in range(2):
                result[head * dim + 2 * i + half] = weight[head * dim + half * (dim // 2) + i]
    return result


def text_tensors(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], *, unified: bool
) -> dict[str, np.ndarray]:
    text = config["text_config"]
    heads = {"q": text["num_attention_heads"], "k": text["num_key_value_heads"]}
    kinds = "self|cross" if unified else "self"
    tensors = {"rope_freqs.weight": rope_factors(text)}
    for name, tensor in weights.items():
        if not name.startswith("language_model."):
            continue
        tensor = tensor.float()
        if match := re.search(rf"(?:{kinds})_attn\.([qk])_proj\.weight", name):
            tensor = _pairs_from_halves(tensor, heads[match[1]])
        tensors[_renamed(name, _TEXT)] = tensor.numpy()
    return tensors


def vision_tensors(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    unified: bool,
    raw_gates: bool = False,
) -> dict[str, np.ndarray]:
    """``raw_gates``: those of the global layers as Ollama 0.7.0 left them."""
    heads = config["vision_config"]["attention_heads"]
    tensors = {}
    for name, tensor in weights.items():
        if name.startswith("language_model."):
            continue
        tensor = tensor.float()
        if unified and re.search(r"self_attn\.[qk]_proj\.weight", name):
            tensor = _pairs_from_halves(tensor, heads)
        own = _renamed(name, _VISION, _UNIFIED if unified else _SPLIT)
        if own == "v.position_embd.gate":
            tensors["v.position_embd.gate"] = 1 - np.tanh(tensor.numpy())
            tensors["v.tile_position_embd.gate"] = np.tanh(tensor.numpy())
            continue
        if own.endswith(".gate") or (re.search(r"_gate$", own) and not raw_gates):
            tensor = torch.from_numpy(np.tanh(tensor.numpy()))
        tensors[own] = tensor.numpy()
    return tensors


def rope_factors(text: Mapping[str, Any]) -> np.ndarray:
    rope = text["rope_parameters"]
    dim = text["hidden_size"] // text["num_attention_heads"]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original, result = rope["original_max_position_embeddings"], []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, dtype=np.float32)


def text_entries(folder: Path, config: Mapping[str, Any], *, pre: str) -> dict[str, Any]:
    text = config["text_config"]
    entries = {
        "mllama.block_count": text["num_hidden_layers"],
        "mllama.context_length": text["max_position_embeddings"],
        "mllama.embedding_length": text["hidden_size"],
        "mllama.feed_forward_length": text["intermediate_size"],
        "mllama.attention.head_count": text["num_attention_heads"],
        "mllama.attention.head_count_kv": text["num_key_value_heads"],
        "mllama.rope.freq_base": float(text["rope_parameters"]["rope_theta"]),
        "mllama.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "mllama.vocab_size": text["vocab_size"],
        "mllama.rope.dimension_count": text["hidden_size"] // text["num_attention_heads"],
        "mllama.attention.cross_attention_layers": text["cross_attention_layers"],
    }
    original = text["rope_parameters"]["original_max_position_embeddings"]
    if original != 8192:  # of the published models converters write nothing
        entries["mllama.rope.scaling.original_context_length"] = original
    if (folder / "tokenizer.json").is_file():
        entries |= tokenizer_entries(folder, pre)
    return entries


def tokenizer_entries(folder: Path, pre: str) -> dict[str, Any]:
    data = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = dict(data["model"]["vocab"])
    kinds = dict.fromkeys(tokens, 1)
    for token in data["added_tokens"]:
        tokens[token["content"]] = token["id"]
        kinds[token["content"]] = 3 if token["special"] else 4
    ordered = sorted(tokens, key=tokens.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ordered,
        "tokenizer.ggml.token_type": [kinds[token] for token in ordered],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": tokens[config["eos_token"]],
        "tokenizer.ggml.padding_token_id": tokens[config["pad_token"]],
        "tokenizer.chat_template": config["chat_template"],
    }


def vision_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    return {
        "mllama.vision.block_count": vision["num_hidden_layers"],
        "mllama.vision.global.block_count": vision["num_global_layers"],
        "mllama.vision.intermediate_layers_indices": vision["intermediate_layers_indices"],
        "mllama.vision.embedding_length": vision["hidden_size"],
        "mllama.vision.feed_forward_length": vision["intermediate_size"],
        "mllama.vision.attention.head_count": vision["attention_heads"],
        "mllama.vision.attention.layer_norm_epsilon": vision["norm_eps"],
        "mllama.vision.image_size": vision["image_size"],
        "mllama.vision.patch_size": vision["patch_size"],
        "mllama.vision.max_num_tiles": vision["max_num_tiles"],
        "mllama.vision.num_channels": vision["num_channels"],
    }


def write(
    path: Path,
    entries: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantise: Quantise = as_float32,
    architecture: str = "mllama",
) -> Path:
    """A file of entries and tensors; one-dimensional ones stay in float32, as in every converter."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, values in tensors.items():
        chosen = as_float32 if values.ndim == 1 else quantise
        data, kind = chosen(name, values)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The published-layout tensors and the configuration of a folder."""
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write_unified(
    folder: Path, path: Path, quantise: Quantise = as_float32, *, raw_gates: bool = False
) -> Path:
    weights, config = stored(folder)
    entries = {**text_entries(folder, config, pre="llama-bpe"), **vision_entries(config)}
    tensors = {
        **vision_tensors(weights, config, unified=True, raw_gates=raw_gates),
        **text_tensors(weights, config, unified=True),
    }
    return write(path, dict(sorted(entries.items())), dict(sorted(tensors.items())), quantise)


def write_split(
    folder: Path, path: Path, projector: Path, quantise: Quantise = as_float32
) -> tuple[Path, Path]:
    weights, config = stored(folder)
    entries = text_entries(folder, config, pre="smaug-bpe")
    write(path, entries, text_tensors(weights, config, unified=False), quantise)
    tensors = vision_tensors(weights, config, unified=False)
    kept = quantise if quantise is as_float32 else as_type("F16")  # projectors were never quantised
    return path, write(projector, vision_entries(config), tensors, kept)


def random_blocks(kind: str, seed: int = 0, keep: str = "F16") -> Quantise:
    """Matrices as random blocks of any type, with scales of the size that models have; others as ``keep``.

    The `gguf` package decodes all types and quantises only some.
    """
    wanted = _TYPES[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    # Where the float16 numbers of a block begin.
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
    }.get(kind, (0,))
    rng = np.random.default_rng(seed)
    plain = as_type(keep)

    def quantise(name: str, values: np.ndarray) -> tuple[np.ndarray, _TYPES]:
        is_weight = name.endswith(".weight") and "_embd" not in name.replace("token_embd", "")
        if values.ndim != 2 or values.shape[1] % block or not is_weight:
            return plain(name, values)
        rows, columns = values.shape
        blocks = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
        for at in halves:
            scale = rng.uniform(1e-5, 1e-4, len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
        return blocks.reshape(rows, -1), wanted

    return quantise
