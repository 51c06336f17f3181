"""SwiGLU on the fused gate/up projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _dispatch


@_dispatch.public
def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` with gate and up side by side in the last dimension.

    silu in float32 and rounded to the dtype, then the product rounded.

    Args:
        gate_up: (..., 2 I), gate first; float32, float16 or bfloat16 (float64 on CPU).
    Returns:
        (..., I) in gate_up's dtype, contiguous.
    Backward:
        saves gate_up.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Shazeer 2020 (arXiv 2002.05202).
    """
    return torch.ops.mllama_kernels.swiglu(gate_up)


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward_fake(grad_out: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return torch.ops.mllama_kernels.swiglu_backward(grad_out, *ctx.saved_tensors)


_dispatch.register("swiglu", _fake, setup_context=_setup_context, backward=_backward, lowers=False)
_dispatch.register_backward("swiglu", _backward_fake)
