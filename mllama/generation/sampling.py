"""The options of sampling, and what the choice of the next token keeps from step to step.

The choice itself is the op :func:`mllama_kernels.sample`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import mllama_kernels
from mllama.config_fields import Kind, integer, named, number, value_problem
from mllama_kernels.reference_sampling import INVALID_TOKEN

__all__ = ["INVALID_TOKEN", "Sampler", "SamplingConfig", "row_seeds"]

_WORD = 2**64 - 1
# An odd number with no pattern in its bits, other than the one that spreads the steps of a stream.
_ROW_STRIDE = 0xD1B54A32D192ED03


def row_seeds(seed: int, rows: int) -> list[int]:
    """The seed of each row of a batch: the first row's is ``seed`` itself.

    The others are hashes of seed and row, so that no row repeats one of a batch with another seed.
    ``generate(..., seed=[row_seeds(11, 3)[2]])`` repeats only row 2 of seed 11.
    """
    return [seed, *(_mix(_mix(seed) + row * _ROW_STRIDE) for row in range(1, rows))]


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x &= _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


_SCALE = number(1e-30, 1e30)  # logits stay finite


def _temperature(value: Any) -> float:
    if value == 0 and not isinstance(value, bool):
        raise ValueError("a number > 0; for greedy decoding pass do_sample=False")
    return _SCALE.read(value)


def _share(value: Any) -> float:
    try:
        return number(0, 1).read(value)
    except ValueError:
        raise ValueError from None  # in the field's own words


SAMPLING_FIELDS = {
    "temperature": Kind("a number > 0", _temperature),
    "top_k": named(integer(0, 2**31 - 1), "an integer >= 0 (0: off)"),
    "top_p": Kind("a number from 0 to 1 (1: off)", _share),
    "min_p": Kind("a number from 0 to 1 (0: off)", _share),
    "repetition_penalty": named(_SCALE, "a number > 0 (1: off)"),
}


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
        values = vars(self)
        problems = [
            p for name, kind in SAMPLING_FIELDS.items() for p in value_problem(name, kind, values)
        ]
        if problems:
            raise ValueError("; ".join(problems))


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
        ops: where ``sample`` comes from, a model's ops or a module that has it.
        restartable: with other filters as well; then all of them are told to the op, also those that are off.
    """

    def __init__(
        self,
        config: SamplingConfig,
        input_ids: Tensor,
        vocab_size: int,
        seeds: list[int],
        ops: Any = mllama_kernels,
        restartable: bool = False,
    ) -> None:
        batch, device = len(input_ids), input_ids.device
        self._options = _columns(config, batch, device, every=restartable)
        self._seeds = torch.empty(batch, dtype=torch.int64, device=device)
        self._steps = torch.empty(batch, dtype=torch.int64, device=device)
        self._seen: Tensor | None = None
        if "repetition_penalty" in self._options:
            self._seen = torch.empty(batch, vocab_size, dtype=torch.bool, device=device)
        self._begin(input_ids, seeds, ops)

    def restart(
        self, config: SamplingConfig, input_ids: Tensor, seeds: list[int], ops: Any
    ) -> None:
        """Begin with other arguments of as many rows, in the same buffers."""
        for name, column in self._options.items():
            column.fill_(_value(config, name))
        self._begin(input_ids, seeds, ops)

    def _begin(self, input_ids: Tensor, seeds: list[int], ops: Any) -> None:
        self._ops = ops
        self._seeds.copy_(torch.tensor([_as_int64(seed) for seed in seeds]))
        self._steps.zero_()
        if self._seen is not None:
            batch, vocab_size = self._seen.shape
            seen = self._seen.new_zeros(batch, vocab_size + 1)
            self._seen.copy_(seen.scatter_(1, input_ids.clamp_max(vocab_size), True)[:, :-1])

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) of the last position -> (B,) int64 tokens, INVALID_TOKEN where not finite.

        Advances the state in place: the same buffers serve every step.
        """
        token = self._ops.sample(
            logits, self._seeds, self._steps, **self._options, seen=self._seen
        )[0]
        self._steps += 1
        if self._seen is not None:
            self._seen.scatter_(1, token.clamp_min(0)[:, None], True)  # a marker ends the run
        return token


def _columns(
    config: SamplingConfig, rows: int, device: torch.device, every: bool
) -> dict[str, Tensor]:
    """The options, one element per row: those that do something, or every one."""
    return {
        field.name: torch.full(
            (rows,),
            _value(config, field.name),
            dtype=torch.int64 if field.name == "top_k" else torch.float64,
            device=device,
        )
        for field in fields(config)
        if field.name != "do_sample" and (every or _value(config, field.name) != field.default)
    }


def _value(config: SamplingConfig, name: str) -> float:
    """Of an option of the op, which is greedy at temperature 0."""
    return 0.0 if name == "temperature" and not config.do_sample else getattr(config, name)


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
