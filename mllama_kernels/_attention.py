"""What the attentions share around their gradients: the log-sum-exp that the backward needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wants_lse(*tensors: Tensor | None) -> bool:
    """Whether a call on these arguments will be asked for gradients; of an exported program nobody knows."""
    if torch.compiler.is_exporting():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def scale_for(name: str, q: Tensor, softmax_scale: float | None) -> float:
    """The scale of a call, once q has heads to take it from.

    Raises: RuntimeError: otherwise.
    """
    if q.dim() < 3 or q.shape[-1] == 0:
        raise RuntimeError(
            f"mllama_kernels.{name}: q must be (N, H, D) or (B, L, H, D), got shape {tuple(q.shape)}"
        )
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def fake(q: Tensor, packed: bool, with_lse: bool) -> tuple[Tensor, Tensor]:
    """The output of a call and its log-sum-exp: (B, H, L), or (H, N) when packed."""
    heads, rows = q.shape[-2], q.shape[-3]
    shape = (heads, rows) if packed else (q.shape[0], heads, rows)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(shape if with_lse else (0,), dtype=dtype)


def save(ctx: Any, name: str, lse: Tensor, with_lse: bool, *tensors: Tensor | None) -> None:
    """Keeps what the backward reads; the log-sum-exp itself has no gradient."""
    if not with_lse:
        raise RuntimeError(f"mllama_kernels.{name}: a gradient needs with_lse=True")
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, lse)


def no_gradient(ctx: Any, name: str, **positions: int) -> None:
    """Refuses a gradient for the arguments at these positions."""
    for argument, position in positions.items():
        if ctx.needs_input_grad[position]:
            raise NotImplementedError(
                f"mllama_kernels.{name} has no gradient for {argument}; detach it, or use "
                f"mllama_kernels.reference.{name}"
            )
