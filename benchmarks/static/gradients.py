"""The backward kernels' cases of the static table."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.static.case import (
    HKV,
    HQ,
    INTERMEDIATE,
    PATCH,
    TILE_TOKENS,
    TILES,
    VISION_DIM,
    VISION_HEADS,
    VISION_WIDTH,
    VOCABULARY,
    Case,
    D,
    E,
    angles,
    rand,
    size,
)
from mllama_kernels._arguments import IGNORED

OPS = torch.ops.mllama_kernels
GRADIENT_ROWS = 128  # packed query rows, or keys, that a block of attention sums up gradients for


def elementwise(arch: int) -> Iterator[Case]:
    """The backward kernels of the elementwise ops and norms."""
    rows, blocks, teams = 4096, 128, 2
    weight, gate = rand(E), rand(1)
    x, total, grad, grad_total = (rand(rows, E) for _ in range(4))
    shape = f"{rows} x {E}"
    again = {
        "weight, per team of threads, from L2": (blocks * teams - 1) * size(weight),
        "partial rows of its gradient written and read, from L2": 2 * blocks * E * 4,
    }
    yield Case(
        "rms_norm_backward",
        shape,
        lambda: OPS.rms_norm_backward(grad, x, weight, 1e-5),
        floor=3 * size(x) + 2 * size(weight),
        again=again,
    )
    yield Case(
        "add_rms_norm_backward",
        shape,
        lambda: OPS.add_rms_norm_backward(grad, grad_total, total, weight, 1e-5, None, None, None),
        floor=4 * size(x) + 2 * size(weight),
        again=again,
    )
    yield Case(
        "add_rms_norm_backward",
        f"{shape}, gate",
        lambda: OPS.add_rms_norm_backward(grad, grad_total, total, weight, 1e-5, x, gate, None),
        floor=6 * size(x) + 2 * size(weight, gate),
        again=again,
    )
    heads, head_grad, head_weight = rand(2048, HQ, D), rand(2048, HQ, D), rand(D)
    blocks, teams = 256, 32
    yield Case(
        "rms_norm_backward",
        f"2048 x {HQ} x {D}",
        lambda: OPS.rms_norm_backward(head_grad, heads, head_weight, 1e-5),
        floor=3 * size(heads) + 2 * size(head_weight),
        again={
            "weight, per team of threads, from L2": (blocks * teams - 1) * size(head_weight),
            "partial rows of its gradient written and read, from L2": 2 * blocks * D * 4,
        },
    )
    yield Case(
        "gated_residual_backward",
        shape,
        lambda: OPS.gated_residual_backward(grad, x, gate, None),
        floor=3 * size(x) + 2 * size(gate),
    )
    gate_up, grad_out = rand(1024, 2 * INTERMEDIATE), rand(1024, INTERMEDIATE)
    yield Case(
        "swiglu_backward",
        f"1024 x {INTERMEDIATE}",
        lambda: OPS.swiglu_backward(grad_out, gate_up),
        floor=2 * size(gate_up) + size(grad_out),
    )


def cross_entropy(arch: int) -> Iterator[Case]:
    """The cross entropy of the head; the products around it are the library's."""
    rows, width = 16, 8
    x, weight = rand(rows, width), rand(VOCABULARY, width)
    labels = torch.randint(0, VOCABULARY, (rows,))
    logits = rows * VOCABULARY * 2
    shared = {80: 163, 90: 227}[arch] * 1024 - 640
    yield Case(
        "linear_cross_entropy",
        f"loss and gradient, {rows}* x {VOCABULARY}",
        lambda: OPS.linear_cross_entropy(
            x, weight, labels, IGNORED, IGNORED, 0.0, 0.0, True, False, logits
        ),
        floor=2 * logits,
        again={"what of a row shared memory does not hold, from L2": logits - rows * shared},
    )
    sums = torch.ones(2, rows)
    yield Case(
        "linear_cross_entropy_backward",
        f"{rows}* x {VOCABULARY}",
        lambda: OPS.linear_cross_entropy_backward(
            sums[0], x, weight, labels, sums, IGNORED, IGNORED, 0.0, 0.0, logits
        ),
        floor=2 * logits,
    )


def vision(arch: int) -> Iterator[Case]:
    tokens = 1608
    q, k, v = (rand(1, tokens, VISION_HEADS, VISION_DIM) for _ in range(3))
    padding = torch.arange(tokens)[None] >= TILE_TOKENS
    out, lse = OPS.vision_attention(q, k, v, padding, VISION_DIM**-0.5, True)
    grad = rand(*out.shape)
    blocks = -(-tokens // GRADIENT_ROWS)
    yield Case(
        "vision_attention_backward",
        f"{tokens} tokens*",
        lambda: OPS.vision_attention_backward(grad, q, k, v, out, lse, padding, VISION_DIM**-0.5),
        floor=8 * size(q) + size(lse),
        again={
            "queries and their gradients by every block of keys, from L2": (blocks - 1) * size(q)
            + blocks * size(grad),
            "keys and values by every block of rows, from L2": blocks * size(k, v),
            "queries and their gradients once more by their own blocks": size(q, grad),
            "statistics of rows, written, then by every block": (2 + blocks) * 2 * size(lse),
        },
        flops=14 * tokens * tokens * VISION_HEADS * VISION_DIM,
    )


def self_attention(arch: int) -> Iterator[Case]:
    length, columns, group = 1024, 64, HQ // HKV
    q = rand(1, length, HQ, D)
    k, v = (rand(1, length, HKV, D) for _ in range(2))
    cos, sin = (t[None] for t in angles(length))
    out, lse = OPS.rotary_attention(q, k, v, cos, sin, D**-0.5, False, None, length, True)
    grad = rand(*out.shape)
    key_blocks = length // GRADIENT_ROWS
    seen = (
        GRADIENT_ROWS * key_blocks * (key_blocks + 1) // 2
    )  # query tokens by a head's blocks of keys
    tokens = GRADIENT_ROWS // group
    keys = sum(-(-last // columns) * columns for last in range(tokens, length + 1, tokens))
    row = HKV * D * 2
    yield Case(
        "rotary_attention_backward",
        f"{length}*",
        lambda: OPS.rotary_attention_backward(
            grad, q, k, v, cos, sin, out, lse, D**-0.5, False, None, length
        ),
        floor=2 * size(q, k, v) + size(out, grad, lse, cos, sin),
        again={
            "rotated queries and keys written, then read by their own blocks": 2 * size(q, k),
            "gradients of the output by the blocks of their rows": size(grad),
            "queries and gradients by every block of keys they see, from L2": 2 * seen * HQ * D * 2,
            "keys and values by every block of rows that sees them, from L2": 2 * keys * row,
            "statistics of rows, written, then by every block": (2 * length + seen) * HQ * 8,
            "cos and sin per head, forth and back, from L1": (2 * (HQ + HKV) - 1) * size(cos, sin),
        },
        flops=7 * length * length * HQ * D,
    )


def cross_attention(arch: int) -> Iterator[Case]:
    rows = 128
    q = rand(1, rows, HQ, D)
    k, v = (rand(1, TILES, TILE_TOKENS, HKV, D) for _ in range(2))
    weight = rand(D)
    options = (1e-5, D**-0.5, None, None, rows)
    out, lse = OPS.cross_attention(q, k, v, None, weight, *options, True)
    grad = rand(*out.shape)
    key_blocks = TILES * -(-TILE_TOKENS // GRADIENT_ROWS)
    row_blocks = rows * HQ // HKV // GRADIENT_ROWS
    yield Case(
        "cross_attention_backward",
        f"{rows} rows*, {TILES * TILE_TOKENS} keys",
        lambda: OPS.cross_attention_backward(grad, q, k, v, out, lse, None, weight, *options),
        floor=2 * size(q, k, v, weight) + size(out, grad, lse),
        again={
            "normalised queries written, then with the gradients by every block of keys, from L2": (
                size(q) + key_blocks * size(q, grad)
            ),
            "keys and values by every block of rows, from L2": row_blocks * size(k, v),
            "queries as given, normalised, and gradients by the blocks of their rows": size(
                q, q, grad
            ),
            "statistics of rows, written, then by every block": (2 + key_blocks) * 2 * size(lse),
        },
        flops=14 * rows * TILES * TILE_TOKENS * HQ * D,
    )


def patch_embed(arch: int) -> Iterator[Case]:
    ratios, side = 9, 280
    positions = (side // PATCH) ** 2 + 1
    grad = rand(1, TILES, -(-positions // 8) * 8, VISION_WIDTH)
    tokens = rand(1, TILES, positions, VISION_WIDTH)
    table, tile_table = (
        rand(positions, VISION_WIDTH),
        rand(ratios, TILES * positions * VISION_WIDTH),
    )
    pre_tile, weight, gate = rand(ratios, TILES * VISION_WIDTH), rand(VISION_WIDTH), rand(1)
    ids = torch.tensor([6])
    chosen = size(tile_table) // ratios
    yield Case(
        "patch_embed_backward",
        f"4 tiles* of {side}",
        lambda: OPS.patch_embed_backward(
            grad, tokens, ids, table, gate, tile_table, pre_tile, gate, weight, 1e-5, [True] * 9
        ),
        floor=2 * size(tokens) + size(tokens, table, tile_table, pre_tile) + chosen + size(table),
        again={
            "norm's weight per token, from L1": size(tokens) - size(weight),
            "pre-tile embedding per patch, from L1": size(tokens) - size(pre_tile) // ratios,
            "gradients of patches, from L2": size(tokens),
            "partial sums of the norm's gradients written and read, from L2": (
                4 * VISION_WIDTH * 4 * -(-positions // 4)
            ),
        },
    )


SOURCES = (elementwise, self_attention, cross_attention, vision, patch_embed, cross_entropy)
