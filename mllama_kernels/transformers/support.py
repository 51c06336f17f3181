"""What the kernels take, and calls of them on the layouts of `transformers`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mllama_kernels as ops
from mllama_kernels._dispatch import has_ops
from mllama_kernels.skinny_linear import MAX_ROWS
from mllama_kernels.transformers.patch import is_plain
from mllama_kernels.transformers.rows import Sequences

NAME = "mllama_kernels"  # as an attn_implementation
# Implementations that attend to nothing but what attention_mask and positions say.
KNOWN_IMPLEMENTATIONS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", NAME}


def takes(*tensors: Tensor) -> bool:
    """Whether ops run on tensors like these: plain, of one supported dtype."""
    lead = tensors[0]
    if not has_ops(lead.device):
        return False
    dtypes = {torch.float32, torch.float16, torch.bfloat16}
    if lead.device.type == "cpu":
        dtypes.add(torch.float64)
    return lead.dtype in dtypes and all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == lead.dtype for t in tensors
    )


def takes_heads(head_dim: int, device: torch.device) -> bool:
    if not has_ops(device):
        return False
    return head_dim % 8 == 0 if device.type == "cpu" else head_dim in (64, 80, 128)


def drops_out(module: nn.Module) -> bool:
    """Whether an attention module drops weights in this call."""
    rate = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    return module.training and rate > 0


def has_many_rows(x: Tensor) -> bool:
    return x.dim() < 2 or x.shape[:-1].numel() > MAX_ROWS


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` of x (..., E); for the few rows of decoding, by the op that is made for them."""
    if (
        has_many_rows(x)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or type(linear) is not nn.Linear
        or linear.bias is not None
        or not (is_plain(linear) and takes(x, linear.weight))
    ):
        return linear(x)
    # No kernel of a forward writes weights, so their reading may begin before the one before it ends.
    y = ops.skinny_linear(x.flatten(0, -2), linear.weight, weight_is_constant=True)
    return y.unflatten(0, x.shape[:-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, L, H, D) by cos, sin (B or 1, L, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    sequences: Sequences,
    softmax_scale: float | None,
) -> Tensor:
    """RoPE and causal attention of q (B, L, Hq, D), k, v (B, L, Hkv, D) within the sequences."""
    if sequences.cu_seqlens is None:
        return ops.rotary_attention(q, k, v, cos, sin, softmax_scale=softmax_scale)
    batch, length = q.shape[:2]
    cos, sin = (t.expand(batch, -1, -1).flatten(0, 1) for t in (cos, sin))
    out = ops.rotary_attention(
        *(t.flatten(0, 1) for t in (q, k, v)),
        cos,
        sin,
        softmax_scale=softmax_scale,
        cu_seqlens=sequences.cu_seqlens.to(q.device),
        max_seqlen=sequences.max_seqlen,
    )
    return out.unflatten(0, (batch, length))


def full_attention(q: Tensor, keys: Tensor, values: Tensor, softmax_scale: float | None) -> Tensor:
    """Attention of q (B, Lq, Hq, D) to all of keys, values (B, Hkv, Lk, D), laid out as in a cache.

    They are one tile per sequence, read where they are.
    """
    k, v = (t.transpose(1, 2).unflatten(0, (-1, 1)) for t in (keys, values))
    return ops.cross_attention(q, k, v, softmax_scale=softmax_scale)
