"""What the kernels take, and calls of them on the layouts of `transformers`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mllama_kernels as ops
from mllama_kernels._arguments import FLOATS, FLOATS_AND_DOUBLE
from mllama_kernels._dispatch import has_ops
from mllama_kernels.linear import linear_by
from mllama_kernels.plain import is_plain
from mllama_kernels.transformers.rows import Sequences
from mllama_kernels.transformers.wrappers import class_of

NAME = "mllama_kernels"  # as an attn_implementation
# Implementations that attend to nothing but what attention_mask and positions say.
KNOWN_IMPLEMENTATIONS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", NAME}


def takes(*tensors: Tensor) -> bool:
    """Whether ops run on tensors like these: plain, of one supported dtype."""
    lead = tensors[0]
    dtype = lead.dtype
    if dtype not in (FLOATS_AND_DOUBLE if lead.is_cpu else FLOATS):
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype != dtype:
            return False
    return has_ops(lead.device)


def takes_heads(head_dim: int, device: torch.device) -> bool:
    if not has_ops(device):
        return False
    return head_dim % 8 == 0 if device.type == "cpu" else head_dim in (64, 80, 128)


def drops_out(module: nn.Module) -> bool:
    """Whether an attention module drops weights in this call."""
    rate = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    return module.training and rate > 0


def attends_as_written(attention: nn.Module) -> bool:
    """Whether the functions that an attention of `transformers` calls are those written there: the one of
    its implementation, which its configuration names, and the rotation. A graph cannot ask."""
    if torch.compiler.is_compiling():
        return True
    modeling = vars(sys.modules[class_of(attention).__module__])
    eager = modeling["eager_attention_forward"]
    attends = modeling["ALL_ATTENTION_FUNCTIONS"].get(attention.config._attn_implementation, eager)
    return all(map(_is_written, (attends, modeling.get("apply_rotary_pos_emb", eager))))


_ROOTS = tuple(os.path.dirname(package.__file__) + os.sep for package in (transformers, ops))


def _is_written(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(_ROOTS)


def is_plain_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether ``module(x)`` is :func:`mllama_kernels.linear` of x and the module's parameters."""
    return is_plain(module, nn.Linear) and takes(x, module.weight)


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a call only reads rows of the weight, whose gradient is that of the rows that were read."""
    return (
        is_plain(module, nn.Embedding)
        and module.max_norm is None
        and module.padding_idx is None
        and not (module.sparse or module.scale_grad_by_freq)
    )


def is_plain_patching(module: nn.Module, side: int) -> bool:
    """Whether a convolution is the product of each image patch of ``side`` x ``side`` pixels and a weight."""
    return (
        is_plain(module, nn.Conv2d)
        and module.bias is None
        and module.kernel_size == module.stride == (side, side)
        and module.padding in ("valid", (0, 0))
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def is_plain_layer_norm(module: nn.Module) -> bool:
    """Whether a call normalises the last dimension, and scales and shifts what comes of it."""
    return (
        is_plain(module, nn.LayerNorm)
        and len(module.normalized_shape) == 1
        and module.bias is not None  # so there is a weight, too
    )


def project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` of x (..., E)."""
    if not is_plain_linear(module, x):
        return module(x)
    # No kernel of a forward writes weights, so their reading may begin before the one before it ends.
    return linear_by(ops, x, module.weight, module.bias, weight_is_constant=True)


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
