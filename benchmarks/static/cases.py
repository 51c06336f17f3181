"""The cases of the static table: shapes of the 11B checkpoint, each with what it must move.

A case names the bytes that have to cross the memory bus (`floor`: every input once, every output
once) and the bytes its design moves again, served by L1 or L2 (`again`: reason and bytes). What the
simulator counts beyond 1.1 times their sum fails. Likewise every conflict of shared memory needs a
reason. Shapes marked * are cut down, for the simulator's sake; the kernels and their tiles are
those of the full shape.

To add a case, yield it from one of the functions below or of gradients.py and quantized.py, or from
a new one listed in SOURCES.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import mllama_kernels as ours
from benchmarks.static import gradients, quantized
from benchmarks.static.case import (
    HKV,
    HQ,
    INTERMEDIATE,
    NEXT_KERNEL_AT_START,
    PATCH,
    TILE,
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
from benchmarks.static.compiler import MULTIPROCESSORS


def elementwise(arch: int) -> Iterator[Case]:
    weight, gate = rand(E), rand(1)
    rows = 4096
    x, residual = rand(rows, E), rand(rows, E)
    per_row = {"weight, per row, from L1": (rows - 1) * size(weight)}
    shape = f"{rows} x {E}"
    yield Case(
        "rms_norm",
        shape,
        lambda: ours.rms_norm(x, weight),
        floor=2 * size(x) + size(weight),
        again=per_row,
    )
    yield Case(
        "add_rms_norm",
        shape,
        lambda: ours.add_rms_norm(x, residual, weight),
        floor=4 * size(x) + size(weight),
        again=per_row,
    )
    yield Case(
        "gated_residual",
        shape,
        lambda: ours.gated_residual(x, residual, gate),
        floor=3 * size(x) + size(gate),
    )
    heads, head_weight = rand(2048, HQ, D), rand(D)
    yield Case(
        "rms_norm",
        f"2048 x {HQ} x {D}",
        lambda: ours.rms_norm(heads, head_weight),
        floor=2 * size(heads) + size(head_weight),
        again={"weight, per two rows, from L1": (2048 * HQ // 2 - 1) * size(head_weight)},
    )
    gate_up = rand(1024, 2 * INTERMEDIATE)
    yield Case(
        "swiglu",
        f"1024 x {INTERMEDIATE}",
        lambda: ours.swiglu(gate_up),
        floor=size(gate_up) * 3 // 2,
    )


def self_attention(arch: int) -> Iterator[Case]:
    length, block = 1024, 32  # tokens in 128 rows of packed query heads
    q = rand(1, length, HQ, D)
    k, v = rand(1, length, HKV, D), rand(1, length, HKV, D)
    cos, sin = angles(length)
    blocks = length // block
    keys = block * blocks * (blocks + 1) // 2  # that the blocks of one head see
    yield Case(
        "rotary_attention",
        f"prefill {length}*",
        lambda: ours.rotary_attention(q, k, v, cos[None], sin[None]),
        floor=2 * size(q) + size(k, v, cos, sin),
        again={
            "rotated keys written, then keys and values by every block of rows, from L2": size(k)
            + keys * HKV * D * 2 * 2
            - size(v),
            "cos and sin per key head and query group, 4 heads at a time, from L1": size(cos, sin)
            * (HKV // 4 + HQ // 4 - 1),
        },
        flops=2 * length * length * HQ * D,
    )
    for batch, context in ((1, 1024), (1, 8192), (8, 2048)):
        yield decode_case(arch, batch, context)


def decode_case(arch: int, batch: int, context: int) -> Case:
    page = 64
    pages = context // page
    q, k, v = rand(batch, HQ, D), rand(batch, HKV, D), rand(batch, HKV, D)
    k_cache, v_cache = (rand(batch * pages, HKV, page, D) for _ in range(2))
    table = torch.randperm(batch * pages).int().view(batch, pages)
    bounds = torch.arange(batch + 1).int()
    lens = torch.full((batch,), context - 1).int()
    cos, sin = (t[-1:].expand(batch, -1).contiguous() for t in angles(context))
    split = 256 if context <= 4096 else 512
    return Case(
        "rotary_attention_cached",
        f"decode, batch {batch}, {context} keys",
        lambda: ours.rotary_attention_cached(
            q, k, v, cos, sin, k_cache, v_cache, table, bounds, lens, max_seqlen=1
        ),
        floor=size(k_cache, v_cache, k, v) + 2 * size(q),
        again=partials(arch, batch, context // split),
        conflicts=("rotating the query, once per block", 0.01) if arch == 80 else (PUSHED, 0.22),
        flops=4 * batch * context * HQ * D,
    )


# The blocks of a cluster store results into each other's shared memory.
PUSHED = "once per block, results stored into several other blocks, counted as if into one"


def partials(arch: int, batch: int, splits: int) -> dict[str, int]:
    """What split decoding writes and reads again; on sm_90a it is one kernel, which keeps it."""
    if arch == 90:
        return {}
    return {"partial results written and read, from L2": 2 * batch * HQ * splits * (D + 2) * 4}


def cross_attention(arch: int) -> Iterator[Case]:
    k, v = (rand(1, TILES, TILE_TOKENS, HKV, D) for _ in range(2))
    keys, weight = TILES * TILE_TOKENS, rand(D)
    one = rand(1, 1, HQ, D)
    yield Case(
        "cross_attention",
        f"decode, {keys} keys",
        lambda: ours.cross_attention(one, k, v, q_norm_weight=weight),
        floor=size(k, v) + 2 * size(one),
        again=partials(arch, 1, TILES * 4),
        conflicts=("", 0.0) if arch == 80 else (PUSHED, 0.06),
        flops=4 * keys * HQ * D,
    )
    # Few rows: on sm_90a the blocks of a cluster take one tile each of the same rows.
    rows, block = 128, 32
    q = rand(1, rows, HQ, D)
    repeats = rows // block - 1
    from_l2 = "keys and values by every block of rows, from L2"
    shared_rows = {"queries by the blocks that share their tiles, from L2": (TILES - 1) * size(q)}
    yield Case(
        "cross_attention",
        f"{rows} rows*, {keys} keys",
        lambda: ours.cross_attention(q, k, v, q_norm_weight=weight),
        floor=size(k, v) + 2 * size(q),
        again={from_l2: repeats * size(k, v)} | (shared_rows if arch == 90 else {}),
        flops=4 * rows * keys * HQ * D,
    )
    first_tile = torch.tensor([True, False, False, False]).expand(1, rows, TILES).contiguous()
    yield Case(
        "cross_attention",
        f"{rows} rows*, {keys} keys, one tile seen",
        lambda: ours.cross_attention(q, k, v, first_tile, q_norm_weight=weight),
        floor=size(k, v) // TILES + 2 * size(q),
        again={from_l2: repeats * (size(k, v) // TILES)} | (shared_rows if arch == 90 else {}),
        flops=4 * rows * TILE_TOKENS * HQ * D,
    )
    # Many rows: a block takes all tiles. Every other row sees but the first tile.
    rows = 512
    many = rand(1, rows, HQ, D)
    small_k, small_v = (t[:, :, :256].contiguous() for t in (k, v))
    mixed = torch.ones(1, rows, TILES, dtype=torch.bool)
    mixed[:, ::2, 1:] = False
    yield Case(
        "cross_attention",
        f"{rows} rows, {TILES} tiles* of 256, seen by some rows",
        lambda: ours.cross_attention(many, small_k, small_v, mixed, q_norm_weight=weight),
        floor=size(small_k, small_v) + 2 * size(many),
        again={from_l2: (rows // block - 1) * size(small_k, small_v)},
        flops=4 * (rows // 2) * (TILES + 1) * 256 * HQ * D,
    )


def vision(arch: int) -> Iterator[Case]:
    tokens, block = 1608, 128
    q, k, v = (rand(1, tokens, VISION_HEADS, VISION_DIM) for _ in range(3))
    padding = torch.arange(tokens)[None] >= TILE_TOKENS
    yield Case(
        "vision_attention",
        f"{tokens} tokens*",
        lambda: ours.vision_attention(q, k, v, padding),
        floor=4 * size(q),
        again={"keys and values by every block of rows, from L2": tokens // block * size(k, v)},
        flops=4 * tokens * tokens * VISION_HEADS * VISION_DIM,
    )
    pixels = rand(1, 1, 3, TILE, TILE)
    grid = TILE // PATCH
    patches, depth = grid * grid, 3 * PATCH * PATCH
    weight = rand(VISION_WIDTH, 3, PATCH, PATCH)
    positions, tile_positions = (
        rand(patches + 1, VISION_WIDTH),
        rand(9, (patches + 1) * VISION_WIDTH),
    )
    row, gate = rand(VISION_WIDTH), rand(1)
    pre_tile = rand(9, VISION_WIDTH)
    out_bytes = (patches + 8) * VISION_WIDTH * 2
    row_blocks = -(-patches // 128)
    per_patch = {"pre-tile embedding per patch, from L1": patches * size(row)}
    runs = "28-byte pixel rows of patches start anywhere in a sector: 2.2 times, from L1"
    if arch == 80:
        column_blocks = VISION_WIDTH // 128
        again = per_patch | {
            "pixels by every block of 128 columns, from L2": (column_blocks - 1) * size(pixels),
            runs: int(1.2 * column_blocks * size(pixels)),
            "weights by every block of 128 patches, from L2": (row_blocks - 1) * size(weight),
            "tokens read three times and written again for the norm, from L2 and L1": 4 * out_bytes,
            "scale and shift per token, from L1": 2 * patches * size(row),
        }
    else:
        column_blocks = VISION_WIDTH // 320
        slices, row_blocks = -(-depth // 64), -(-row_blocks // 2) * 2
        again = per_patch | {
            "pixels by every block of 320 columns, from L2": (column_blocks - 1) * size(pixels),
            runs: int(1.2 * column_blocks * size(pixels)),
            "weights by every block of 128 patches, two by one copy from L2, in slices of 64": (
                row_blocks * slices * 64 * VISION_WIDTH * 2 - size(weight)
            ),
        }
    yield Case(
        "patch_embed",
        f"1 tile* of {TILE}",
        lambda: ours.patch_embed(
            pixels,
            torch.tensor([1]),
            weight,
            row,
            positions,
            gate,
            tile_positions,
            pre_tile,
            gate,
            row,
            row,
        ),
        floor=size(pixels, weight, positions) + size(tile_positions) // 9 + out_bytes,
        again=again,
        flops=2 * patches * depth * VISION_WIDTH,
    )


def products(arch: int, note: str = "") -> Iterator[Case]:
    """Those of a decoder layer while it decodes."""
    square, gate_up = rand(E, E), rand(2 * INTERMEDIATE // 4, E)
    norm_weight = rand(E)
    for rows in (1, 8):
        x = rand(rows, E)
        yield Case(
            "skinny_linear",
            f"o, {rows} x {E}{note}",
            lambda x=x: ours.skinny_linear(x, square, residual=x),
            floor=size(square) + 3 * size(x),
            again={"x by every block, from L2": (MULTIPROCESSORS[arch].count - 1) * size(x)},
            flops=2 * rows * E * E,
        )
        yield Case(
            "skinny_linear",
            f"norm, gate and up*, SwiGLU, {rows} x {E}{note}",
            lambda x=x: ours.skinny_linear(x, gate_up, norm_weight=norm_weight, swiglu=True),
            floor=size(gate_up, x, norm_weight) + rows * INTERMEDIATE // 4 * 2,
            again={
                "x twice and the norm's weight by every block, from L2": MULTIPROCESSORS[arch].count
                * size(x, x, norm_weight)
                - size(x, norm_weight)
            },
            flops=2 * rows * E * 2 * (INTERMEDIATE // 4),
        )


def products_starting_the_next_kernel_at_once(arch: int) -> Iterator[Case]:
    if arch == 90:
        yield from products(arch, ", next kernel at the start")


def choice_of_the_token(arch: int) -> Iterator[Case]:
    logits = 3 * rand(1, VOCABULARY)
    seeds, steps, top_k = torch.tensor([[1], [0], [50]])
    top_p, min_p = torch.tensor([[0.9], [0.05]], dtype=torch.float64)
    yield Case(
        "sample",
        f"top-k, top-p, min-p, 1 x {VOCABULARY}",
        lambda: ours.sample(logits, seeds, steps, top_k=top_k, top_p=top_p, min_p=min_p),
        floor=size(logits),
        again={"the row once more for each of nine passes, from L2": 9 * size(logits)}
        if arch == 80
        else {},
        conflicts=("bins of four blocks in one load, counted as one block's", 0.46)
        if arch == 90
        else ("", 0.0),
    )


SOURCES = (
    elementwise,
    self_attention,
    cross_attention,
    vision,
    products,
    *quantized.SOURCES,
    choice_of_the_token,
    *gradients.SOURCES,
)
VARIANT_SOURCES = {NEXT_KERNEL_AT_START: (products_starting_the_next_kernel_at_once,)}


def cases(arch: int, variant: str) -> Iterator[Case]:
    """Of the defaults (""), or of one of VARIANTS."""
    for source in VARIANT_SOURCES[variant] if variant else SOURCES:
        for case in source(arch):
            if arch in case.architectures:
                yield case
