"""The options of ``generate``: their defaults from a checkpoint, and what a call makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from mllama.generation.sampling import SamplingConfig

# What transformers uses where neither the call nor the checkpoint says anything.
_DEFAULT_NEW_TOKENS = 20
_DEFAULT_TOP_K = 50

# The value at which each sampling option does nothing; None in a call means it.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

# Options of transformers that are accepted at the only value there is here.
_FIXED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of ``generate`` beside the model's inputs.

    An option that is not given comes from the checkpoint's ``generation_config.json``, then from
    the defaults of transformers: greedy, 20 new tokens, and top_k 50 when sampling. None turns an
    option off.

    max_new_tokens: how many tokens to add at most.
    max_length: the same as a length of padded prompt and new tokens together; not both.
    do_sample: sample; False takes the most likely token and allows none of the next four.
    temperature, top_k, top_p, min_p, repetition_penalty: see
        :class:`mllama.generation.sampling.SamplingConfig`.
    seed: what sampling depends on. Row r of a batch uses seed + r, so that equal prompts give
        different answers and a row's answer does not depend on the other rows; a list gives every
        row its own. None draws a seed from torch's default generator.
    eos_token_id: a stop token or several; [] or None for none.
    pad_token_id: fills rows that finished early; by default the first stop token.
    stop_strings: a string or several; a row ends with the token that completes one of them.
    tokenizer: a processor or tokenizer, needed for stop_strings.
    """

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any


class GenerationConfig(dict[str, Any]):
    """The entries of ``generation_config.json``, also as attributes; None where there is none."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        return cls(values)

    def to_dict(self) -> dict[str, Any]:
        """The entries that say something."""
        return {name: value for name, value in self.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@dataclass(frozen=True)
class GenerationPlan:
    """What one call does, with every default filled in and every value checked."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    stop_strings: tuple[str, ...]
    sampling: SamplingConfig
    seeds: list[int]
    tokenizer: Any


def make_plan(
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    batch_size: int,
    prompt_length: int,
    text_length: int,
    max_text_length: int,
) -> GenerationPlan:
    """Settle the options of a call.

    Args:
        defaults: the checkpoint's.
        options: those of the call, see GenerationOptions; a value of None is a choice, not a gap.
        batch_size: rows.
        prompt_length: of the padded prompt.
        text_length: of the longest row without padding.
        max_text_length: the model's context.

    Raises: ValueError or TypeError naming an option that is unknown, out of range, contradicts
        another one, or does not fit into the context.
    """
    unknown = set(options) - GenerationOptions.__annotations__.keys() - _FIXED.keys()
    if unknown:
        known = ", ".join(GenerationOptions.__annotations__)
        raise TypeError(f"unknown arguments {sorted(unknown)}; options are {known}")
    for name, value in _FIXED.items():
        if options.get(name, value) not in (value, None):
            raise ValueError(f"{name}={options[name]!r} is not supported, only {value!r}")

    eos, pad_token_id = stop_token_ids(defaults, options)
    stop_strings = _setting("stop_strings", defaults, options) or ()
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"stop_strings must be non-empty strings, got {list(stop_strings)!r}")
    tokenizer = options.get("tokenizer")
    if stop_strings and tokenizer is None:
        raise ValueError(f"stop_strings={list(stop_strings)!r} need tokenizer= to be found")
    if stop_strings and batch_size > 1 and pad_token_id is None:
        raise ValueError("stop_strings in a batch need pad_token_id for rows that end early")
    sampling = _sampling(defaults, options)
    return GenerationPlan(
        max_new_tokens=_new_tokens(defaults, options, prompt_length, text_length, max_text_length),
        eos_token_ids=eos,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        sampling=sampling,
        seeds=_seeds(options.get("seed"), batch_size, sampling.do_sample),
        tokenizer=tokenizer,
    )


def stop_token_ids(
    defaults: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[tuple[int, ...], int | None]:
    """The stop tokens, and the padding token: by default the first of them.

    Raises: ValueError naming the option.
    """
    eos = _token_ids("eos_token_id", _setting("eos_token_id", defaults, options))
    pad = _token_ids("pad_token_id", _setting("pad_token_id", defaults, options))
    if len(pad) > 1:
        raise ValueError(f"pad_token_id must be one token, got {list(pad)}")
    return eos, (pad or eos or (None,))[0]


def _setting(name: str, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    return options[name] if name in options else defaults.get(name)


def _new_tokens(
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    prompt_length: int,
    text_length: int,
    max_text_length: int,
) -> int:
    count, length = options.get("max_new_tokens"), options.get("max_length")
    if count is not None and length is not None:
        raise ValueError(f"give max_new_tokens={count} or max_length={length}, not both")
    room = max_text_length - text_length
    if room < 1:
        raise ValueError(
            f"the prompt has {text_length} tokens and the model's context {max_text_length} "
            "(max_position_embeddings): no room for a new token"
        )
    if count is None and length is None:
        count, length = defaults.get("max_new_tokens"), defaults.get("max_length")
        if count is None and length is None:
            return min(_DEFAULT_NEW_TOKENS, room)
    name, value = ("max_length", length) if count is None else ("max_new_tokens", count)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if count is None:
        count = length - prompt_length
        if count < 1:
            raise ValueError(
                f"max_length={length} has no room for a new token: the prompt has {prompt_length}"
            )
    if count > room:
        raise ValueError(
            f"{name}={value} does not fit: the prompt has {text_length} tokens and the model's "
            f"context {max_text_length} (max_position_embeddings), room for {room} more"
        )
    return count


def _sampling(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> SamplingConfig:
    do_sample = _setting("do_sample", defaults, options)
    if do_sample not in (True, False, None):
        raise ValueError(f"do_sample must be True or False, got {do_sample!r}")
    penalty = options.get("repetition_penalty", defaults.get("repetition_penalty"))
    values: dict[str, Any] = {} if penalty is None else {"repetition_penalty": penalty}
    if not do_sample:
        for name, neutral in _NEUTRAL.items():
            value = options.get(name)
            if value is not None and value != neutral:
                raise ValueError(f"{name}={value!r} needs do_sample=True, decoding is greedy")
        return SamplingConfig(**values)
    fallback = {"top_k": _DEFAULT_TOP_K}
    for name, neutral in _NEUTRAL.items():
        if name in options:
            value = options[name]
        else:
            value = defaults.get(name)
            value = fallback.get(name) if value is None else value
        values[name] = neutral if value is None else value
    return SamplingConfig(do_sample=True, **values)


def _token_ids(name: str, value: int | Sequence[int] | None) -> tuple[int, ...]:
    ids = () if value is None else (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{name} must be a token id or several, got {value!r}")
    return ids


def _seeds(seed: int | Sequence[int] | None, batch_size: int, do_sample: bool) -> list[int]:
    if seed is None:
        # Greedy decoding leaves the state of torch's generator alone.
        seed = int(torch.randint(2**62, ())) if do_sample else 0
    if isinstance(seed, int):
        return [seed + row for row in range(batch_size)]
    if len(seed) != batch_size or not all(isinstance(s, int) for s in seed):
        raise ValueError(f"seed must be an integer, or {batch_size} (one per row), got {seed!r}")
    return list(seed)
