"""The output head and its cross entropy, without the logits ever being there at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import _dispatch
from mllama_kernels._arguments import IGNORED

# Of the logits, in the dtype of x: enough for the matrix products to run at full speed.
CHUNK_BYTES = 256 << 20


@_dispatch.public
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
    """``F.cross_entropy(F.linear(x, weight).float(), labels)`` a chunk of logits at a time.

    For logits l = weight x, rounded to the dtype, of a row with label y and V classes::

        lse  = log(sum_v exp(l_v))
        loss = lse - (1 - label_smoothing) * l_y - label_smoothing / V * sum_v l_v + z_loss * lse**2

    The largest buffer has 256 MB, whatever the number of rows. With gradients the forward turns each
    chunk of rows into the gradient of its logits and multiplies that with the weight; the backward
    only scales, without a host sync, unless the weight needs a gradient too. If one chunk holds all
    rows, it is kept for that. Otherwise the backward makes the logits once more, a chunk of classes at a
    time, so that every element of both gradients comes from one matrix product and is never summed up
    in 16 bits.

    The products are the library's, which sums in an order of its choice for the number of rows: the bits
    of a row's loss and gradient may depend on what else is in the batch.

    Args:
        x: (..., E), float32, float16 or bfloat16 (float64 on CPU).
        weight: (V, E), dtype of x.
        labels: (...) int64, 0 to V - 1 or ignored.
        ignore_index: label of a row without a loss.
        label_smoothing: from 0 to 1, the share of the target that all classes have in common.
        z_loss: factor on lse**2, which keeps the logits' scale in place; 1e-4 in PaLM.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        masked_token: another label of rows without a loss, such as an image token that is no class.
    Returns:
        float32 (float64 for float64): (), or with "none" the shape of labels, 0 where ignored. "mean"
        of nothing is NaN with gradients 0, as in PyTorch.
    Backward:
        saves the gradient by x before its scaling; for a weight that needs a gradient also x and the
        gradient of the logits, if that is one chunk, or else weight, labels, and of each row the largest
        logit and the sum of exponentials.
    Raises:
        RuntimeError: naming what was given and what is expected; for a label that is no class on CPU.
            On CUDA, where looking would mean to wait, such a row's loss and gradient are NaN.
        ValueError: for another reduction.
    Source:
        Chunks and the gradient in the forward: Hsu et al. 2024 (Liger, arXiv 2410.10989); label
        smoothing: Szegedy et al. 2015 (arXiv 1512.00567); z-loss: Chowdhery et al. 2022
        (arXiv 2204.02311) sec. 5.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r:.80}')
    if x.dim() == 0:
        raise RuntimeError(
            "mllama_kernels.linear_cross_entropy: x must have at least one dimension"
        )
    if labels.shape != x.shape[:-1]:
        raise RuntimeError(
            "mllama_kernels.linear_cross_entropy: labels must have shape "
            f"{tuple(x.shape[:-1])}, got {tuple(labels.shape)}"
        )
    masked_token = ignore_index if masked_token is None else masked_token
    logits_bytes = labels.numel() * _padded(weight.shape[:1].numel()) * x.dtype.itemsize
    loss, *_ = torch.ops.mllama_kernels.linear_cross_entropy(
        x.reshape(labels.numel(), x.shape[-1]),
        weight,
        labels.reshape(-1),
        ignore_index,
        masked_token,
        label_smoothing,
        z_loss,
        torch.is_grad_enabled() and x.requires_grad,
        torch.is_grad_enabled() and weight.requires_grad and bool(logits_bytes <= CHUNK_BYTES),
        CHUNK_BYTES,
    )
    loss = loss.view(labels.shape)
    if reduction == "none":
        return loss
    is_target = (labels != ignore_index) & (labels != masked_token)
    total = loss.where(is_target, 0).sum()  # without targets 0 / 0, but no infinite gradient
    return total / is_target.sum() if reduction == "mean" else total


def _padded(vocab: int) -> int:
    """Elements from one row of logits to the next: rows start on 16 bytes in every dtype."""
    return -(-vocab // 8) * 8


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    masked_token: int,
    label_smoothing: float,
    z_loss: float,
    with_grad_x: bool,
    with_grad_logits: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    vocab = weight.shape[0]
    loss, sums = (x.new_empty(*s, rows, dtype=_statistics_dtype(x)) for s in ((), (2,)))
    grad_x = x.new_empty(rows if with_grad_x else 0, width)
    if not with_grad_logits:
        return loss, sums, grad_x, x.new_empty(0, vocab)
    return loss, sums, grad_x, x.new_empty(rows, _padded(vocab))[:, :vocab]


def _backward_fake(
    grad_loss: Tensor, x: Tensor, weight: Tensor, *_: Tensor | float | int
) -> Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, labels, *options, with_grad_x, with_grad_logits, chunk_bytes = inputs
    _, sums, grad_x, grad_logits = output
    ctx.options = (*options, chunk_bytes)
    ctx.set_materialize_grads(False)
    for_weight: tuple[Tensor, ...] = ()
    if ctx.needs_input_grad[1]:
        for_weight = (x, grad_logits) if with_grad_logits else (x, weight, labels, sums)
    ctx.save_for_backward(grad_x if with_grad_x else None, *for_weight)


def _backward(
    ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    if any(grad is not None for grad in grads):
        _dispatch.no_double_backward("linear_cross_entropy")
    unscaled, *for_weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if grad_loss is not None:
        if ctx.needs_input_grad[0]:
            if unscaled is None:
                raise RuntimeError("linear_cross_entropy: with_grad_x was False in the forward")
            grad_x = (unscaled * grad_loss.unsqueeze(-1)).to(unscaled.dtype)
        if len(for_weight) == 2:
            x, grad_logits = for_weight
            grad_weight = grad_logits.t() @ (x * grad_loss.unsqueeze(-1)).to(x.dtype)
        elif for_weight:
            grad_weight = torch.ops.mllama_kernels.linear_cross_entropy_backward(
                grad_loss, *for_weight, *ctx.options
            )
    return grad_x, grad_weight, *(None,) * 8


_dispatch.register("linear_cross_entropy", _fake, setup_context=_setup_context, backward=_backward)
_dispatch.register_backward("linear_cross_entropy", _backward_fake)
