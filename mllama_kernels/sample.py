"""From the logits of the last position to the next token, on the device and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from mllama_kernels import _dispatch
from mllama_kernels.reference_sampling import MAX_LIKELIEST, refuse_gradient


@_dispatch.public
def sample(
    logits: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    counts: Tensor | None = None,
    bias_tokens: Tensor | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    num_likeliest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses one token per row: the most likely one, or one drawn from the filtered distribution.

    Every option is data of its row, None is off for all. In this order, that of `transformers` 5 for all it
    has of them: bias, repetition penalty, frequency and presence penalty, allowed tokens, temperature, top-k,
    top-p, min-p. Token and log-probabilities are a function of the row's logits, options, seed and step
    alone: the same token on every device, in every batch, and in the reference.

    What changes logits is done in float32, each operation rounded. A token's weight is then
    exp(z - max z) * 2**40 rounded to an integer, where the float32 difference is cut to a multiple of
    2**-26; sums of weights are exact. Tokens of equal distance tie, and ties stay or go together: top-k
    keeps what ties with the k-th, top-p what ties with the last it keeps. The draw inverts the distribution
    function of the kept weights, in the order of the tokens, at a 53-bit uniform number.

    The op changes none of its arguments: to continue, a caller adds 1 to `steps` and enters the token in
    `seen` and `counts`. No row may advance a counter that the others still read, and a pure function is what
    a compiler can move and a test can repeat.

    Args:
        logits: (B, V), float32, float16 or bfloat16 (float64 on CPU, rounded to float32), V below 2**22.
        seeds: (B,) int64, one stream of random numbers per row.
        steps: (B,) int64, the position in each stream.
        temperature: (B,) float64, >= 0, divides the logits; 0 takes the first of the largest logits, without
            the filters. None: 1.
        top_k: (B,) int64, keep the k most likely tokens; 0 is off.
        top_p: (B,) float64, drop the unlikely tokens that together have at most 1 - top_p; 1 is off.
        min_p: (B,) float64, drop tokens less likely than min_p times the most likely; 0 is off.
        repetition_penalty: (B,) float64, > 0, divides positive and multiplies negative logits of `seen`
            tokens; 1 is off.
        seen: (B, V) bool, with repetition_penalty.
        presence_penalty: (B,) float64, is subtracted where `counts` is positive; 0 is off.
        frequency_penalty: (B,) float64, is subtracted as often as `counts` says; 0 is off.
        counts: (B, V) int32, with either of these; what is negative counts as 0.
        bias_tokens: (B, M) int64, the tokens whose logits `bias` is added to: rising in each row, and -1
            behind the last.
        bias: (B, M) float32, finite or -inf.
        allowed: (B, ceil(V / 32)) int32, token t may be chosen where bit t % 32 (0 is the lowest) of word
            t // 32 is set.
        num_likeliest: (B,) int64, how many of the likeliest tokens to report beside the chosen token's
            log-probability, 0 to 20; -1: no log-probability at all.
    Returns:
        tokens: (B,) int64; -1 for a row with a logit that is NaN or inf before what is not allowed is hidden,
            or whose largest logit, scaled, is infinite: for one that no token is left to, too.
        likeliest: (B, 20) int64, by falling logits as they were given, the lower token first of equals;
            -1 behind those asked for and those there are. (B, 0) without num_likeliest.
        logprobs: (B, 21) float32, log-softmax of the logits as they were given at the token, then at the
            likeliest; NaN where there is no token or nothing was asked for. (B, 0) without num_likeliest.
            There is no gradient.
    Raises:
        RuntimeError: naming what was given and what is expected; for log-probabilities of logits that want a
            gradient, too. Numbers on a GPU are not read for that: a row with one out of range, or with tokens
            that do not rise, gets -1.
    Source:
        Holtzman et al. 2019 (arXiv 1904.09751) for top-p; Keskar et al. 2019 (arXiv 1909.05858) for the
        repetition penalty; Steele, Lea, Flood 2014 (SplitMix) for the random numbers.
    """
    refuse_gradient(logits, num_likeliest)
    return torch.ops.mllama_kernels.sample(
        logits,
        seeds,
        steps,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        seen,
        presence_penalty,
        frequency_penalty,
        counts,
        bias_tokens,
        bias,
        allowed,
        num_likeliest,
    )


def _fake(
    logits: Tensor,
    seeds: Tensor,
    steps: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    seen: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
    bias_tokens: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    num_likeliest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    reported, own = (0, 0) if num_likeliest is None else (MAX_LIKELIEST, 1)
    return (
        seeds.new_empty(rows),
        seeds.new_empty(rows, reported),
        logits.new_empty(rows, own + reported, dtype=torch.float32),
    )


# Autocast leaves what is not logits as it is: numbers with their own dtypes.
_dispatch.register("sample", _fake, differentiable=False, kept=tuple(range(1, 16)))
