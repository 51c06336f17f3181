"""From the logits of the last position to the next token, on the device and without a host sync.

The filters are those of ``transformers`` 5 in its order: repetition penalty, temperature, top-k,
top-p, min-p. Every step is a fixed sequence of tensor operations over static buffers, so that a
CUDA graph can capture it together with the decode step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The next token of a row whose largest logit is NaN or infinite. The host turns it into an error.
INVALID_TOKEN = -1

# Weight of the most likely token in the integer distribution that draw() samples from: a token
# 2**-41 times as likely is never drawn, and 2**23 equally likely tokens still fit into an int64.
_WEIGHT_ONE = 2.0**40


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; the meaning and neutral value of each field as transformers.

    do_sample: draw from the filtered distribution; False takes the most likely token.
    temperature: > 0, divides the logits; 1 is neutral. Sampling only.
    top_k: keep the k most likely tokens and those that tie with the last; 0 is off. Sampling only.
    top_p: drop the unlikely tokens that together have at most 1 - top_p; 1 is off. Sampling only.
    min_p: drop tokens less likely than min_p times the most likely; 0 is off. Sampling only.
    repetition_penalty: > 0, divides positive and multiplies negative logits of tokens that occur
        in the prompt (padding included, as transformers) or were generated; 1 is off.

    Raises: ValueError naming the field, the value and the range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        hint = "; for greedy decoding pass do_sample=False" if self.temperature == 0 else ""
        _check(self, "temperature", lambda x: x > 0, f"a number > 0{hint}")
        _check(self, "top_k", lambda x: isinstance(x, int) and x >= 0, "an integer >= 0 (0: off)")
        _check(self, "top_p", lambda x: 0 <= x <= 1, "a number from 0 to 1 (1: off)")
        _check(self, "min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1 (0: off)")
        _check(self, "repetition_penalty", lambda x: x > 0, "a number > 0 (1: off)")


def _check(
    config: SamplingConfig, name: str, holds: Callable[[float], bool], expected: str
) -> None:
    value = getattr(config, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V); seen (B, V) bool. Divides positive, multiplies negative logits where seen."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """logits (B, V): -inf below the k-th largest of the row; ties with it stay."""
    smallest_kept = torch.topk(logits, min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """logits (B, V): -inf for the least likely tokens that together have at most 1 - top_p."""
    ordered, order = torch.sort(logits)
    removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def filter_min_p(logits: Tensor, min_p: float) -> Tensor:
    """logits (B, V): -inf for tokens less likely than min_p times the most likely one."""
    probabilities = logits.softmax(dim=-1)
    floor = min_p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, -torch.inf)


def filter_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Apply every active penalty and filter of ``config`` to logits (B, V) float32.

    seen (B, V) bool is needed if the repetition penalty is active.
    """
    if seen is not None and config.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if not config.do_sample:
        return logits
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k > 0:
        logits = filter_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = filter_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = filter_min_p(logits, config.min_p)
    return logits


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


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Draw one token per row by inverting the distribution function at u.

    The distribution is held in integers, so that its running sum is exact in whatever order a
    device adds it: equal logits and u give the same token on every device and at every batch size.

    Args: logits (B, V) floating, -inf for excluded tokens, at least one finite per row;
        u (B,) float64 in [0, 1). Returns: (B,) int64; never an excluded token.
    """
    shifted = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    cumulative = (shifted.exp() * _WEIGHT_ONE).round().long().cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum((u * total).long(), total - 1)  # the product may round up to total
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return index.clamp_max(logits.shape[-1] - 1)  # only a row of NaN, reported by its caller


class Sampler:
    """Chooses the next token of every row and keeps what the choice depends on, on the device.

    Row r draws from its own stream of random numbers, a function of ``seeds[r]`` and of how many
    tokens the row has generated: what else is in the batch changes nothing.

    Args:
        config: the filters.
        input_ids: (B, L) int64 prompt, what the repetition penalty counts as seen; ids outside
            the vocabulary (the image token) are ignored.
        vocab_size: V of the logits.
        seeds: one integer per row.
    """

    def __init__(
        self, config: SamplingConfig, input_ids: Tensor, vocab_size: int, seeds: list[int]
    ) -> None:
        self.config = config
        device = input_ids.device
        self._seeds = torch.tensor([_as_int64(seed) for seed in seeds], device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            seen = torch.zeros(len(input_ids), vocab_size + 1, dtype=torch.bool, device=device)
            seen.scatter_(1, input_ids.clamp_max(vocab_size), True)
            self._seen = seen[:, :vocab_size].contiguous()

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) of the last position -> (B,) int64 tokens, INVALID_TOKEN where not finite.

        Advances the state in place: the same buffers serve every step.
        """
        logits = filter_logits(logits.float(), self.config, self._seen)
        if self.config.do_sample:
            token = draw(logits, uniform(self._seeds, self._step))
        else:
            token = logits.argmax(dim=-1)
        self._step += 1
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)
        return torch.where(logits.amax(dim=-1).isfinite(), token, INVALID_TOKEN)


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
