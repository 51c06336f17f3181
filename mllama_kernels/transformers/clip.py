"""The CLIP vision tower of Llava."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings

import mllama_kernels as ops
from mllama_kernels.transformers.llama import of_class
from mllama_kernels.transformers.patch import Patch, by_name, is_plain
from mllama_kernels.transformers.plan import Plan
from mllama_kernels.transformers.support import drops_out, takes, takes_heads
from mllama_kernels.transformers.text import asks_weights

# The module that owns embeddings and norm: a part of CLIPVisionModel in release 4, that itself in 5.
TOWER = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)


def plan_clip(plan: Plan, tower: nn.Module) -> None:
    attentions = of_class(tower, CLIPAttention)
    if attentions and plan.takes_heads("vision_attention", attentions[0].head_dim, tower):
        plan.add_all("vision_attention", attentions, attention_forward)
    embeddings, norm = tower.embeddings, tower.pre_layrnorm
    known = type(embeddings) is CLIPVisionEmbeddings and type(norm) is nn.LayerNorm
    if known and plan.free("patch_embed", embeddings, norm):
        done = Normalised()
        plan.add("patch_embed", norm, norm_forward, done=done)
        reader = plan.patches[-1]
        plan.add("patch_embed", embeddings, embeddings_forward, reader=reader, done=done)


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
    ):
        q, k, v = (
            project(x).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if takes(q, k, v):
            out = ops.vision_attention(q, k, v, softmax_scale=attention.scale)
            return attention.out_proj(out.flatten(2)), None
    return patch.original(*args, **kwargs)


class Normalised:
    """Hands the embeddings that are normalised already from one module to the norm after it."""

    tensor: Tensor | None = None


def embeddings_forward(patch: Patch, *args: Any, **kwargs: Any) -> Tensor:
    """Embeddings and the norm that follows them in one op; the norm then passes them through."""
    embeddings, reader, done = patch.module, patch.options["reader"], patch.options["done"]
    norm = reader.module
    inputs = by_name(patch, args, kwargs)
    convolution, position = embeddings.patch_embedding, embeddings.position_embedding
    pixels = inputs["pixel_values"].to(convolution.weight.dtype)
    side = (embeddings.image_size, embeddings.image_size)
    done.tensor = None
    if (
        torch.compiler.is_compiling()  # which fuses them itself
        or torch.is_autocast_enabled(pixels.device.type)
        or pixels.shape[-2:] != side
        or type(convolution) is not nn.Conv2d
        or not reader.serves()
        or not all(map(is_plain, (convolution, position, norm)))
        or not takes(pixels, convolution.weight, position.weight, norm.weight)
    ):
        return patch.original(*args, **kwargs)
    # One tile per image, and none of the tables that Mllama adds: their gate is shut.
    table = position.weight
    shut = table.new_zeros(1)
    done.tensor = ops.patch_embed(
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
    return done.tensor


def norm_forward(patch: Patch, x: Tensor) -> Tensor:
    done = patch.options["done"]
    if x is done.tensor:
        done.tensor = None
        return x
    return patch.original(x)
