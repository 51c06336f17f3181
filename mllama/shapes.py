"""The shapes of a model's parameters from its configuration: known before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

Shapes = dict[str, tuple[int, ...]]

EXTRA_ROWS = 8  # of the embedding beyond `vocab_size`; the image token is the first of them


def text_shapes(config: MllamaTextConfig) -> Shapes:
    """By the names within the text tower."""
    return _listed(_text_layers(config), _text_ends(config))


def vision_shapes(config: MllamaVisionConfig) -> Shapes:
    """By the names within the vision tower."""
    return _listed(_vision_layers(config), _vision_ends(config))


def head_shapes(config: MllamaTextConfig) -> Shapes:
    return {"weight": (config.vocab_size, config.hidden_size)}


def projector_shapes(config: MllamaConfig) -> Shapes:
    width = config.text_config.hidden_size
    return {"weight": (width, config.vision_config.vision_output_dim), "bias": (width,)}


def text_parameters(config: MllamaTextConfig) -> int:
    """How many numbers tower and head have, without listing the layers."""
    return _counted(_text_layers(config), {**_text_ends(config), **head_shapes(config)})


def vision_parameters(config: MllamaVisionConfig) -> int:
    """How many numbers the tower has, without listing the layers."""
    return _counted(_vision_layers(config), _vision_ends(config))


def layer_tensors(config: MllamaTextConfig | MllamaVisionConfig) -> int:
    """How many tensors the layers of a tower have."""
    layers = _text_layers(config) if config.part == "text_config" else _vision_layers(config)
    return sum(len(places) * len(one) for _, places, one in layers)


# Layers of one kind: the list they are in, their places in it, and the shapes of one of them.
_Layers = tuple[str, list[int] | range, Shapes]


def _listed(layers: Iterator[_Layers], ends: Shapes) -> Shapes:
    shapes = dict(ends)
    for stack, places, one in layers:
        for place in places:
            shapes |= {f"{stack}.{place}.{name}": shape for name, shape in one.items()}
    return shapes


def _counted(layers: Iterator[_Layers], ends: Shapes) -> int:
    count = sum(map(math.prod, ends.values()))
    for _, places, one in layers:
        count += len(places) * sum(map(math.prod, one.values()))
    return count


def _text_ends(config: MllamaTextConfig) -> Shapes:
    width = config.hidden_size
    return {"embed_tokens.weight": (config.vocab_size + EXTRA_ROWS, width), "norm.weight": (width,)}


def _text_layers(config: MllamaTextConfig) -> Iterator[_Layers]:
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    kv = config.num_key_value_heads * head
    projections = {"q_proj": (width, width), "k_proj": (kv, width), "v_proj": (kv, width)}
    projections["o_proj"] = (width, width)
    shared: Shapes = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    own = {f"self_attn.{name}.weight": shape for name, shape in projections.items()}
    crossed: Shapes = {f"cross_attn.{name}.weight": shape for name, shape in projections.items()}
    crossed |= {"cross_attn.q_norm.weight": (head,), "cross_attn.k_norm.weight": (head,)}
    crossed |= {"cross_attn_attn_gate": (1,), "cross_attn_mlp_gate": (1,)}
    yield "layers", config.self_attention_layers, {**shared, **own}
    yield "layers", config.cross_attention_layers, {**shared, **crossed}


def _vision_ends(config: MllamaVisionConfig) -> Shapes:
    width, tiles, patches = config.hidden_size, config.max_num_tiles, config.num_patches
    ratios, patch = config.max_aspect_ratio_id + 1, config.patch_size
    shapes: Shapes = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, config.num_channels, patch, patch),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (patches, width),
        "gated_positional_embedding.tile_embedding.weight": (ratios, tiles * patches * width),
    }
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        shapes |= {f"{name}.gate": (1,), f"{name}.embedding.weight": (ratios, tiles * width)}
    for name in ("layernorm_pre", "layernorm_post"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def _vision_layers(config: MllamaVisionConfig) -> Iterator[_Layers]:
    width, inner = config.hidden_size, config.intermediate_size
    layer: Shapes = {
        f"self_attn.{name}.weight": (width, width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    layer |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
    layer |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    gated = {**layer, "gate_attn": (1,), "gate_ffn": (1,)}
    yield "transformer.layers", range(config.num_hidden_layers), layer
    yield "global_transformer.layers", range(config.num_global_layers), gated
