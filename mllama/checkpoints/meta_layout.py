"""Meta's own checkpoint layout (`original/`): how its tensors become ours, as a plan of recipes.

Names, shard merging and transforms are those that reproduce the outputs of Meta's code:

- tensor-parallel shards are concatenated (`wo`, `w2`, `c_proj.weight` on dimension 1, the other
  parallel layers on dimension 0); replicated tensors come from shard 0;
- the rows of the self-attention q and k projections go from interleaved pairs (2i, 2i+1) to halves
  (i, i + d/2); cross-attention and the vision tower have no rotary embedding and stay as they are;
- gates keep their first element, without tanh;
- tile tables are gathered per aspect ratio: row `id` holds the h*w used tiles, then zeros;
- the rows of `learnable_embedding` follow the vocabulary in `embed_tokens`;
- position tables made for another tile size are resized as Meta's loader does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

# Meta's name to (our name, dimension its shards are concatenated on; None: replicated).
_TEXT_BLOCK: dict[str, tuple[str, int | None]] = {
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_SELF_BLOCK = _TEXT_BLOCK | {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
}
_CROSS_BLOCK = _TEXT_BLOCK | {
    "attention.wq.weight": ("cross_attn.q_proj.weight", 0),
    "attention.wk.weight": ("cross_attn.k_proj.weight", 0),
    "attention.wv.weight": ("cross_attn.v_proj.weight", 0),
    "attention.wo.weight": ("cross_attn.o_proj.weight", 1),
    "attention.q_norm.weight": ("cross_attn.q_norm.weight", None),
    "attention.k_norm.weight": ("cross_attn.k_norm.weight", None),
    "gate_attn": ("cross_attn_attn_gate", None),
    "gate_ffwd": ("cross_attn_mlp_gate", None),
}
_VISION_BLOCK: dict[str, tuple[str, int | None]] = {
    "attn.wq.weight": ("self_attn.q_proj.weight", 0),
    "attn.wk.weight": ("self_attn.k_proj.weight", 0),
    "attn.wv.weight": ("self_attn.v_proj.weight", 0),
    "attn.wo.weight": ("self_attn.o_proj.weight", 1),
    "mlp.c_fc.weight": ("mlp.fc1.weight", 0),
    "mlp.c_fc.bias": ("mlp.fc1.bias", 0),
    "mlp.c_proj.weight": ("mlp.fc2.weight", 1),
    "mlp.c_proj.bias": ("mlp.fc2.bias", None),
    "ln_1.weight": ("input_layernorm.weight", None),
    "ln_1.bias": ("input_layernorm.bias", None),
    "ln_2.weight": ("post_attention_layernorm.weight", None),
    "ln_2.bias": ("post_attention_layernorm.bias", None),
}
_GLOBAL_BLOCK = _VISION_BLOCK | {
    "gate_attn": ("gate_attn", None),
    "gate_ffn": ("gate_ffn", None),
}


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def first_element(gate: Tensor) -> Tensor:
    """A gate of any shape to (1,)."""
    return gate.reshape(-1)[:1]


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rotary rows per head from pairs (2i, 2i+1) to halves (i, i + d/2); shape (heads * d, E)."""
    rows, columns = weight.shape
    return weight.reshape(heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)


def _interpolate(grid: Tensor, side: tuple[int, int]) -> Tensor:
    """(h, w, E) to (*side, E), bilinear with aligned corners, at least in float32.

    The result keeps that precision: it is rounded once, when it is copied into the model.
    """
    image = grid.to(torch.promote_types(grid.dtype, torch.float32)).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=side, mode="bilinear", align_corners=True)
    return resized[0].permute(1, 2, 0)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Position table (g*g + 1, E), class token first, to (grid*grid + 1, E)."""
    old = round((table.shape[0] - 1) ** 0.5)
    if old == grid:
        return table
    patches = _interpolate(table[1:].reshape(old, old, -1), (grid, grid))
    return torch.cat([table[:1], patches.reshape(grid * grid, -1)])


def resize_tile_positions(table: Tensor, grid: int) -> Tensor:
    """(T, T, g*g + 1, E) to (T, T, grid*grid + 1, E), interpolated across the T*g super-grid."""
    tiles, _, tokens, width = table.shape
    old = round((tokens - 1) ** 0.5)
    if old == grid:
        return table
    plane = table[:, :, 1:].reshape(tiles, tiles, old, old, width).transpose(1, 2)
    plane = _interpolate(plane.reshape(tiles * old, tiles * old, width), (tiles * grid,) * 2)
    patches = plane.reshape(tiles, grid, tiles, grid, width).transpose(1, 2)
    return torch.cat([table[:, :, :1], patches.reshape(tiles, tiles, grid * grid, width)], dim=2)


def gather_per_ratio(table: Tensor, ratios: list[list[int]]) -> Tensor:
    """Tile table (T, T, P, E) to one row per aspect-ratio id, (len(ratios) + 1, T*P*E).

    Row `id` holds the tiles of `table[:rows, :columns]` in row-major order, then zeros; row 0, the
    id of padding, is zero.
    """
    tiles, _, tokens, width = table.shape
    rows = table.new_zeros(len(ratios) + 1, tiles, tokens, width)
    for index, (height, breadth) in enumerate(ratios, start=1):
        used = table[:height, :breadth].reshape(height * breadth, tokens, width)
        rows[index, : height * breadth] = used
    return rows.reshape(len(ratios) + 1, -1)


@dataclass(frozen=True)
class Recipe:
    """How one parameter is made: Meta tensors, merged over shards, joined by rows, transformed."""

    parts: tuple[tuple[str, int | None], ...]
    transform: Transform = _keep

    def make(self, shards: list[dict[str, Tensor]]) -> Tensor:
        """The parameter; `shards` hold the tensors of `parts`, one dictionary per file."""
        merged = []
        for name, dim in self.parts:
            if dim is None or len(shards) == 1:
                merged.append(shards[0][name])
            else:
                merged.append(torch.cat([shard[name] for shard in shards], dim=dim))
        return self.transform(merged[0] if len(merged) == 1 else torch.cat(merged))

    def outline(self, shards: list[dict[str, Tensor]]) -> Tensor:
        """What `make` gives, on the meta device.

        Shapes are joined by hand: torch's `cat` for meta tensors first imports half of its compiler.
        Raises: RuntimeError for shapes that do not fit.
        """
        merged = []
        for name, dim in self.parts:
            found = [tuple(shard[name].shape) for shard in shards]
            merged.append(found[0] if dim is None else _joined_shape(found, dim))
        shape = merged[0] if len(merged) == 1 else _joined_shape(merged, 0)
        dtype = shards[0][self.parts[0][0]].dtype
        return self.transform(torch.empty(shape, dtype=dtype, device="meta"))


def _joined_shape(shapes: list[tuple[int, ...]], dim: int) -> tuple[int, ...]:
    """The shape of a concatenation."""
    rests = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(rests) != 1 or any(len(shape) <= dim for shape in shapes):
        raise RuntimeError(f"shapes do not join on dimension {dim}")
    first = shapes[0]
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


def _block_recipes(
    plan: dict[str, Recipe], names: dict[str, tuple[str, int | None]], source: str, target: str
) -> None:
    for meta_name, (name, dim) in names.items():
        transform = first_element if "gate_" in meta_name else _keep
        plan[f"{target}.{name}"] = Recipe(((f"{source}.{meta_name}", dim),), transform)


def _text_recipes(text: dict[str, Any]) -> dict[str, Recipe]:
    prefix = "model.language_model"
    plan = {
        f"{prefix}.embed_tokens.weight": Recipe(
            (
                ("text_model.tok_embeddings.weight", 0),
                ("text_model.learnable_embedding.weight", 0),
            )
        ),
        f"{prefix}.norm.weight": Recipe((("text_model.norm.weight", None),)),
        "lm_head.weight": Recipe((("text_model.output.weight", 0),)),
    }
    cross = text["cross_attention_layers"]
    own = sorted(set(range(text["num_hidden_layers"])) - set(cross))
    for index, layer in enumerate(cross):
        source = f"text_model.cross_attention_layers.{index}"
        _block_recipes(plan, _CROSS_BLOCK, source, f"{prefix}.layers.{layer}")
    heads = {"wq": text["num_attention_heads"], "wk": text["num_key_value_heads"]}
    for index, layer in enumerate(own):
        source = f"text_model.layers.{index}"
        _block_recipes(plan, _SELF_BLOCK, source, f"{prefix}.layers.{layer}")
        for meta_name, count in heads.items():
            name, dim = _SELF_BLOCK[f"attention.{meta_name}.weight"]
            plan[f"{prefix}.layers.{layer}.{name}"] = Recipe(
                ((f"{source}.attention.{meta_name}.weight", dim),),
                lambda weight, count=count: halves_from_pairs(weight, count),
            )
    return plan


def _vision_recipes(vision: dict[str, Any]) -> dict[str, Recipe]:
    prefix, source = "model.vision_model", "vision_model.vision_encoder"
    ratios, patch = vision["supported_aspect_ratios"], vision["patch_size"]
    grid = vision["image_size"] // patch
    channels = vision["num_channels"]

    def one(meta_name: str, transform: Transform = _keep, dim: int | None = None) -> Recipe:
        return Recipe(((f"{source}.{meta_name}", dim),), transform)

    plan = {
        f"{prefix}.class_embedding": one("class_embedding"),
        f"{prefix}.patch_embedding.weight": one(
            "conv1._linear.weight", lambda w: w.reshape(-1, channels, patch, patch), 0
        ),
        f"{prefix}.gated_positional_embedding.embedding": one(
            "positional_embedding", lambda table: resize_positions(table, grid)
        ),
        f"{prefix}.gated_positional_embedding.gate": one(
            "gated_positional_embedding_gate", first_element
        ),
        f"{prefix}.gated_positional_embedding.tile_embedding.weight": one(
            "gated_positional_embedding",
            lambda table: gather_per_ratio(resize_tile_positions(table, grid), ratios),
        ),
    }
    for place in ("pre", "post"):
        embedding = f"{prefix}.{place}_tile_positional_embedding"
        meta_name = f"{place}_tile_pos_embed"
        plan[f"{embedding}.gate"] = one(f"{meta_name}.gate", first_element)
        plan[f"{embedding}.embedding.weight"] = one(
            f"{meta_name}.embedding", lambda table: gather_per_ratio(table, ratios)
        )
        for kind in ("weight", "bias"):
            plan[f"{prefix}.layernorm_{place}.{kind}"] = one(f"ln_{place}.{kind}")
    for tower, block, count in (
        ("transformer", _VISION_BLOCK, vision["num_hidden_layers"]),
        ("global_transformer", _GLOBAL_BLOCK, vision["num_global_layers"]),
    ):
        for i in range(count):
            blocks = f"{source}.{tower}.resblocks.{i}"
            _block_recipes(plan, block, blocks, f"{prefix}.{tower}.layers.{i}")
    for kind in ("weight", "bias"):
        plan[f"model.multi_modal_projector.{kind}"] = Recipe(
            ((f"vision_model.vision_projection.{kind}", 0),)
        )
    return plan


def recipes(config: dict[str, Any]) -> dict[str, Recipe]:
    """Every parameter of the model (canonical name) and how it is made from Meta's tensors.

    Args:
        config: a `config.json` dictionary, as `meta_params.config_from_params` derives it.
    """
    return _text_recipes(config["text_config"]) | _vision_recipes(config["vision_config"])
