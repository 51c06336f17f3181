"""Writes Meta's `original/` layout from a published-layout state dict: the inverse of the loader.

Its own tables and transforms, so that a mistake in the package is not repeated here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Of the published 11B checkpoint.
PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 560,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 8,
}
_RENAMES = [
    (r"language_model\.model\.norm", "text_model.norm"),
    (r"language_model\.lm_head", "text_model.output"),
    (r"multi_modal_projector", "vision_model.vision_projection"),
    (r"vision_model\.patch_embedding", "vision_model.vision_encoder.conv1._linear"),
    (r"vision_model\.layernorm_(pre|post)", r"vision_model.vision_encoder.ln_\1"),
    (r"vision_model\.class_embedding", "vision_model.vision_encoder.class_embedding"),
    (
        r"vision_model\.gated_positional_embedding\.embedding",
        "vision_model.vision_encoder.positional_embedding",
    ),
    (
        r"vision_model\.gated_positional_embedding\.gate",
        "vision_model.vision_encoder.gated_positional_embedding_gate",
    ),
    (
        r"vision_model\.gated_positional_embedding\.tile_embedding\.weight",
        "vision_model.vision_encoder.gated_positional_embedding",
    ),
    (
        r"vision_model\.(pre|post)_tile_positional_embedding\.embedding\.weight",
        r"vision_model.vision_encoder.\1_tile_pos_embed.embedding",
    ),
    (
        r"vision_model\.(pre|post)_tile_positional_embedding\.gate",
        r"vision_model.vision_encoder.\1_tile_pos_embed.gate",
    ),
    (
        r"vision_model\.(transformer|global_transformer)\.layers\.",
        r"vision_model.vision_encoder.\1.resblocks.",
    ),
    (r"(.*resblocks\.\d+)\.self_attn\.([qkvo])_proj", r"\1.attn.w\2"),
    (r"(.*resblocks\.\d+)\.mlp\.fc1", r"\1.mlp.c_fc"),
    (r"(.*resblocks\.\d+)\.mlp\.fc2", r"\1.mlp.c_proj"),
    (r"(.*resblocks\.\d+)\.input_layernorm", r"\1.ln_1"),
    (r"(.*resblocks\.\d+)\.post_attention_layernorm", r"\1.ln_2"),
    (r"(text_model\..*)\.(?:self|cross)_attn\.([qkvo])_proj", r"\1.attention.w\2"),
    (r"(text_model\..*)\.cross_attn\.([qk]_norm)", r"\1.attention.\2"),
    (r"(text_model\..*)\.cross_attn_attn_gate", r"\1.gate_attn"),
    (r"(text_model\..*)\.cross_attn_mlp_gate", r"\1.gate_ffwd"),
    (r"(text_model\..*)\.mlp\.gate_proj", r"\1.feed_forward.w1"),
    (r"(text_model\..*)\.mlp\.down_proj", r"\1.feed_forward.w2"),
    (r"(text_model\..*)\.mlp\.up_proj", r"\1.feed_forward.w3"),
    (r"(text_model\..*)\.input_layernorm", r"\1.attention_norm"),
    (r"(text_model\..*)\.post_attention_layernorm", r"\1.ffn_norm"),
]
_ROWS = re.compile(
    r"text_model\.(?:output|tok_embeddings|learnable_embedding)\.weight"
    r"|text_model\..*\.(?:w[qkv]|w1|w3)\.weight"
    r"|vision_model\.vision_projection\.(?:weight|bias)"
    r"|.*conv1\._linear\.weight|.*\.attn\.w[qkv]\.weight|.*\.c_fc\.(?:weight|bias)"
)
_COLUMNS = re.compile(r".*\.(?:wo|w2|c_proj)\.weight")


def _pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    result = torch.empty_like(weight)
    dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            for half in range(2):
                source = head * dim + half * (dim // 2) + i
                result[head * dim + 2 * i + half] = weight[source]
    return result


def _square_table(rows: Tensor, ratios: list[list[int]], tiles: int, tokens: int) -> Tensor:
    """A (T, T, P, E) table that has every gathered row in it.

    Cells that no ratio uses get random values: they must have no effect. Where two ratios use one
    cell the rows must agree, so `rows` has to come from such a table.
    """
    rows = rows.reshape(len(ratios) + 1, tiles, tokens, -1)
    table = torch.randn(tiles, tiles, tokens, rows.shape[-1]).to(rows.dtype)
    for index, (height, width) in enumerate(ratios, start=1):
        for y in range(height):
            for x in range(width):
                table[y, x] = rows[index, y * width + x]
    return table


def meta_state_dict(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Published-layout tensors to Meta's names and forms, unsharded."""
    text, vision = config["text_config"], config["vision_config"]
    cross = text["cross_attention_layers"]
    own = [i for i in range(text["num_hidden_layers"]) if i not in cross]
    heads = {"q": text["num_attention_heads"], "k": text["num_key_value_heads"]}
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    ratios, tiles = vision["supported_aspect_ratios"], vision["max_num_tiles"]
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "language_model.model.embed_tokens.weight":
            result["text_model.tok_embeddings.weight"] = tensor[: text["vocab_size"]].clone()
            result["text_model.learnable_embedding.weight"] = tensor[text["vocab_size"] :].clone()
            continue
        if match := re.match(r"language_model\.model\.layers\.(\d+)\.(.*)", name):
            layer = int(match[1])
            if rotary := re.fullmatch(r"self_attn\.([qk])_proj\.weight", match[2]):
                tensor = _pairs_from_halves(tensor, heads[rotary[1]])
            place = "cross_attention_layers" if layer in cross else "layers"
            index = (cross if layer in cross else own).index(layer)
            name = f"text_model.{place}.{index}.{match[2]}"
        if name.endswith("patch_embedding.weight"):
            tensor = tensor.flatten(1)
        elif name.endswith("tile_embedding.weight"):
            tensor = _square_table(tensor, ratios, tiles, tokens)
        elif name.endswith("tile_positional_embedding.embedding.weight"):
            tensor = _square_table(tensor, ratios, tiles, 1)
        for pattern, replacement in _RENAMES:
            name = re.sub(f"^{pattern}", replacement, name)
        result[name] = tensor.clone()
    return result


def shard(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Tensor-parallel shards as Meta's code has them."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        if _ROWS.fullmatch(name):
            parts = list(tensor.chunk(count, dim=0))
        elif _COLUMNS.fullmatch(name):
            parts = list(tensor.chunk(count, dim=1))
        else:
            parts = [tensor] * count
        for target, part in zip(shards, parts, strict=True):
            target[name] = part.clone()
    return shards


def write_original(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], shards: int = 1
) -> None:
    """params.json and consolidated files for `weights` (published names) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text, vision = config["text_config"], config["vision_config"]
    rope = text.get("rope_parameters") or {"rope_theta": text["rope_theta"]}
    cross = len(text["cross_attention_layers"])
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"] - cross,
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "vocab_size": text["vocab_size"],
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 32,
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope.get("rope_type") == "llama3",
        "vision_chunk_size": vision["image_size"],
        "vision_max_num_chunks": vision["max_num_tiles"],
        "vision_num_cross_attention_layers": cross,
    }
    (folder / "params.json").write_text(json.dumps(params))
    parts = shard(meta_state_dict(weights, config), shards)
    for index, part in enumerate(parts):
        name = "consolidated.pth" if shards == 1 else f"consolidated.{index:02d}.pth"
        torch.save(part, folder / name)
