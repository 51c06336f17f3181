"""Ops as stateless layers, by the conventions of the `kernels` library of Hugging Face.

Such a layer has no constructor and no members: its forward is bound to a module that has the weights.
"""

from __future__ import annotations

from torch import Tensor, nn

import mllama_kernels as ops


class RMSNorm(nn.Module):
    """For modules with `weight` and `variance_epsilon`, as the norms of Llama in `transformers`."""

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    """``silu(gate) * up`` with both side by side in the last dimension."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)
