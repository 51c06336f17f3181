"""Pixels to the tokens that enter the vision encoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.peers import compiled
from benchmarks.shapes import PADDED_TILE_TOKENS, PATCH, TILE, TILE_TOKENS, TILES, VISION_WIDTH
from benchmarks.training import trained
from mllama_kernels import reference

RATIOS = 9  # of which 0 is padding
ALL_TILES = 6  # the ratio id of two by two tiles


def make(setting: Setting) -> Arguments:
    small = partial(setting.randn, scale=0.02)
    return (
        setting.randn(1, TILES, 3, TILE, TILE),
        torch.tensor([ALL_TILES], device=setting.device),
        small(VISION_WIDTH, 3, PATCH, PATCH),
        small(VISION_WIDTH),
        small(TILE_TOKENS, VISION_WIDTH),
        setting.randn(1),
        small(RATIOS, TILES * TILE_TOKENS * VISION_WIDTH),
        small(RATIOS, TILES * VISION_WIDTH),
        setting.randn(1),
        1 + small(VISION_WIDTH),
        small(VISION_WIDTH),
    )


def cases(setting: Setting) -> Iterator[Case]:
    pixels, weight = TILES * 3 * TILE * TILE, VISION_WIDTH * 3 * PATCH * PATCH
    tables = TILE_TOKENS * VISION_WIDTH * (1 + TILES)
    output = TILES * PADDED_TILE_TOKENS * VISION_WIDTH
    forward = Case(
        op="patch_embed",
        shape={"tiles": TILES, "side": TILE},
        dtype=setting.dtype,
        make=partial(make, setting),
        truth=reference.patch_embed,
        impls=(
            Impl(OURS, ours.patch_embed),
            Impl(PLAIN, reference.patch_embed),
            compiled(reference.patch_embed),
        ),
        bytes=(pixels + weight + tables + output) * setting.element,
        flops=2 * TILES * (TILE_TOKENS - 1) * weight,
    )
    yield forward
    # Backward: pixels, tables, tokens and their gradient read; gradients of all but the pixels written,
    # of the tile positions for every ratio.
    written = weight + TILE_TOKENS * VISION_WIDTH * (1 + RATIOS * TILES)
    yield trained(
        forward,
        leaves=slice(1, None),
        bytes=forward.bytes + (pixels + tables + 2 * output + written) * setting.element,
        flops=2 * forward.flops,
    )
