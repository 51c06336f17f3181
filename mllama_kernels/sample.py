"""From the logits of the last position to the next token, on the device and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch


@_dispatch.public
def sample(
    logits: Tensor,
    seeds: Tensor,
    step: Tensor,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Chooses one token per row: the most likely one, or one drawn from the filtered distribution.

    The filters are those of `transformers` 5 in its order: repetition penalty, temperature, top-k, top-p,
    min-p. The token is a function of the row's logits, `seeds[row]` and `step` alone: the same bits on
    every device, in every batch, and in the reference.

    Penalty and temperature are applied in float32, each operation rounded. A token's weight is then
    exp(z - max z) * 2**40 rounded to an integer, where the float32 difference is cut to a multiple of
    2**-26; sums of weights are exact. Tokens of equal distance tie, and ties stay or go together: top-k
    keeps what ties with the k-th, top-p what ties with the last it keeps. The draw inverts the distribution
    function of the kept weights, in the order of the tokens, at a 53-bit uniform number.

    The op changes none of its arguments: to continue, a caller adds 1 to `step` and marks the token in
    `seen`. No row may advance a counter that the others still read, and a pure function is what a compiler
    can move and a test can repeat.

    Args:
        logits: (B, V), float32, float16 or bfloat16 (float64 on CPU, rounded to float32), V below 2**22.
        seeds: (B,) int64, one stream of random numbers per row.
        step: () int64, the position in the streams, read on the device.
        do_sample: False takes the first of the largest penalised logits and ignores every other option.
        temperature: > 0, divides the logits.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: drop the unlikely tokens that together have at most 1 - top_p; 1 is off.
        min_p: drop tokens less likely than min_p times the most likely; 0 is off.
        repetition_penalty: > 0, divides positive and multiplies negative logits of `seen` tokens.
        seen: (B, V) bool; None: no penalty.
    Returns:
        (B,) int64; -1 for a row whose largest logit, scaled, is NaN or infinite.
    Raises:
        RuntimeError: naming what was given and what is expected.
    Source:
        Holtzman et al. 2019 (arXiv 1904.09751) for top-p; Keskar et al. 2019 (arXiv 1909.05858) for the
        penalty; Steele, Lea, Flood 2014 (SplitMix) for the random numbers.
    """
    return torch.ops.mllama_kernels.sample(
        logits,
        seeds,
        step,
        do_sample,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        seen,
    )


def _fake(
    logits: Tensor,
    seeds: Tensor,
    step: Tensor,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seen: Tensor | None,
) -> Tensor:
    return seeds.new_empty(logits.shape[0])


_dispatch.register("sample", _fake, differentiable=False)
