"""Pixels to the tokens that enter the vision encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


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
    pad_to: int = 8,
) -> Tensor:
    """Patch convolution, tile and position embeddings, class token and LayerNorm.

    For image m, tile t, patch p > 0 (p = 0 is the class token, which takes no pre-tile embedding)::

        x = conv(pixels)[p] + tanh(pre_tile_gate) * pre_tile_embedding[id, t]
        x = x + (1 - tanh(g)) * position_embedding[p] + tanh(g) * tile_position_embedding[id, t, p]
        out = layer_norm(x) * norm_weight + norm_bias

    with id = aspect_ratio_ids[m], g = position_gate, P = (size / patch)^2 + 1, every step rounded to the
    dtype. Tokens from P up to a multiple of `pad_to` are zero.

    Args:
        pixel_values: (M, T, C, size, size), float32, float16 or bfloat16 (float64 on CPU).
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
        pad_to: tokens per tile are rounded up to a multiple of this.
    Returns:
        (M, T, P rounded up, E) in the dtype of pixel_values.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Dosovitskiy et al. 2020 (arXiv 2010.11929); gates and tiles as in Llama 3.2 Vision.
    """
    return torch.ops.mllama_kernels.patch_embed(
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
        eps,
        pad_to,
    )


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
) -> Tensor:
    images, tiles, _, size, _ = pixel_values.shape
    width, _, patch, _ = patch_weight.shape
    tokens = (size // patch) ** 2 + 1
    return pixel_values.new_empty(images, tiles, -(-tokens // pad_to) * pad_to, width)


_dispatch.register("patch_embed", _fake)
