"""Self-attention of the vision encoder over all tiles of an image, present and absent."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import flex, sdpa, sdpa_backends
from benchmarks.shapes import (
    PADDED_TILE_TOKENS,
    TILE_TOKENS,
    TILES,
    VISION_DIM,
    VISION_HEADS,
    sample_rows,
    softmax,
)
from benchmarks.training import ATTENTION_FLOPS, by_heads, trained
from mllama_kernels import reference
from mllama_kernels.testing import ATTENTION_LARGEST

TOKENS = TILES * PADDED_TILE_TOKENS


def padding_of(present: int, device: torch.device) -> Tensor:
    """(1, TOKENS), True at the seven last tokens of a tile and at the tiles an image does not have."""
    token = torch.arange(TOKENS, device=device)
    tail = token % PADDED_TILE_TOKENS >= TILE_TOKENS
    return (tail | (token >= present * PADDED_TILE_TOKENS))[None]


def make(setting: Setting, present: int) -> Arguments:
    """q, k, v as views of one fused projection, which is how the model has them."""
    joined = setting.randn(1, TOKENS, 3, VISION_HEADS, VISION_DIM)
    return *joined.unbind(2), padding_of(present, setting.device)


def checked_rows(present: int) -> Tensor:
    """Rows spread over the image, and a padding row of every tile."""
    tails = torch.arange(TILES) * PADDED_TILE_TOKENS + TILE_TOKENS
    return torch.cat([sample_rows(TOKENS), tails])


def truth(present: int, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    rows = checked_rows(present).to(q.device)
    scores = torch.einsum("bihd,bjhd->bhij", q[:, rows], k) * VISION_DIM**-0.5
    hidden = padding[:, rows].unsqueeze(-1) & padding.unsqueeze(-2)
    weights = softmax(scores.masked_fill(hidden[:, None], float("-inf")))
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def select(present: int, output: Tensor) -> tuple[Tensor, ...]:
    return (output[:, checked_rows(present).to(output.device)],)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


def bool_mask(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Arguments:
    return q, k, v, ~(padding.unsqueeze(-1) & padding.unsqueeze(-2))[:, None]


def additive_mask(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Arguments:
    """The mask that `transformers` makes: an outer product times the smallest number."""
    outer = padding.to(q.dtype)
    outer = outer.unsqueeze(-1) * outer.unsqueeze(-2) * torch.finfo(q.dtype).min
    return q, k, v, outer[:, None]


def flex_heads(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, v


def flex_mask(q: Tensor, k: Tensor, v: Tensor, padding: Tensor):
    return lambda b, h, i, j: ~(padding[b, i] & padding[b, j])


def peers(setting: Setting) -> list[Impl]:
    names = ("cudnn", "efficient", "math") if setting.on_gpu else ("cudnn", "efficient")
    return [
        Impl(PLAIN, masked, bool_mask),
        Impl("transformers", masked, additive_mask),
        *sdpa_backends(setting, masked, bool_mask, ", mask", names),
        *sdpa_backends(setting, masked, additive_mask, ", additive mask", ("cudnn", "efficient")),
        flex(setting, flex_mask, (TOKENS, TOKENS), flex_heads, VISION_DIM),
    ]


def visible_pairs(present: int) -> int:
    """Pairs of tokens that are not both padding."""
    hidden = TOKENS - present * TILE_TOKENS
    return TOKENS * TOKENS - hidden * hidden


def forward(setting: Setting, present: int) -> Case:
    return Case(
        op="vision_attention",
        shape={"tokens": TOKENS, "tiles": present},
        dtype=setting.dtype,
        make=partial(make, setting, present),
        truth=partial(truth, present),
        select=partial(select, present),
        impls=(Impl(OURS, ours.vision_attention), *peers(setting)),
        bytes=4 * TOKENS * VISION_HEADS * VISION_DIM * setting.element,
        flops=4 * VISION_HEADS * VISION_DIM * visible_pairs(present),
    )


def forward_and_backward(setting: Setting, present: int) -> Case:
    """Backward reads q, k, v, the output and its gradient, and writes three gradients."""
    case = forward(setting, present)
    return trained(
        case,
        leaves=slice(3),
        largest=ATTENTION_LARGEST,
        truth=by_heads(reference.vision_attention),
        impls=(
            case.impls[0],
            Impl(PLAIN, masked, bool_mask),
            Impl("transformers", masked, additive_mask),
            *sdpa_backends(setting, masked, bool_mask, ", mask", ("cudnn", "efficient")),
        ),
        bytes=3 * case.bytes,
        flops=int(ATTENTION_FLOPS * case.flops),
    )


def cases(setting: Setting) -> Iterator[Case]:
    for present in setting.sizes([4, 1], [4]):
        yield forward(setting, present)
    yield forward_and_backward(setting, TILES)
