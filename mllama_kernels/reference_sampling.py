"""The arithmetic of :func:`mllama_kernels.sample` in plain PyTorch, equal to the kernels bit for bit.

From the scaled float32 logits on all is integers, so that no order of additions can show: a token's
*level* is its distance from the row's largest logit in units of 2**-26, its *weight* is
exp(-level * 2**-26) * 2**40, rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The token of a row whose largest scaled logit is NaN or infinite.
INVALID_TOKEN = -1

_MAX_DISTANCE = 29  # exp(-29) * 2**40 rounds to 0
_LEVELS_PER_UNIT = 2**26
_MAX_WEIGHT = 2**40
# What rounds to 0 or to infinity in float32.
_FLOAT32_ZERO, _FLOAT32_INFINITY = 2.0**-150, (2 - 2.0**-24) * 2.0**127
_LOG2_E = 3098164009  # with 31 bits after the point
# (2**f - 1) / f in powers of f, the highest first, with 31 bits after the point.
_EXP2 = (46022, 308748, 2881712, 20646516, 119196129, 515882277, 1488522244)


def check_options(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> None:
    """Refuses what the kernels refuse: no token would be left, or every weight be NaN."""
    divisors = {"temperature": temperature, "repetition_penalty": repetition_penalty}
    for name, value in divisors.items():
        if not _FLOAT32_ZERO < value < _FLOAT32_INFINITY:
            raise RuntimeError(
                f"mllama_kernels.sample: {name} must be a positive float32, got {value}"
            )
    if top_k < 0:
        raise RuntimeError(f"mllama_kernels.sample: top_k must not be negative, got {top_k}")
    for name, value in {"top_p": top_p, "min_p": min_p}.items():
        if not 0 <= value <= 1:
            raise RuntimeError(f"mllama_kernels.sample: {name} must be from 0 to 1, got {value}")


def scale_logits(
    logits: Tensor, temperature: float, repetition_penalty: float, seen: Tensor | None
) -> Tensor:
    """logits (B, V) in float32 after penalty and temperature, every operation rounded."""

    def scalar(value: float) -> Tensor:  # a Python number would be inverted, not divided by
        return torch.full((), value, dtype=torch.float32, device=logits.device)

    logits = logits.float()
    if seen is not None and repetition_penalty != 1:
        penalty = scalar(repetition_penalty)
        penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalized, logits)
    return logits if temperature == 1 else logits / scalar(temperature)


def levels_of(logits: Tensor) -> Tensor:
    """scaled logits (B, V) -> int64 levels; those of a row without finite maximum mean nothing."""
    distance = logits.amax(dim=-1, keepdim=True) - logits
    levels = (distance.clamp_max(_MAX_DISTANCE) * _LEVELS_PER_UNIT).long()
    return levels.clamp_min(0)  # what a NaN became


def weights_of(levels: Tensor) -> Tensor:
    """Levels -> int64 weights from 2**40 down to 0."""
    exponent = (42 << 57) - levels * _LOG2_E  # 2**40 is what level 0 gets
    fraction = (exponent >> 25) & 0xFFFFFFFF
    power = torch.full_like(levels, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = (power * fraction >> 32) + coefficient
    power = (2**31 + (power * fraction >> 32)) << 9
    shift = 42 - (exponent >> 57)
    return (power + ((1 << shift) >> 1)) >> shift


def kept_weights(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """scaled logits (B, V) -> int64 weights, 0 for what the filters drop."""
    levels = levels_of(logits)
    weights = weights_of(levels)
    ordered, order = levels.sort(dim=-1)
    rank = torch.searchsorted(ordered, levels)  # how many tokens are more likely; equal for ties
    if top_k > 0:
        weights = weights.masked_fill(rank >= top_k, 0)
    if top_p < 1:
        total = weights.sum(dim=-1, keepdim=True)
        need = (total - (total.double() * (1 - top_p)).long()).clamp_min(1)
        mass = weights.gather(-1, order)
        more_likely = (mass.cumsum(dim=-1) - mass).gather(-1, rank)
        weights = weights.masked_fill(more_likely >= need, 0)
    return weights.masked_fill(weights < math.ceil(min_p * _MAX_WEIGHT), 0)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, which wraps like uint64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts are arithmetic: drop the sign


def uniform(seeds: Tensor, step: Tensor) -> Tensor:
    """Counter-based uniform numbers in [0, 1): a pure function of (seed, step).

    seeds (B,) int64; step () int64. Returns (B,) float64 with 53 random bits.
    """
    golden = -0x61C8864680B583EB
    return _shift_right(_mix(_mix(seeds) + (step + 1) * golden), 11).double() * 2.0**-53


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The token of each row at which the distribution function passes u.

    weights (B, V) int64, their sum positive; u (B,) float64 in [0, 1). Returns (B,) int64; never a
    token of weight 0.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum((u * total).long(), total - 1)  # the product may round up to total
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
