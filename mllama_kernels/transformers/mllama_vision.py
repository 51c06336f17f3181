"""Mllama's vision tower: patch embedding in one op, and padding as a vector instead of a square mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import (
    MllamaPrecomputedAspectRatioEmbedding,
    MllamaPrecomputedPositionEmbedding,
    MllamaVisionAttention,
    MllamaVisionEncoder,
    MllamaVisionEncoderLayer,
    MllamaVisionModel,
)

import mllama_kernels as ops
from mllama_kernels._arguments import PAD_TO
from mllama_kernels.plain import is_plain
from mllama_kernels.transformers.handing import gets_to, passes_on
from mllama_kernels.transformers.patch import Patch, by_name
from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.support import (
    attends_as_written,
    is_plain_embedding,
    is_plain_layer_norm,
    is_plain_patching,
    project,
    takes,
    takes_heads,
)
from mllama_kernels.transformers.wrappers import inside, modules_of


def plan_mllama_vision(plan: PatchPlan, tower: MllamaVisionModel) -> None:
    attentions = modules_of(tower, MllamaVisionAttention)
    attends = bool(attentions) and plan.takes_heads(
        "vision_attention", attentions[0].head_dim, tower
    )
    layers = map(inside, [*tower.transformer.layers, *tower.global_transformer.layers])
    if attends and attentions != [inside(layer.self_attn) for layer in layers]:
        plan.left["vision_attention"] = "some of the layers are of another class"
        attends = False
    attends = attends and plan.free("vision_attention", tower, *attentions)
    embeds = plan.free("patch_embed", tower)
    reasons = {
        "vision_attention": attends,
        "patch_embed": embeds,
        "semantics": plan.semantics == "meta" and plan.replaceable("semantics", tower),
    }
    if any(reasons.values()):
        asked = [op for op, wanted in reasons.items() if wanted]
        patch = Patch(tower, vision_model_forward, *asked, semantics=plan.semantics)
        plan.patches.append(patch)
    if attends:
        plan.add_all("vision_attention", attentions, vision_attention_forward)


def vision_model_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """The forward of `transformers`, with what the kernels do for it in its place."""
    tower = patch.module
    inputs = by_name(patch, args, kwargs)
    pixels, ids, mask = (
        inputs.pop(name, None) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    )
    config = tower.config
    asks_more = inputs or config.output_attentions or config.output_hidden_states
    if pixels is None or pixels.dim() != 6 or mask is None or asks_more:
        return patch.original(*args, **kwargs)
    batch, images, tiles = pixels.shape[:3]
    ids, mask = ids.reshape(batch * images, -1), mask.reshape(batch * images, tiles)
    x = _embed(patch, pixels.flatten(0, 1), ids)
    count, padded, width = batch * images, x.shape[2], x.shape[3]
    is_patch = torch.arange(padded, device=x.device) < tower.num_patches
    padding = ~((mask != 0).to(x.device).unsqueeze(-1) & is_patch).flatten(1)
    if not _hands_down(tower) or _shows_nothing(padding):
        padding = _square_mask(padding, x.dtype)

    first = x.flatten(1, 2)
    local = tower.transformer(first, attention_mask=padding)
    x = tower.layernorm_post(local.last_hidden_state).view(count, tiles, padded, width)
    x = tower.post_tile_positional_embedding(x, ids).flatten(1, 2)
    x = tower.global_transformer(x, attention_mask=padding).last_hidden_state
    streams = local.hidden_states
    if patch.options["semantics"] == "meta":
        streams = (first, *streams)  # tap i is what enters local layer i, not what leaves it

    def patches(t: Tensor) -> Tensor:
        t = t.view(count, tiles, padded, -1)[:, :, : tower.num_patches]
        return t.unflatten(0, (batch, images))

    taps = torch.stack([streams[i] for i in tower.intermediate_layers_indices], dim=-1)
    return BaseModelOutput(
        last_hidden_state=torch.cat([patches(x), patches(taps.flatten(-2))], dim=-1)
    )


def _hands_down(tower: nn.Module) -> bool:
    """Whether padding as a vector gets to the attention of every layer, and to no code of others."""
    for encoder in (tower.transformer, tower.global_transformer):
        if not passes_on(encoder, MllamaVisionEncoder):
            return False
        for layer in inside(encoder).layers:
            if not passes_on(layer, MllamaVisionEncoderLayer):
                return False
            if not gets_to(inside(layer).self_attn, vision_attention_forward):
                return False
    return True


def _embed(patch: Patch, pixels: Tensor, ids: Tensor) -> Tensor:
    """Pixels (M, T, C, H, W) to the tokens of the encoder (M, T, P rounded up, E)."""
    tower = patch.module
    convolution, norm = tower.patch_embedding, tower.layernorm_pre
    position, tile = tower.gated_positional_embedding, tower.pre_tile_positional_embedding
    pixels = pixels.to(convolution.weight.dtype)
    if convolution.weight.device.type != "meta":  # as offloaded weights are until the module runs
        pixels = pixels.to(convolution.weight.device)
    side = (tower.image_size, tower.image_size)
    if (
        "patch_embed" in patch.ops
        and pixels.shape[-2:] == side
        and pixels.shape[1] == tower.max_num_tiles
        and not torch.is_autocast_enabled(pixels.device.type)
        and is_plain_patching(convolution, tower.patch_size)
        and is_plain_layer_norm(norm)
        and is_plain(position, MllamaPrecomputedPositionEmbedding)
        and is_plain(tile, MllamaPrecomputedAspectRatioEmbedding)
        and tile.is_gated
        and is_plain_embedding(position.tile_embedding)
        and is_plain_embedding(tile.embedding)
        and takes(pixels, convolution.weight, tower.class_embedding, norm.weight, position.gate)
    ):
        return ops.patch_embed(
            pixels,
            ids.flatten(),
            convolution.weight,
            tower.class_embedding,
            position.embedding,
            position.gate,
            position.tile_embedding.weight,
            tile.embedding.weight,
            tile.gate,
            norm.weight,
            norm.bias,
            norm.eps,
        )
    x = convolution(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
    x = tile(x.unflatten(0, pixels.shape[:2]), ids)
    x = tower.apply_class_embedding(x.flatten(0, 1)).unflatten(0, pixels.shape[:2])
    x = norm(position(x, ids))
    return F.pad(x, (0, 0, 0, -x.shape[2] % PAD_TO))


def _shows_nothing(padding: Tensor) -> bool:
    """Whether all of some image is padding, (M, S). Its tokens then see every token alike, since the sum
    of a score and the mask of `transformers` rounds to the mask; the op has nothing for them to see.
    Waits for the device once. A graph cannot ask: :func:`vision_attention_forward` has its answer."""
    return not torch.compiler.is_compiling() and bool(padding.all(1).any())


def _square_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """padding (M, S) as the mask (M, 1, S, S) that `transformers` adds to the scores."""
    hidden = (padding.unsqueeze(-1) & padding.unsqueeze(-2)).unsqueeze(1)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def vision_attention_forward(
    patch: Patch, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """With a (M, S) bool mask, True at padding, from :func:`vision_model_forward`."""
    attention = patch.module
    inputs = by_name(patch, args, kwargs)
    x, padding = inputs.get("hidden_states", inputs.get("hidden_state")), inputs["attention_mask"]
    if padding is None or padding.dim() != 2:
        return patch.original(*args, **kwargs)
    if takes_heads(attention.head_dim, x.device) and attends_as_written(attention):
        q, k, v = (
            project(linear, x).unflatten(-1, (-1, attention.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if takes(q, k, v):
            padding = padding.to(q.device)
            if (
                torch.compiler.is_compiling()
            ):  # an image that is padding all over: see _shows_nothing
                blind = padding.all(1, keepdim=True)
                q, padding = q.masked_fill(blind[..., None, None], 0), padding & ~blind
            out = ops.vision_attention(q, k, v, padding, softmax_scale=attention.scaling)
            return project(attention.o_proj, out.flatten(2)), None
    return patch.original(x, _square_mask(padding, x.dtype))
