"""Pixels to the tokens that enter the vision encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_kernels import _dispatch
from mllama_kernels._arguments import PAD_TO


@_dispatch.public
def patch_embed(
    pixel_values: Tensor,
    aspect_ratio_ids: Tensor,
    patch_weight: Tensor,
    class_embedding: Tensor,
    position_embedding: Tensor,
    position_gate: Tensor,
    tile_position_embedding: Tensor,
    pre_tile_embedding: Tensor,
    pre_tile_gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    *,
    pad_to: int = PAD_TO,
) -> Tensor:
    """Patch convolution, tile and position embeddings, class token and LayerNorm.

    For image m, tile t, patch p > 0 (p = 0 is the class token, which takes no pre-tile embedding)::

        x = conv(pixels)[p] + tanh(pre_tile_gate) * pre_tile_embedding[id, t]
        x = x + (1 - tanh(g)) * position_embedding[p] + tanh(g) * tile_position_embedding[id, t, p]
        out = layer_norm(x) * norm_weight + norm_bias

    with id = aspect_ratio_ids[m], g = position_gate, P = (size / patch)^2 + 1, every step rounded to the
    dtype. Tokens from P up to a multiple of `pad_to` are zero.

    Args:
        pixel_values: (M, T, C, size, size), float32, float16 or bfloat16 (float64 on CPU); C at least 1.
        aspect_ratio_ids: (M,) int64 in [0, R). Outside it: an error on CPU, NaN tokens on CUDA.
        patch_weight: (E, C, patch, patch), the convolution's weight; stride is `patch`.
        class_embedding: (E,).
        position_embedding: (P, E).
        position_gate: (1,).
        tile_position_embedding: (R, T * P * E).
        pre_tile_embedding: (R, T * E).
        pre_tile_gate: (1,).
        norm_weight, norm_bias: (E,).
        eps: of the LayerNorm.
        pad_to: tokens per tile are rounded up to a multiple of this; at most 2**20.
    Returns:
        (M, T, P rounded up, E) in the dtype of pixel_values.
    Backward:
        saves the tokens before LayerNorm, M T P E elements, and of the inputs those it reads. Of what
        LayerNorm needs that is all: mean and deviation are recomputed. It computes the gradients that
        are asked for and no others; those of pixel_values and patch_weight are torch's matrix products
        with the gradient of the patches, so the bits of the gradient of pixel_values may depend on what
        else is in the batch. On CUDA E is at most 2560 for gradients.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Dosovitskiy et al. 2020 (arXiv 2010.11929); gates and tiles as in Llama 3.2 Vision.
    """
    tensors = (
        pixel_values,
        aspect_ratio_ids,
        patch_weight,
        class_embedding,
        position_embedding,
        position_gate,
        tile_position_embedding,
        pre_tile_embedding,
        pre_tile_gate,
        norm_weight,
        norm_bias,
    )
    with_tokens = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.ops.mllama_kernels.patch_embed(*tensors, eps, pad_to, with_tokens)[0]


def _fake(
    pixel_values: Tensor,
    aspect_ratio_ids: Tensor,
    patch_weight: Tensor,
    class_embedding: Tensor,
    position_embedding: Tensor,
    position_gate: Tensor,
    tile_position_embedding: Tensor,
    pre_tile_embedding: Tensor,
    pre_tile_gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    pad_to: int,
    with_tokens: bool,
) -> tuple[Tensor, Tensor]:
    images, tiles, _, size, _ = pixel_values.shape
    width, _, patch, _ = patch_weight.shape
    tokens = (size // patch) ** 2 + 1
    out = pixel_values.new_empty(images, tiles, -(-tokens // pad_to) * pad_to, width)
    kept = (images, tiles, tokens, width) if with_tokens else (0,)
    return out, pixel_values.new_empty(kept)


def _backward_fake(
    grad_out: Tensor,
    tokens: Tensor,
    aspect_ratio_ids: Tensor,
    position_embedding: Tensor,
    position_gate: Tensor,
    tile_position_embedding: Tensor,
    pre_tile_embedding: Tensor,
    pre_tile_gate: Tensor,
    norm_weight: Tensor,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    images, tiles, positions, width = tokens.shape
    shapes = [
        (images, tiles, positions - 1, width),
        (width,),
        position_embedding.shape,
        (1,),
        tile_position_embedding.shape,
        pre_tile_embedding.shape,
        (1,),
        (width,),
        (width,),
    ]
    return [tokens.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pixel_values, ids, patch_weight, _, *tables, norm_weight, _, ctx.eps, _, _ = inputs
    _, tokens = output
    ctx.mark_non_differentiable(tokens)
    ctx.set_materialize_grads(False)
    ctx.size = pixel_values.shape[-1]
    for_pixels, _, for_weight = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        pixel_values if for_weight else None,
        patch_weight if for_pixels or for_weight else None,
        tokens,
        ids,
        *tables,
        norm_weight,
    )


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    pixel_values, patch_weight, tokens, *operands = ctx.saved_tensors
    if tokens.dim() == 1:
        raise RuntimeError(
            "mllama_kernels.patch_embed was called without with_tokens; it keeps nothing for a backward"
        )
    for_pixels, _, for_weight, *others = ctx.needs_input_grad[:11]
    wanted = [for_pixels or for_weight, *others]
    grad_patches, *rest = torch.ops.mllama_kernels.patch_embed_backward(
        grad_out, tokens, *operands, ctx.eps, wanted
    )
    grad_pixels = grad_weight = None
    if for_pixels:
        grad_pixels = _fold(grad_patches @ patch_weight.flatten(1), patch_weight, ctx.size)
    if for_weight:
        rows = _unfold(pixel_values, patch_weight.shape[-1])
        # This way round, with a copy of the small result, CPU libraries are faster.
        grad_weight = (rows.t() @ grad_patches.flatten(0, 2)).t().contiguous().view_as(patch_weight)
    grads = (g if w else None for g, w in zip(rest, others))
    return grad_pixels, None, grad_weight, *grads, None, None, None


def _unfold(pixels: Tensor, patch: int) -> Tensor:
    """Pixels (M, T, C, size, size) to the rows of the convolution's product, (M T patches, C patch^2)."""
    patches = pixels.unfold(3, patch, patch).unfold(4, patch, patch)
    return patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(0, 3)


def _fold(rows: Tensor, patch_weight: Tensor, size: int) -> Tensor:
    """The inverse, from (M, T, patches, C patch^2); zero where no patch lies."""
    _, channels, patch, _ = patch_weight.shape
    grid = size // patch
    patches = rows.unflatten(2, (grid, grid)).unflatten(4, (channels, patch, patch))
    pixels = patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    rest = size - grid * patch
    return F.pad(pixels, (0, rest, 0, rest))


_dispatch.register("patch_embed", _fake, setup_context=_setup_context, backward=_backward)
_dispatch.register_backward("patch_embed", _backward_fake)
