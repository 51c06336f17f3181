"""The arithmetic of :func:`mllama_kernels.sample` in plain PyTorch; its tokens are the kernels' bit for bit.

From the scaled float32 logits on all is integers, so that no order of additions can show: a token's
*level* is its distance from the row's largest logit in units of 2**-26, its *weight* is
exp(-level * 2**-26) * 2**40, rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The token of a row whose largest scaled logit is NaN or infinite.
INVALID_TOKEN = -1
# Tokens whose log-probabilities a row may ask for, beside the chosen one's.
MAX_LIKELIEST = 20

_MAX_DISTANCE = 29  # exp(-29) * 2**40 rounds to 0
_LEVELS_PER_UNIT = 2**26
_MAX_WEIGHT = 2**40
_LOG2_E = 3098164009  # with 31 bits after the point
# (2**f - 1) / f in powers of f, the highest first, with 31 bits after the point.
_EXP2 = (46022, 308748, 2881712, 20646516, 119196129, 515882277, 1488522244)


def _is_positive(x: Tensor) -> Tensor:
    return x.float().isfinite() & (x.float() > 0)


# The value at which a number does nothing, what it may be, and that in words.
_NUMBERS: dict[str, tuple[float, Callable[[Tensor], Tensor], str]] = {
    "temperature": (1.0, lambda x: (x == 0) | _is_positive(x), "0 (greedy) or a positive float32"),
    "top_k": (0, lambda x: x >= 0, "0 (off) or positive"),
    "top_p": (1.0, lambda x: (x >= 0) & (x <= 1), "from 0 to 1"),
    "min_p": (0.0, lambda x: (x >= 0) & (x <= 1), "from 0 to 1"),
    "repetition_penalty": (1.0, _is_positive, "a positive float32"),
    "presence_penalty": (0.0, lambda x: x.float().isfinite(), "a finite float32"),
    "frequency_penalty": (0.0, lambda x: x.float().isfinite(), "a finite float32"),
    "num_likeliest": (-1, lambda x: (x >= -1) & (x <= MAX_LIKELIEST), "from -1 to 20"),
}
# What is nothing without each other.
_TOGETHER = (
    (("repetition_penalty",), "seen"),
    (("presence_penalty", "frequency_penalty"), "counts"),
    (("bias_tokens",), "bias"),
)


class Options:
    """The options of a call, as columns.

    Attributes:
        are_valid: (B,) bool, the rows whose numbers are in range.
    Raises: RuntimeError for one that is not, where the host can read them.
    """

    def __init__(self, logits: Tensor, **given: Tensor | None) -> None:
        self._given, self._like = given, logits
        for names, other in _TOGETHER:
            has_first = any(given[name] is not None for name in names)
            if has_first != (given[other] is not None):
                first = " or ".join(names)
                raise RuntimeError(
                    f"mllama_kernels.sample: give {first} and {other} together, got only "
                    f"{first if has_first else other}"
                )
        self.are_valid = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        for name, (_, allows, expected) in _NUMBERS.items():
            if (values := given[name]) is not None:
                self._mark(values, allows(values), f"{name} must be {expected}")
        self.temperature, self.top_k, self.top_p, self.min_p = (
            self._column(name) for name in ("temperature", "top_k", "top_p", "min_p")
        )

    def scaled(self, logits: Tensor) -> Tensor:
        """float32 logits (B, V) as the filters see them, every operation rounded."""
        given = self._given
        seen, counts, allowed = given["seen"], given["counts"], given["allowed"]
        if given["bias"] is not None:
            logits = logits + self._biases(logits.shape[1])
        if seen is not None:
            logits = penalized(logits, self._column("repetition_penalty").float(), seen)
        if counts is not None:
            counts = counts.clamp_min(0)
            logits = logits - self._column("frequency_penalty").float() * counts.float()
            logits = logits - self._column("presence_penalty").float() * (counts > 0)
        if allowed is not None:  # what is not finite cannot be hidden
            is_hidden = ~_bits(allowed, logits.shape[1]) & (logits < torch.inf)
            logits = logits.masked_fill(is_hidden, -torch.inf)
        return logits / self.temperature.where(self.temperature != 0, 1).float()

    def _column(self, name: str) -> Tensor:
        neutral, values = _NUMBERS[name][0], self._given[name]
        if values is None:
            dtype = torch.float64 if isinstance(neutral, float) else torch.int64
            values = torch.full((1,), neutral, dtype=dtype, device=self._like.device)
            values = values.expand(len(self._like))
        return values.unsqueeze(1)

    def _biases(self, vocab_size: int) -> Tensor:
        """(B, V) float32."""
        tokens, bias = self._given["bias_tokens"], self._given["bias"]
        before = F.pad(tokens[:, :-1], (1, 0), value=-1)
        has_ended = before == -1
        has_ended[:, :1] = False
        rises = (tokens > before) & (tokens < vocab_size) & ~has_ended
        self._mark(
            tokens,
            (tokens == -1) | rises,
            f"bias_tokens must rise in a row from 0 to {vocab_size - 1} at most, with -1 behind the last",
        )
        self._mark(bias, (tokens < 0) | (bias < torch.inf), "bias must be finite or -inf")
        places = tokens.where((tokens >= 0) & (tokens < vocab_size), vocab_size)
        biases = self._like.new_zeros(len(tokens), vocab_size + 1, dtype=torch.float32)
        return biases.scatter_(1, places, bias.float())[:, :-1]

    def _mark(self, values: Tensor, are_right: Tensor, expected: str) -> None:
        if values.is_cpu and not torch.compiler.is_compiling() and not are_right.all():
            place = (~are_right).nonzero()[0].tolist()
            row = " ".join(f"at {column} of" for column in place[1:]) or "in"
            raise RuntimeError(
                f"mllama_kernels.sample: {expected}, got {values[tuple(place)].item()} {row} row {place[0]}"
            )
        self.are_valid = self.are_valid & (are_right.all(1) if are_right.dim() > 1 else are_right)


def refuse_gradient(logits: Tensor, num_likeliest: Tensor | None) -> None:
    """Raises: RuntimeError where logits want a gradient of log-probabilities."""
    if num_likeliest is not None and torch.is_grad_enabled() and logits.requires_grad:
        raise RuntimeError(
            "mllama_kernels.sample: num_likeliest asks for log-probabilities, which have no gradient here, "
            "and logits want one; pass logits.detach(), or differentiate logits.log_softmax(-1)"
        )


def penalized(logits: Tensor, penalty: Tensor, seen: Tensor) -> Tensor:
    """float32 logits (B, V), divided by the penalty or multiplied with it where seen."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _bits(words: Tensor, count: int) -> Tensor:
    """int32 words (B, W) -> (B, count) bool, the lowest bit of a word first."""
    places = torch.arange(32, device=words.device)
    return (words.unsqueeze(-1) >> places & 1).flatten(1)[:, :count].bool()


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


def kept_weights(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """scaled logits (B, V) -> int64 weights, 0 for what the filters (B, 1) drop."""
    levels = levels_of(logits)
    weights = weights_of(levels)
    ordered, order = levels.sort(dim=-1)
    rank = torch.searchsorted(ordered, levels)  # how many tokens are more likely; equal for ties
    weights = weights.masked_fill((top_k > 0) & (rank >= top_k), 0)
    total = weights.sum(dim=-1, keepdim=True)
    need = (total - (total.double() * (1 - top_p)).long()).clamp_min(1)
    mass = weights.gather(-1, order)
    more_likely = (mass.cumsum(dim=-1) - mass).gather(-1, rank)
    weights = weights.masked_fill((top_p < 1) & (more_likely >= need), 0)
    return weights.masked_fill(weights < min_p * _MAX_WEIGHT, 0)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, which wraps like uint64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts are arithmetic: drop the sign


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """Counter-based uniform numbers in [0, 1): a pure function of seed and step.

    seeds, steps (B,) int64. Returns (B,) float64 with 53 random bits.
    """
    golden = -0x61C8864680B583EB
    return _shift_right(_mix(_mix(seeds) + (steps + 1) * golden), 11).double() * 2.0**-53


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The token of each row at which the distribution function passes u.

    weights (B, V) int64, their sum positive; u (B,) float64 in [0, 1). Returns (B,) int64; never a
    token of weight 0.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum((u * total).long(), total - 1)  # the product may round up to total
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def logprobs_of(
    logits: Tensor, tokens: Tensor, num_likeliest: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The likeliest of float32 logits (B, V), and the log-probabilities of the tokens (B,) and of those."""
    if num_likeliest is None:
        return tokens.new_empty(len(tokens), 0), logits.new_empty(len(tokens), 0)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :MAX_LIKELIEST]
    order = F.pad(order, (0, MAX_LIKELIEST - order.shape[1]), value=INVALID_TOKEN)
    columns = torch.cat([tokens.unsqueeze(1), order], dim=1)
    # One for the token, and one for each of the likeliest.
    is_asked = torch.arange(columns.shape[1], device=logits.device) <= num_likeliest.unsqueeze(1)
    columns = columns.where(is_asked & (tokens != INVALID_TOKEN).unsqueeze(1), INVALID_TOKEN)
    mass = weights_of(levels_of(logits)).sum(dim=-1, keepdim=True).double() / _MAX_WEIGHT
    distance = logits.gather(1, columns.clamp_min(0)).double() - logits.double().amax(
        1, keepdim=True
    )
    logprobs = (distance - mass.log()).float()
    return columns[:, 1:], logprobs.where(columns != INVALID_TOKEN, torch.nan)
