"""Mllama's text tower and what connects it with the images: cross-attention without dense masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaModel,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextCrossAttention,
    MllamaTextMLP,
    MllamaTextModel,
    MllamaTextRMSNorm,
    MllamaTextSelfAttention,
)

import mllama_kernels as ops
from mllama_kernels.plain import is_plain
from mllama_kernels.transformers.handing import gets_to, passes_on
from mllama_kernels.transformers.llama import plan_text
from mllama_kernels.transformers.patch import Patch, by_name
from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.support import (
    NAME,
    attends_as_written,
    drops_out,
    project,
    takes,
    takes_heads,
)
from mllama_kernels.transformers.text import (
    NORMS,
    TextCall,
    asks_weights,
    cache_position,
    fits_norm,
    grows,
    hands_down,
)
from mllama_kernels.transformers.wrappers import inside, modules_of


class TileView(NamedTuple):
    """Which image tiles the tokens of a call attend to.

    Attributes:
        tiles: (B, L, T) bool, True where a token attends to a tile.
        rows: (B, L) bool, True where a token sees an image. With the semantics of `transformers` a
            token that sees none attends to every tile all the same; only its MLP branch is dropped.
        tokens: how many tokens a tile has.
    """

    tiles: Tensor
    rows: Tensor
    tokens: int

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The same as a mask (B, 1, L, T * tokens) to add to the scores."""
        hidden = ~self.tiles.repeat_interleave(self.tokens, dim=-1).unsqueeze(1)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def plan_mllama_text(plan: PatchPlan, tower: MllamaTextModel, owner: MllamaModel | None) -> None:
    """The text tower, and the model that prepares its cross-attention mask, if there is one."""
    plan_text(
        plan,
        tower,
        MllamaSelfAttentionDecoderLayer,
        MllamaTextRMSNorm,
        MllamaTextMLP,
        MllamaTextSelfAttention,
    )
    layers = modules_of(tower, MllamaCrossAttentionDecoderLayer)
    attentions = modules_of(tower, MllamaTextCrossAttention)
    if not attentions or not plan.takes_heads("cross_attention", attentions[0].head_dim, tower):
        return
    owners = [owner] if owner is not None else []
    # The model makes no dense mask any more, so either all of them are replaced or none.
    every = [inside(tower.layers[i]) for i in sorted(tower.cross_attention_layers)]
    if layers != every or attentions != [inside(layer.cross_attn) for layer in every]:
        if "cross_attention" in plan.ops:
            plan.left["cross_attention"] = "some of the layers are of another class"
    elif plan.free("cross_attention", *owners, *layers, *attentions):
        for function, modules in (
            (model_forward, owners),
            (cross_layer_forward, layers),
            (cross_attention_forward, attentions),
        ):
            for module in modules:
                plan.add("cross_attention", module, function, semantics=plan.semantics)


def model_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Turns the mask per tile into a :class:`TileView` where `transformers` would expand it, if all that
    are given it know it."""
    inputs = by_name(patch, args, kwargs)
    mask = inputs.get("cross_attention_mask")
    if (
        mask is None
        or mask.dim() != 4
        or not _hands_down_view(patch.module.language_model)
        or asks_weights(patch.module.config.get_text_config(), inputs)
    ):
        return patch.original(**inputs)
    tiles = mask.flatten(2) == 1
    columns = _columns(inputs, tiles.shape[1])
    if columns is not None:
        tiles = tiles[:, columns]
    rows = tiles.any(-1)
    if patch.options["semantics"] == "transformers":
        # Its mask for a row that sees nothing is zero everywhere: the row attends to every tile.
        tiles = tiles | ~rows.unsqueeze(-1)
    view = TileView(tiles, rows, patch.module.vision_model.num_patches)
    return patch.original(**{**inputs, "cross_attention_mask": None}, mllama_kernels_view=view)


def _hands_down_view(tower: nn.Module) -> bool:
    """Whether a view gets to the layers that use it, and no code of others to see a mask missing."""
    if not passes_on(tower, MllamaTextModel):
        return False
    tower = inside(tower)
    crossing = [tower.layers[i] for i in tower.cross_attention_layers]
    return hands_down(tower) and all(gets_to(layer, cross_layer_forward) for layer in crossing)


def _columns(inputs: dict[str, Any], rows: int) -> Tensor | None:
    """Which of the mask's rows belong to this call's tokens; None: all."""
    if transformers.__version__.startswith("4."):
        return inputs.get("cache_position")
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if tokens.shape[1] == rows:  # generation in newer releases hands over the new rows
        return None
    cache = inputs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(tokens.shape[1], device=tokens.device) + past


# Arguments of a cross-attention layer that are not for its attention.
_NOT_FOR_CROSS_ATTENTION = {
    "hidden_states",
    "cross_attention_mask",
    "attention_mask",
    "full_text_row_masked_out_mask",
    "position_ids",
    "position_embeddings",
    "use_cache",
}


def cross_layer_forward(
    patch: Patch,
    *args: Any,
    mllama_kernels_view: TileView | None = None,
    mllama_kernels_call: TextCall | None = None,
    **kwargs: Any,
) -> Tensor:
    layer, view = patch.module, mllama_kernels_view
    inputs = by_name(patch, args, kwargs)
    if view is None:
        return patch.original(**inputs)
    stream, attention = inputs["hidden_states"], layer.cross_attn
    given = {**patch.defaults, **inputs}
    handed = {n: value for n, value in given.items() if n not in _NOT_FOR_CROSS_ATTENTION}
    x = layer.input_layernorm(stream)
    if gets_to(attention, cross_attention_forward):
        attended, _ = attention(hidden_states=x, mllama_kernels_view=view, **handed)
    else:
        attended, _ = attention(hidden_states=x, attention_mask=view.bias(x.dtype), **handed)
        if patch.options["semantics"] == "meta":
            attended = attended * view.rows.unsqueeze(-1)
    norm, gate = layer.post_attention_layernorm, layer.cross_attn_attn_gate
    if fits_norm(norm, attended, stream, gate):
        x, stream = ops.add_rms_norm(
            attended, stream, norm.weight, norm.variance_epsilon, gate=gate
        )
    else:
        stream = stream + gate.tanh() * attended
        x = norm(stream)
    x = layer.mlp(x)
    rows = view.rows.to(x.device)
    if takes(x, stream, layer.cross_attn_mlp_gate):
        return ops.gated_residual(x, stream, layer.cross_attn_mlp_gate, rows)
    return stream + layer.cross_attn_mlp_gate.tanh() * (rows.unsqueeze(-1) * x)


def cross_attention_forward(
    patch: Patch,
    *args: Any,
    mllama_kernels_view: TileView | None = None,
    mllama_kernels_call: TextCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    attention, view = patch.module, mllama_kernels_view
    inputs = by_name(patch, args, kwargs)
    x, states = inputs["hidden_states"], inputs.get("cross_attention_states")
    cache, layer = inputs.get("past_key_values"), attention.layer_idx
    q = None
    if _is_plain_call(patch, inputs, view):
        q = project(attention.q_proj, x).unflatten(-1, (-1, attention.head_dim))
    if q is None or not takes(q):
        return _with_dense_mask(patch, inputs, view)
    # q_norm runs inside the op, unless something has to happen when the module is called.
    norm = attention.q_norm
    fused = fits_norm(norm, q)
    q = q if fused else _norm_heads(norm, q)
    if states is not None:
        k, v = (
            project(linear, states).view(
                q.shape[0], -1, attention.num_key_value_heads, attention.head_dim
            )
            for linear in (attention.k_proj, attention.v_proj)
        )
        k = _norm_heads(attention.k_norm, k)
        if cache is not None:
            new = (k.transpose(1, 2), v.transpose(1, 2), layer)
            keys, values = cache.update(*new, *cache_position(inputs))
            if keys.shape[2] != k.shape[1]:  # images of earlier calls come first
                k, v = keys.transpose(1, 2), values.transpose(1, 2)
    else:
        held = cache.layers[layer]
        k, v = held.keys.transpose(1, 2), held.values.transpose(1, 2)
    out = _attend(
        q,
        k,
        v,
        view,
        softmax_scale=attention.scaling,
        **({"q_norm_weight": norm.weight, "eps": norm.variance_epsilon} if fused else {}),
    )
    return project(attention.o_proj, out.flatten(2)), None


def _norm_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over each head of x (B, L, H, D), which others get as `transformers` lays it out."""
    if is_plain(norm, *NORMS):
        return norm(x)
    return norm(x.transpose(1, 2)).transpose(1, 2).contiguous()


def _is_plain_call(patch: Patch, inputs: dict[str, Any], view: TileView | None) -> bool:
    """Whether the op computes what the module would."""
    attention, cache = patch.module, inputs.get("past_key_values")
    x = inputs["hidden_states"]
    if drops_out(attention) or not takes_heads(attention.head_dim, x.device):
        return False
    if not attends_as_written(attention):
        return False
    if inputs.get("attention_mask") is not None or asks_weights(attention.config, inputs):
        return False
    if inputs.get("is_causal"):  # said to the model; release 4 has its cross-attention obey, too
        return False
    if inputs.get("cross_attention_states") is None and not grows(cache, attention.layer_idx):
        return False
    # Without a mask, sdpa in transformers takes the module for causal, and hides keys by accident.
    return (
        view is not None
        or x.shape[1] == 1
        or attention.config._attn_implementation in ("eager", NAME)
        or patch.options["semantics"] == "meta"
    )


def _with_dense_mask(
    patch: Patch, inputs: dict[str, Any], view: TileView | None
) -> tuple[Tensor, Tensor | None]:
    if view is None:
        return patch.original(**inputs)
    x = inputs["hidden_states"]
    out, weights = patch.original(**{**inputs, "attention_mask": view.bias(x.dtype)})
    if patch.options["semantics"] == "meta":
        out = out * view.rows.unsqueeze(-1)
    return out, weights


def _attend(q: Tensor, k: Tensor, v: Tensor, view: TileView | None, **options: Any) -> Tensor:
    """q (B, L, Hq, D) to k, v (B, Lk, Hkv, D), the tiles of an image one after the other."""
    tokens = view.tokens if view is not None else k.shape[1]
    mask = view.tiles.to(q.device) if view is not None else None
    batch, length, heads, dim = k.shape
    tiles = length // tokens
    # The op reaches every tile by one stride. Those of a cache, (B, Hkv, Lk, D), have two: as slots
    # of a pool, with heads lying in between, they are read where they are all the same.
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    cached = keys.is_contiguous() and values.is_contiguous() and not k.requires_grad
    if batch == 1 or tiles == 1 or k.is_contiguous() or not cached:
        k, v = (t.unflatten(1, (-1, tokens)) for t in (k, v))
        return ops.cross_attention(q, k, v, mask, **options)
    slots, strides = (batch - 1) * heads * tiles + tiles, (tokens * dim, dim, length * dim, 1)
    k, v = (t.as_strided((slots, tokens, heads, dim), strides) for t in (keys, values))
    number = torch.arange(batch, device=q.device, dtype=torch.int32)
    table = (number * (heads * tiles)).unsqueeze(1) + number.new_ones(tiles).cumsum(0) - 1
    rows = q.shape[1]
    out = ops.cross_attention(
        q.flatten(0, 1),
        k,
        v,
        mask.flatten(0, 1) if mask is not None else None,
        tile_table=table.int(),
        cu_seqlens=torch.arange(0, batch * rows + 1, rows, device=q.device, dtype=torch.int32),
        max_seqlen=rows,
        **options,
    )
    return out.unflatten(0, (batch, rows))
