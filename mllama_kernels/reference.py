"""Every op in plain PyTorch: any floating dtype including float64, any device, differentiable.

Names and signatures are those of :mod:`mllama_kernels`, so a model runs on either module. The functions
round where `transformers` rounds; the kernels are tested against them in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mllama_kernels import reference_sampling, reference_tables
from mllama_kernels._arguments import IGNORED, PAD_TO, checked
from mllama_kernels.reference_projection import (
    add_rms_norm,
    gated_residual,
    linear,
    quantized_linear,
    quantized_rows,
    rms_norm,
    skinny_linear,
    statistics_dtype,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "cross_attention",
    "gated_residual",
    "linear",
    "linear_cross_entropy",
    "patch_embed",
    "quantized_linear",
    "quantized_rows",
    "rms_norm",
    "rotary_attention",
    "rotary_attention_cached",
    "sample",
    "skinny_linear",
    "swiglu",
    "vision_attention",
]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x (..., L, H, D) by cos, sin (..., L, D/2)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, softmax_scale: float | None
) -> Tensor:
    """Softmax attention of q (..., Lq, Hq, D) over k, v (..., Lk, Hkv, D).

    ``visible`` broadcasts to (..., Lq, Lk); a query that sees no key gives zeros.
    """
    group = q.shape[-2] // k.shape[-2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scores = (q @ k.transpose(-1, -2)) * scale
    if visible is not None:
        visible = visible.unsqueeze(-3)
        scores = scores.masked_fill(~visible, float("-inf"))
        # A row of -inf has no softmax: give it any finite scores, then drop its output.
        empty = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0)
        v = v.masked_fill(~visible.any(-2).unsqueeze(-1), 0)  # 0 * NaN would let hidden values out
    weights = scores.softmax(-1, dtype=statistics_dtype(q.dtype)).to(q.dtype)
    out = weights @ v
    if visible is not None:
        out = out.masked_fill(empty, 0)
    return out.transpose(-3, -2).contiguous()


def _causal(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys): the queries are the last rows of the keys' sequence."""
    position = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) <= position.unsqueeze(-1)


def _common_length(bounds: list[int], tokens: int) -> int | None:
    """The length of all packed sequences if they are equally long and no token is left over."""
    lengths = {end - begin for begin, end in zip(bounds[:-1], bounds[1:])}
    return lengths.pop() if len(lengths) == 1 and bounds[-1] == tokens else None


def _sequence_of_each_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) int64, which packed sequence a row is of: in an exported program, where no value is known, this
    takes the place of slices."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], row, right=True)


@checked
def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    softmax_scale: float | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Causal grouped-query attention with RoPE; see :func:`mllama_kernels.rotary_attention`."""
    q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    if cu_seqlens is None:
        return _attention(q, k, v, _causal(q.shape[1], k.shape[1], q.device), softmax_scale)
    if torch.compiler.is_exporting():
        sequence = _sequence_of_each_row(cu_seqlens, q.shape[0])
        together = sequence.unsqueeze(-1) == sequence
        visible = together & _causal(q.shape[0], q.shape[0], q.device)
        return _attention(q, k, v, visible, softmax_scale)
    bounds = reference_tables.bounds_of("rotary_attention", cu_seqlens, q.shape[0], max_seqlen)
    length = _common_length(bounds, q.shape[0])
    if length:  # all at once; training spends its time here
        q, k, v = (t.unflatten(0, (-1, length)) for t in (q, k, v))
        return _attention(q, k, v, _causal(length, length, q.device), softmax_scale).flatten(0, 1)
    rows = [
        _attention(
            q[begin:end],
            k[begin:end],
            v[begin:end],
            _causal(end - begin, end - begin, q.device),
            softmax_scale,
        )
        for begin, end in zip(bounds[:-1], bounds[1:])
    ]
    return torch.cat([*rows, torch.zeros_like(q[bounds[-1] :])])


@checked
def rotary_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    *,
    max_seqlen: int,
    softmax_scale: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Append to a paged cache and attend; see :func:`mllama_kernels.rotary_attention_cached`."""
    name = "rotary_attention_cached"
    bounds = reference_tables.bounds_of(name, cu_seqlens, q.shape[0], max_seqlen)
    reference_tables.check_written(name, k_cache=k_cache, v_cache=v_cache)
    past = reference_tables.lengths_in_cache(name, bounds, cache_lens, page_table, k_cache)
    q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    page_size = k_cache.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        if begin == end:
            continue
        total = past[b] + end - begin
        position = torch.arange(total, device=q.device)
        page, row = page_table[b, position // page_size].long(), position % page_size
        k_cache[page[past[b] :], :, row[past[b] :]] = k[begin:end]
        v_cache[page[past[b] :], :, row[past[b] :]] = v[begin:end]
        visible = _causal(end - begin, total, q.device)
        out[begin:end] = _attention(
            q[begin:end], k_cache[page, :, row], v_cache[page, :, row], visible, softmax_scale
        )
    return out


@checked
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_mask: Tensor | None = None,
    *,
    q_norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    softmax_scale: float | None = None,
    tile_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Grouped-query attention over image tiles; see :func:`mllama_kernels.cross_attention`."""
    if q_norm_weight is not None:
        q = rms_norm(q, q_norm_weight, eps)
    if tile_table is None:
        tokens = k.shape[2]
        visible = None if tile_mask is None else tile_mask.repeat_interleave(tokens, dim=-1)
        return _attention(q, k.flatten(1, 2), v.flatten(1, 2), visible, softmax_scale)
    assert cu_seqlens is not None
    if torch.compiler.is_exporting():
        sequence = _sequence_of_each_row(cu_seqlens, q.shape[0])
        sees = (tile_table >= 0)[sequence]  # (N, T)
        if tile_mask is not None:
            sees = sees & tile_mask
        slots = torch.arange(k.shape[0], device=k.device)
        visible = (sees.unsqueeze(-1) & (tile_table[sequence].unsqueeze(-1) == slots)).any(1)
        visible = visible.repeat_interleave(k.shape[1], dim=-1)
        return _attention(q, k.flatten(0, 1), v.flatten(0, 1), visible, softmax_scale)
    bounds = reference_tables.bounds_of("cross_attention", cu_seqlens, q.shape[0], max_seqlen)
    reference_tables.check_slots("cross_attention", tile_table, len(bounds) - 1, k.shape[0])
    if k.shape[0] == 0:  # no sequence has a tile
        return torch.zeros_like(q)
    tokens = k.shape[1]
    length = _common_length(bounds, q.shape[0])
    if length:
        mask = (tile_table >= 0).unsqueeze(1).expand(-1, length, -1)
        if tile_mask is not None:
            mask = mask & tile_mask.unflatten(0, (-1, length))
        slots = tile_table.clamp_min(0).long()
        k, v = (t[slots].flatten(1, 2) for t in (k, v))
        visible = mask.repeat_interleave(tokens, dim=-1)
        return _attention(q.unflatten(0, (-1, length)), k, v, visible, softmax_scale).flatten(0, 1)
    out = [torch.zeros_like(q[bounds[-1] :])]
    for b in reversed(range(len(bounds) - 1)):
        rows = slice(bounds[b], bounds[b + 1])
        present = tile_table[b] >= 0
        slots = tile_table[b].clamp_min(0).long()
        mask = present.expand(bounds[b + 1] - bounds[b], -1)
        if tile_mask is not None:
            mask = mask & tile_mask[rows]
        visible = mask.repeat_interleave(tokens, dim=-1)
        out.insert(
            0,
            _attention(
                q[rows], k[slots].flatten(0, 1), v[slots].flatten(0, 1), visible, softmax_scale
            ),
        )
    return torch.cat(out)


@checked
def vision_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Full attention with pad-to-pad pairs masked; see :func:`mllama_kernels.vision_attention`."""
    visible = None if padding is None else ~(padding.unsqueeze(-1) & padding.unsqueeze(-2))
    return _attention(q, k, v, visible, softmax_scale)


@checked
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
    """Pixels to the tokens that enter the vision encoder; see :func:`mllama_kernels.patch_embed`."""
    reference_tables.check_ids("patch_embed", aspect_ratio_ids, pre_tile_embedding.shape[0])
    images, tiles = pixel_values.shape[:2]
    width, patch = patch_weight.shape[0], patch_weight.shape[-1]
    x = F.conv2d(pixel_values.flatten(0, 1), patch_weight, stride=patch).flatten(2).transpose(1, 2)
    x = x.reshape(images, tiles, -1, width)
    ids = aspect_ratio_ids.long()
    x = x + pre_tile_embedding[ids].view(images, tiles, 1, width) * pre_tile_gate.tanh()
    x = torch.cat([class_embedding.expand(images, tiles, 1, width), x], dim=2)
    tokens = x.shape[2]
    gate = position_gate.tanh()
    x = x + (1 - gate) * position_embedding
    x = x + gate * tile_position_embedding[ids].view(images, tiles, tokens, width)
    x = F.layer_norm(x, (width,), norm_weight, norm_bias, eps)
    return F.pad(x, (0, 0, 0, -tokens % pad_to))


@checked
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    masked_token: int | None = None,
) -> Tensor:
    """Cross entropy of ``F.linear(x, weight)``; see :func:`mllama_kernels.linear_cross_entropy`."""
    logits = F.linear(x, weight).to(statistics_dtype(x.dtype)).reshape(-1, weight.shape[0])
    if masked_token is not None:
        labels = labels.masked_fill(labels == masked_token, ignore_index)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if z_loss == 0:
        loss = F.cross_entropy(logits, labels.flatten(), reduction=reduction, **options)
    else:
        is_target = labels.flatten() != ignore_index
        loss = F.cross_entropy(logits, labels.flatten(), reduction="none", **options)
        penalty = z_loss * logits.logsumexp(-1).square()
        loss = (loss + penalty).where(is_target, 0)
        if reduction != "none":
            loss = loss.sum() / (is_target.sum() if reduction == "mean" else 1)
    return loss.view(labels.shape) if reduction == "none" else loss


@checked
def sample(
    logits: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    counts: Tensor | None = None,
    bias_tokens: Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    num_likeliest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits to tokens; see :func:`mllama_kernels.sample`. Its tokens are the kernels'."""
    reference_sampling.refuse_gradient(logits, num_likeliest)
    options = reference_sampling.Options(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seen=seen,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        counts=counts,
        bias_tokens=bias_tokens,
        bias=bias,
        allowed=allowed,
        num_likeliest=num_likeliest,
    )
    scaled = options.scaled(logits.float())
    weights = reference_sampling.kept_weights(scaled, options.top_k, options.top_p, options.min_p)
    drawn = reference_sampling.draw(weights, reference_sampling.uniform(seeds, steps))
    tokens = drawn.where(options.temperature[:, 0] != 0, scaled.argmax(dim=-1))
    is_valid = scaled.amax(dim=-1).isfinite() & options.are_valid
    tokens = tokens.where(is_valid, reference_sampling.INVALID_TOKEN)
    return tokens, *reference_sampling.logprobs_of(logits.float(), tokens, num_likeliest)
