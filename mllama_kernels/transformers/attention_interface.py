"""``attn_implementation="mllama_kernels"``: the attention kernels in any model of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

import mllama_kernels as ops
from mllama_kernels.transformers.rows import (
    Sequences,
    sequences_from_padding,
    sequences_from_positions,
)
from mllama_kernels.transformers.support import (
    NAME,
    causal_attention,
    full_attention,
    takes,
    takes_heads,
)


def register() -> None:
    """Make the name known to `transformers`; importing the package does it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | Sequences | None:
    """The mask of a call, for :func:`attention_forward`.

    Returns: None for plain causal attention, :class:`Sequences` for packed sequences and for padding
        before and after the tokens of a first call, and otherwise what sdpa gets: a (B, 1, Lq, Lk) bool
        mask.
    """
    # Release 4 gives the positions of the queries, release 5 their number.
    positions = options.get("cache_position")
    queries = options["q_length"] if positions is None else positions.shape[0]
    if queries == options["kv_length"] and not torch.compiler.is_compiling():
        packing = _packing(mask_function)
        sequences = None
        if packing is not None and attention_mask is None:
            sequences = sequences_from_positions(packing, step=0)
        elif mask_function is causal_mask_function and attention_mask is not None:
            if allow_is_causal_skip and attention_mask.shape[1] == queries:
                sequences = sequences_from_padding(attention_mask)
        if sequences is not None:
            return None if sequences.cu_seqlens is None else sequences
    return sdpa_mask(
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )


def _packing(mask_function: Callable[..., Any]) -> Tensor | None:
    """The number of the sequence of each token, (B, L), if that and causality are all that a mask
    function asks for. `transformers` keeps it in closures; any other function gives None."""
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) != 2 or parts[0] is not causal_mask_function:
        return None
    return _closure(parts[1]).get("packed_sequence_mask")


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells)}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Sequences | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` asks its implementations for it; q and k are rotated already.

    Kernels run causal attention with and without padding, packed sequences with bounds (cu_seq_lens_q),
    unmasked attention, and decoding over a cache. Any other mask, dropout, and what the kernels do not
    support, is left to sdpa.

    Args:
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D).
        attention_mask: from :func:`attention_mask`, or a mask that sdpa takes.
    Returns: (B, Lq, Hq, D), and no attention weights.
    Raises:
        NotImplementedError: for attention sinks and capped scores, which sdpa would ignore.
    """
    for option in ("s_aux", "softcap"):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f'attn_implementation="{NAME}" does not support {option}')
    batch, _, queries, head_dim = query.shape
    keys = key.shape[2]
    causal = is_causal
    if causal is None:  # as in sdpa, except for cross-attention, which is never causal
        crosses = "CrossAttention" in type(module).__name__
        causal = getattr(module, "is_causal", not crosses)
    sequences = _packed(query, key, kwargs) if causal else None
    if torch.is_tensor(attention_mask):
        sequences = None
    elif attention_mask is not None:
        sequences = attention_mask
    elif sequences is None and causal and 1 < queries <= keys:
        # What lies after the last query in a static cache is not written yet.
        sequences = Sequences(None, queries)
    plain = (
        (dropout == 0 or not module.training)
        and kwargs.get("position_bias") is None
        and not kwargs.get("output_attentions")
        and takes(query, key, value)
        and key.shape[-1] == value.shape[-1] == head_dim
        and takes_heads(head_dim, query.device)
    )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if plain and sequences is not None:
        unrotated = query.new_ones(1, queries, head_dim // 2)
        angles = (unrotated, torch.zeros_like(unrotated))
        k, v = k[:, :queries], v[:, :queries]
        return causal_attention(q, k, v, *angles, sequences, scaling), None
    if plain and attention_mask is None:
        if queries == keys and query.shape[1] == key.shape[1]:
            return ops.vision_attention(q, k, v, softmax_scale=scaling), None
        return full_attention(q, key, value, scaling), None
    if isinstance(attention_mask, Sequences):
        attention_mask = attention_mask.mask(batch)
    kwargs.pop("cu_seq_lens_q", None)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal if causal else False,
        **kwargs,
    )


def _packed(query: Tensor, key: Tensor, options: dict[str, Any]) -> Sequences | None:
    """The bounds that a collator of packed sequences passes along, in the words of flash attention."""
    bounds = options.get("cu_seq_lens_q")
    if bounds is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        return None
    if options.get("sliding_window") is not None:
        return None
    return Sequences(bounds.int(), query.shape[2])
