"""The output head and its loss, forward and backward, with a frozen head as in LoRA and a trained one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting, absent
from benchmarks.peers import compiled, from_package
from benchmarks.shapes import VOCAB, E, sample_rows
from mllama_kernels import reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CHECKED_CLASSES = 512  # rows of the weight's gradient that are compared


def make(setting: Setting, vocab: int, rows: int) -> Arguments:
    """x, weight and labels; logits with the spread of a language model's."""
    with torch.inference_mode(False):  # tensors that may have gradients
        labels = torch.randint(0, vocab, (rows,), device=setting.device)
        return setting.randn(rows, E), setting.randn(vocab, E, scale=2 * E**-0.5), labels


def step(loss: Loss, trained: bool, x: Tensor, weight: Tensor, labels: Tensor) -> Any:
    """The loss, the gradient by x and, of a trained head, by the weight."""
    with torch.inference_mode(False), torch.enable_grad():
        # The float64 copies of the exact result are inference tensors, what is timed is not.
        x, weight = (t.clone() if t.is_inference() else t.detach() for t in (x, weight))
        leaves = (x.requires_grad_(), weight.requires_grad_(trained))
        value = loss(*leaves, labels)
        wanted = leaves if trained else leaves[:1]
        return value.detach(), *torch.autograd.grad(value, wanted)


def select(output: Any) -> tuple[Tensor, ...]:
    value, grad_x, *grad_weight = output
    parts = (g[sample_rows(g.shape[0], CHECKED_CLASSES).to(g.device)] for g in grad_weight)
    return value, grad_x, *parts


def truth(trained: bool, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return select(step(reference.linear_cross_entropy, trained, x, weight, labels))


def torch_chunked(trained: bool) -> Impl:
    """PyTorch's own, from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        return absent("F.linear_cross_entropy", "came with torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return Impl(
        "F.linear_cross_entropy",
        partial(step, partial(F.linear_cross_entropy, options=options), trained),
    )


def liger(trained: bool, module: Any) -> Any:
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    return partial(step, lambda x, weight, labels: apply(x, weight, labels)[0], trained)


def cases(setting: Setting) -> Iterator[Case]:
    vocab = VOCAB if setting.on_gpu else VOCAB // 16
    for trained in (False, True):
        for rows in setting.sizes([1024, 4096], [512], [4096, 512]):
            run = partial(step, reference.linear_cross_entropy, trained)
            head = "trained" if trained else "frozen"
            yield Case(
                op="linear_cross_entropy",
                shape={"head": head, "rows": rows, "vocabulary": vocab, "width": E},
                dtype=setting.dtype,
                make=partial(make, setting, vocab, rows),
                truth=partial(truth, trained),
                select=select,
                impls=(
                    Impl(OURS, partial(step, ours.linear_cross_entropy, trained)),
                    Impl(PLAIN, run),
                    compiled_step(trained),
                    torch_chunked(trained),
                    from_package(
                        setting,
                        "liger-kernel",
                        "liger_kernel.ops.fused_linear_cross_entropy",
                        partial(liger, trained),
                    ),
                ),
                bytes=((1 + trained) * vocab + 2 * rows) * E * setting.element,
                flops=2 * (2 + trained) * rows * vocab * E,
            )


def compiled_step(trained: bool) -> Impl:
    loss = compiled(reference.linear_cross_entropy)
    return Impl(loss.name, partial(step, loss.call, trained))
