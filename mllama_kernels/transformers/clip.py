"""The CLIP vision tower of Llava."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings

import mllama_kernels as ops
from mllama_kernels.plain import is_plain
from mllama_kernels.transformers.handing import gets_to
from mllama_kernels.transformers.patch import Patch, by_name
from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.support import (
    attends_as_written,
    drops_out,
    is_plain_embedding,
    is_plain_layer_norm,
    is_plain_patching,
    project,
    takes,
    takes_heads,
)
from mllama_kernels.transformers.text import asks_weights
from mllama_kernels.transformers.wrappers import modules_of

# The module that owns embeddings and norm: a part of CLIPVisionModel in release 4, that itself in 5.
TOWER = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)


def plan_clip(plan: PatchPlan, tower: nn.Module) -> None:
    attentions = modules_of(tower, CLIPAttention)
    if attentions and plan.takes_heads("vision_attention", attentions[0].head_dim, tower):
        plan.add_all("vision_attention", attentions, attention_forward)
    embeddings, norm = tower.embeddings, tower.pre_layrnorm
    known = type(embeddings) is CLIPVisionEmbeddings and type(norm) is nn.LayerNorm
    if known and plan.free("patch_embed", tower, embeddings, norm):
        plan.add("patch_embed", tower, tower_forward)
        plan.add("patch_embed", embeddings, embeddings_forward)
        plan.add("patch_embed", norm, norm_forward)


def attention_forward(patch: Patch, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    attention = patch.module
    inputs = by_name(patch, args, kwargs)
    x = inputs["hidden_states"]
    masked = any(
        inputs.get(name) is not None for name in ("attention_mask", "causal_attention_mask")
    )
    if (
        not masked
        and not asks_weights(attention.config, inputs)
        and not drops_out(attention)
        and not attention.is_causal
        and takes_heads(attention.head_dim, x.device)
        and attends_as_written(attention)
    ):
        q, k, v = (
            project(linear, x).unflatten(-1, (-1, attention.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if takes(q, k, v):
            out = ops.vision_attention(q, k, v, softmax_scale=attention.scale)
            return project(attention.out_proj, out.flatten(2)), None
    return patch.original(*args, **kwargs)


class Embedded:
    """The tokens of images, embedded and normalised: what stands for their pixels between the tower, that
    knows that both modules do nothing else, and the second of them.

    Attributes:
        tokens: (B, P, E).
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def tower_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Embeddings and the norm that follows them in one op, where both are ours and nobody else's."""
    tower = patch.module
    inputs = by_name(patch, args, kwargs)
    pixels = inputs.get("pixel_values")
    if pixels is not None and not torch.compiler.is_compiling():  # which fuses them itself
        tokens = _embed(tower.embeddings, tower.pre_layrnorm, pixels)
        if tokens is not None:
            inputs["pixel_values"] = Embedded(tokens)
    return patch.original(**inputs)


def _embed(embeddings: nn.Module, norm: nn.Module, pixels: Tensor) -> Tensor | None:
    """Pixels (B, C, H, W) to normalised tokens (B, P, E); None where a module has to be called."""
    if not (
        is_plain(embeddings, CLIPVisionEmbeddings)
        and gets_to(embeddings, embeddings_forward)
        and is_plain_layer_norm(norm)
        and gets_to(norm, norm_forward)
    ):
        return None
    convolution, position = embeddings.patch_embedding, embeddings.position_embedding
    if not (is_plain_patching(convolution, embeddings.patch_size) and is_plain_embedding(position)):
        return None
    pixels = pixels.to(convolution.weight.dtype)
    if (
        torch.is_autocast_enabled(pixels.device.type)
        or pixels.shape[-2:] != (embeddings.image_size, embeddings.image_size)
        or not takes(pixels, convolution.weight, position.weight, norm.weight)
    ):
        return None
    # One tile per image, and none of the tables that Mllama adds: their gate is shut.
    table = position(embeddings.position_ids)
    if table.shape != (1, *position.weight.shape):
        return None
    table = table.squeeze(0)
    shut = table.new_zeros(1)
    return ops.patch_embed(
        pixels.unsqueeze(1),
        torch.zeros(pixels.shape[0], dtype=torch.int64, device=pixels.device),
        convolution.weight,
        embeddings.class_embedding,
        table,
        shut,
        table.detach().view(1, -1),
        embeddings.class_embedding.detach().view(1, -1),
        shut,
        norm.weight,
        norm.bias,
        norm.eps,
        pad_to=1,
    ).squeeze(1)


def embeddings_forward(patch: Patch, *args: Any, **kwargs: Any) -> Tensor | Embedded:
    given = args[0] if args else kwargs.get("pixel_values")
    return given if isinstance(given, Embedded) else patch.original(*args, **kwargs)


def norm_forward(patch: Patch, *args: Any, **kwargs: Any) -> Tensor:
    given = args[0] if args else kwargs.get("input")
    return given.tokens if isinstance(given, Embedded) else patch.original(*args, **kwargs)
