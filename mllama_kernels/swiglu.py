"""SwiGLU on the fused gate/up projection."""

from __future__ import annotations

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
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Shazeer 2020 (arXiv 2002.05202).
    """
    return torch.ops.mllama_kernels.swiglu(gate_up)


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_dispatch.register("swiglu", _fake)
