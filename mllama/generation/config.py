"""A checkpoint's defaults, and the plan of one call: every option settled and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mllama.generation.options import Settings
from mllama.generation.sampling import SamplingConfig, row_seeds
from mllama.wording import quoted

# What transformers uses where neither the call nor the checkpoint says anything.
_DEFAULT_NEW_TOKENS = 20
_DEFAULT_TOP_K = 50

# The value at which each sampling option does nothing; None in a call means it.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


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
    """What one call does, with every default filled in and every value checked.

    Attributes:
        max_new_tokens, min_new_tokens: without the prompt.
        returns: of "scores", "logits" and "hidden_states" those that are kept.
        returns_dict: whether a GenerateOutput is returned, with the cache.
        others: as the options of the same names.
    """

    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    stop_strings: tuple[str, ...]
    sampling: SamplingConfig
    seeds: list[int]
    tokenizer: Any
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    prefix_allowed_tokens_fn: Callable[..., Any] | None
    logits_processor: tuple[Callable[..., Any], ...]
    stopping_criteria: tuple[Callable[..., Any], ...]
    returns: frozenset[str]
    returns_dict: bool

    @property
    def runs_python(self) -> bool:
        """Whether Python code works on the logits or on the text between two steps."""
        return bool(
            (self.min_new_tokens and self.eos_token_ids)
            or self.no_repeat_ngram_size
            or self.bad_words_ids
            or self.prefix_allowed_tokens_fn
            or self.logits_processor
            or self.stopping_criteria
            or self.returns
        )


def make_plan(
    settings: Settings,
    *,
    batch_size: int,
    prompt_length: int,
    text_length: int,
    max_text_length: int,
    vocab_size: int,
) -> GenerationPlan:
    """Settle the options of a call.

    Args:
        settings: from :func:`mllama.generation.options.settle`.
        batch_size: rows.
        prompt_length: of the padded prompt.
        text_length: of the longest row without padding.
        max_text_length: the model's context.
        vocab_size: of the logits.

    Raises: ValueError or TypeError naming an option that is out of range, contradicts another one, or
        does not fit into the context.
    """
    eos, pad_token_id = stop_token_ids(settings)
    stop_strings = tuple(settings["stop_strings"] or ())
    if stop_strings and settings["tokenizer"] is None:
        raise ValueError(f"stop_strings={quoted(list(stop_strings))} need tokenizer= to be found")
    criteria = _callables(settings, "stopping_criteria")
    for name, ends_rows in (("stop_strings", stop_strings), ("stopping_criteria", criteria)):
        if ends_rows and batch_size > 1 and pad_token_id is None:
            raise ValueError(f"{name} in a batch need pad_token_id for rows that end early")
    prefix = settings["prefix_allowed_tokens_fn"]
    if prefix is not None and not callable(prefix):
        raise TypeError(f"prefix_allowed_tokens_fn must be callable, got {type(prefix).__name__}")
    sampling = _sampling(settings)
    # All of them at most, and a number that the op can read.
    sampling = replace(sampling, top_k=min(sampling.top_k, vocab_size))
    new_tokens = _new_tokens(settings, prompt_length, text_length, max_text_length)
    return GenerationPlan(
        max_new_tokens=new_tokens,
        min_new_tokens=_min_new_tokens(settings, prompt_length, new_tokens),
        eos_token_ids=eos,
        pad_token_id=pad_token_id,
        stop_strings=stop_strings,
        sampling=sampling,
        seeds=_seeds(settings["seed"], batch_size, sampling.do_sample),
        tokenizer=settings["tokenizer"],
        no_repeat_ngram_size=settings["no_repeat_ngram_size"] or 0,
        bad_words_ids=_bad_words(settings["bad_words_ids"], vocab_size),
        prefix_allowed_tokens_fn=prefix,
        logits_processor=_callables(settings, "logits_processor"),
        stopping_criteria=criteria,
        returns=_returns(settings),
        returns_dict=bool(settings["return_dict_in_generate"]),
    )


def stop_token_ids(settings: Settings) -> tuple[tuple[int, ...], int | None]:
    """The stop tokens, and the padding token: by default the first of them."""
    eos, pad = _token_ids(settings["eos_token_id"]), _token_ids(settings["pad_token_id"])
    return eos, (pad or eos or (None,))[0]


def sequences_per_prompt(settings: Settings) -> int:
    """num_return_sequences. Raises: ValueError for several equal answers."""
    count = settings["num_return_sequences"] or 1
    if count > 1 and not _sampling(settings, warn=False).do_sample:
        raise ValueError(
            f"num_return_sequences={count} is not supported in greedy decoding, where the answers would "
            "be equal: pass do_sample=True"
        )
    return count


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _callables(settings: Settings, name: str) -> tuple[Callable[..., Any], ...]:
    given = settings[name]
    if given is None:
        return ()
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise TypeError(f"{name} must be a list of callables, got {quoted(given)}")
    return tuple(given)


def _bad_words(given: list[list[int]] | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    if any(token >= vocab_size for word in given or () for token in word):
        raise ValueError(f"bad_words_ids must lie within 0..{vocab_size - 1}, got {quoted(given)}")
    return tuple(dict.fromkeys(map(tuple, given or ())))


def _returns(settings: Settings) -> frozenset[str]:
    names = ("scores", "logits", "hidden_states")
    wanted = frozenset(name for name in names if settings[f"output_{name}"])
    if wanted and not settings["return_dict_in_generate"]:
        flags = [f"output_{name}" for name in names if name in wanted]
        warnings.warn(f"{flags} need return_dict_in_generate=True: ignored", stacklevel=6)
        return frozenset()
    return wanted


def _new_tokens(
    settings: Settings, prompt_length: int, text_length: int, max_text_length: int
) -> int:
    count, length = settings["max_new_tokens"], settings["max_length"]
    room = max_text_length - text_length
    if room < 1:
        raise ValueError(
            f"the prompt has {text_length} tokens and the model's context {max_text_length} "
            "(max_position_embeddings): no room for a new token"
        )
    if count is None and length is None:
        return min(_DEFAULT_NEW_TOKENS, room)
    name, value = ("max_length", length) if count is None else ("max_new_tokens", count)
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


def _min_new_tokens(settings: Settings, prompt_length: int, new_tokens: int) -> int:
    count, length = settings["min_new_tokens"], settings["min_length"] or 0
    if count is None:
        count = max(length - prompt_length, 0)
    if count > new_tokens:
        # No warning has a number of the caller's in it: Python remembers each text forever.
        warnings.warn("more new tokens are asked for at least than at most", stacklevel=6)
    return count


def _sampling(settings: Settings, warn: bool = True) -> SamplingConfig:
    do_sample, penalty = settings["do_sample"], settings["repetition_penalty"]
    fallback = {"top_k": _DEFAULT_TOP_K}
    values: dict[str, Any] = {} if penalty is None else {"repetition_penalty": penalty}
    for name, neutral in _NEUTRAL.items():
        value = settings[name] if name in settings else fallback.get(name)
        values[name] = neutral if value is None else value
    is_greedy = values["temperature"] == 0
    if is_greedy:
        values["temperature"] = _NEUTRAL["temperature"]
    checked = SamplingConfig(do_sample=True, **values)
    if do_sample and not is_greedy:
        return checked
    idle = [
        name
        for name, neutral in _NEUTRAL.items()
        if name in settings.chosen and values[name] not in (neutral, fallback.get(name))
    ]
    if idle and warn and not is_greedy:
        warnings.warn(f"{', '.join(idle)} without do_sample=True: decoding is greedy", stacklevel=6)
    return SamplingConfig(repetition_penalty=checked.repetition_penalty)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _seeds(seed: int | Sequence[int] | None, batch_size: int, do_sample: bool) -> list[int]:
    if seed is None:
        # Greedy decoding does not touch the state of torch's generator.
        seed = int(torch.randint(2**62, ())) if do_sample else 0
    if _is_integer(seed):
        return row_seeds(seed, batch_size)
    is_list = isinstance(seed, list) and len(seed) == batch_size
    if not is_list or not all(map(_is_integer, seed)):
        raise ValueError(
            f"seed must be an integer, or {batch_size} (one per row), got {quoted(seed)}"
        )
    return seed
