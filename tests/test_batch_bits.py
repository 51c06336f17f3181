"""The bits of a row, sequence or image and of its gradient do not depend on what else is in the batch.

Where the library multiplies, it chooses the order of its sums by the number of rows: `linear_cross_entropy`,
and the gradients of `patch_embed` for the pixels and of `quantized_linear`, promise nothing."""

from __future__ import annotations

import pytest
import torch
from numerics import FLOATS
from op_calls import arguments_of

import mllama_kernels
from mllama_kernels import _library

BATCH = 7
# The arguments whose first dimension is the batch.
ROWS = {
    "rms_norm": ("x",),
    "add_rms_norm": ("x", "residual", "row_mask"),
    "gated_residual": ("x", "residual", "row_mask"),
    "swiglu": ("gate_up",),
    "skinny_linear": ("x", "residual", "row_mask"),
    "quantized_linear": ("x", "residual", "row_mask"),
    "quantized_rows": ("ids",),
    "rotary_attention": ("q", "k", "v", "cos", "sin"),
    "rotary_attention_cached": ("q", "k", "v", "cos", "sin", "page_table", "cache_lens"),
    "cross_attention": ("q", "k", "v", "tile_mask"),
    "vision_attention": ("q", "k", "v", "padding"),
    "patch_embed": ("pixel_values", "aspect_ratio_ids"),
    "sample": (
        *("logits", "seeds", "steps", "temperature", "top_k", "top_p", "min_p"),
        *("repetition_penalty", "seen", "presence_penalty", "frequency_penalty", "counts"),
        *("bias_tokens", "bias", "allowed", "num_likeliest"),
    ),
}
NO_GRADIENT = (
    *("skinny_linear", "quantized_linear", "quantized_rows"),
    *("rotary_attention_cached", "sample"),
)
NOT_DIFFERENTIATED = ("cos", "sin")


def call_of(name, dtype, device):
    """A call of BATCH rows, whose values differ."""
    call = arguments_of(name)
    if name == "rotary_attention":
        for key in ("q", "k", "v", "cos", "sin"):
            call[key] = torch.randn(BATCH, *call[key].shape)
        call["cu_seqlens"] = call["max_seqlen"] = None
    elif name == "rotary_attention_cached":
        pages = torch.randperm(2 * BATCH, dtype=torch.int32).view(BATCH, 2)
        caches = {key: torch.randn(2 * BATCH, 2, 16, 64) for key in ("k_cache", "v_cache")}
        call |= {**caches, "page_table": pages, "max_seqlen": 1}
        call["cache_lens"] = torch.randint(0, 30, (BATCH,), dtype=torch.int32)
    elif name == "cross_attention":
        call |= {"q": torch.randn(BATCH, 5, 4, 64), "tile_mask": torch.rand(BATCH, 5, 3) < 0.7}
        call |= {key: torch.randn(BATCH, 3, 9, 2, 64) for key in ("k", "v")}
        call |= dict.fromkeys(("tile_table", "cu_seqlens", "max_seqlen"))
    else:
        for key in ROWS[name]:
            value = call[key]
            moves = value.dim() > 1 and key != "bias_tokens"  # which rise in a row
            again = [value.roll(shift, -1) if moves else value for shift in range(BATCH)]
            call[key] = torch.cat(again)[:BATCH].contiguous()
    for key, value in call.items():
        if torch.is_tensor(value):
            is_data = value.is_floating_point() and (name != "sample" or key == "logits")
            call[key] = value.to(device, dtype if is_data else value.dtype)
        elif key == "weight":
            call[key] = value.to(device)
    return call


def part_of(name, call, rows):
    part = {key: value[rows] if key in ROWS[name] else value for key, value in call.items()}
    if name == "rotary_attention_cached":
        part |= {key: call[key].clone() for key in ("k_cache", "v_cache")}
        part["cu_seqlens"] = torch.arange(len(rows) + 1, dtype=torch.int32, device=call["q"].device)
    return part


def results(name, call):
    out = getattr(mllama_kernels, name)(**call)
    return out if isinstance(out, tuple) else (out,)


PARTS = ([3], [0, 1], [6, 2, 3], list(range(BATCH)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ROWS)
def test_bits_do_not_depend_on_the_batch(name, dtype, device):
    call = call_of(name, dtype, device)
    whole = results(name, part_of(name, call, list(range(BATCH))))
    for rows in PARTS:
        for all_of_it, some in zip(whole, results(name, part_of(name, call, rows)), strict=True):
            assert some.equal(all_of_it[rows])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in ROWS if name not in NO_GRADIENT])
def test_bits_of_gradients_do_not_depend_on_the_batch(name, dtype, device):
    call = call_of(name, dtype, device)
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in results(name, call)]
    whole = gradients(name, call, grads)
    assert whole or name == "patch_embed"
    for rows in PARTS:
        some = gradients(name, part_of(name, call, rows), [grad[rows] for grad in grads])
        for key, grad in some.items():
            assert grad.equal(whole[key][rows]), key


def gradients(name, call, grads):
    """By the arguments that belong to a row; those of weights are sums over the batch."""
    leaves = {
        key: call[key].detach().clone().requires_grad_()
        for key in ROWS[name]
        if call[key].is_floating_point()
        and key not in NOT_DIFFERENTIATED
        and (name, key) != ("patch_embed", "pixel_values")
    }
    if leaves:
        torch.autograd.backward(results(name, {**call, **leaves}), grads)
    return {key: leaf.grad for key, leaf in leaves.items()}


def test_every_op_promises_it_or_says_that_it_does_not():
    assert set(_library.OPS) - set(ROWS) == {"linear_cross_entropy"}
    for name in ("linear_cross_entropy", "patch_embed", "quantized_linear"):
        text = " ".join(getattr(mllama_kernels, name).__doc__.split())
        assert "depend on what else is in the batch" in text
