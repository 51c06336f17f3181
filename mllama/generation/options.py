"""The options of ``generate``: those that are honoured, and those of transformers that are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from mllama.generation.fields import MAX_BAD_TOKENS, MAX_LIST, entries_within, option_problems
from mllama.wording import quoted


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of ``generate`` beside the model's inputs.

    An option that is not given comes from ``generation_config``, then from the checkpoint's
    ``generation_config.json``, then from the defaults of transformers: greedy, 20 new tokens, and
    top_k 50 when sampling. None turns an option off. Numbers may be those of numpy and torch.

    max_new_tokens: how many tokens to add at most.
    max_length: the same as a length of padded prompt and new tokens together; not both.
    min_new_tokens, min_length: no stop token before so many.
    do_sample: sample; False takes the most likely token. temperature=0 does as well, and has none of the
        next four matter.
    temperature, top_k, top_p, min_p, repetition_penalty: see
        :class:`mllama.generation.sampling.SamplingConfig`. The first four have no effect in greedy
        decoding; giving one for it brings a warning.
    seed: what sampling depends on. Row 0 uses the seed itself and row r another one that is derived
        from both, see :func:`mllama.generation.sampling.row_seeds`: equal prompts give different answers,
        and a row's answer does not depend on the other rows. A list gives every row its own. None draws a
        seed from torch's default generator.
    num_return_sequences: so many answers to each prompt, one row of the result each, those of a prompt
        together. For sampling only.
    no_repeat_ngram_size: no n tokens in a row occur twice in prompt and answer.
    bad_words_ids: lists of tokens that the text must not come to contain.
    prefix_allowed_tokens_fn: from row and tokens so far, (n,) int64, to the tokens that may come next.
    logits_processor: callables from the text so far, (B, n) int64, and scores (B, V) in float32 to new
        scores; after those of the options above and before temperature, top_k, top_p and min_p. One of
        transformers replaces the one that an option would make of the same class.
    stopping_criteria: callables from the text so far and the tuple of scores (None unless output_scores)
        to a bool or a (B,) bool tensor: which rows end here.
    eos_token_id: a stop token or several; [] or None for none.
    pad_token_id: fills rows that finished early; by default the first stop token.
    stop_strings: a string or several (see :mod:`mllama.generation.fields` for how many); a row ends with the
        token that completes one of them.
    tokenizer: a processor or tokenizer, needed for stop_strings.
    return_dict_in_generate: return a :class:`mllama.outputs.GenerateOutput`, which has the cache and,
        one tensor or tuple for each new token,
    output_scores: the float32 scores (B, V) that the token was chosen from, -inf for what was dropped;
    output_logits: the float32 logits (B, V) before all of that;
    output_hidden_states: the stream before each layer and the normed result, (B, columns, E): at first
        those of the prompt, zero at its padding, then one column. Tokens in a cache have none.

    Those from min_new_tokens, from no_repeat_ngram_size to stopping_criteria and the outputs are computed
    by Python between two steps, and no CUDA graph is used with them.
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | Sequence[int] | None
    num_return_sequences: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None
    stopping_criteria: Sequence[Callable[[Tensor, Any], Any]] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None
    output_hidden_states: bool | None


HONOURED = frozenset(GenerationOptions.__annotations__)

_ACCELERATE = "mllama_kernels.transformers.accelerate() on transformers' model has it"
_CACHE = "pass past_key_values=model.new_cache(...)"


def _processor(name: str) -> str:
    return f"pass logits_processor=[transformers.{name}(...)]"


# Accepted at these values (and None), which ask for nothing; any other is refused with the hint.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _ACCELERATE),
    "num_beam_groups": ((1,), _ACCELERATE),
    "diversity_penalty": ((0,), _ACCELERATE),
    "penalty_alpha": ((0,), _ACCELERATE),
    "use_mtp": ((False,), _ACCELERATE),
    "is_assistant": ((False,), _ACCELERATE),
    "use_cache": ((True,), "there is always a cache"),
    "cache_implementation": (("dynamic", "static", "hybrid"), _CACHE),
    "cache_config": (({},), _CACHE),
    "synced_gpus": ((False,), "processes must generate the same number of tokens by themselves"),
    "output_attentions": ((False,), "no attention weights are formed"),
    "typical_p": ((1,), _processor("TypicalLogitsWarper")),
    "epsilon_cutoff": ((0,), _processor("EpsilonLogitsWarper")),
    "eta_cutoff": ((0,), _processor("EtaLogitsWarper")),
    "encoder_repetition_penalty": ((1,), _processor("EncoderRepetitionPenaltyLogitsProcessor")),
    "encoder_no_repeat_ngram_size": ((0,), _processor("EncoderNoRepeatNGramLogitsProcessor")),
    "renormalize_logits": ((False,), _processor("LogitNormalization")),
    "remove_invalid_values": ((False,), _processor("InfNanRemoveLogitsProcessor")),
    "suppress_tokens": (([],), _processor("SuppressTokensLogitsProcessor")),
    "begin_suppress_tokens": (([],), _processor("SuppressTokensAtBeginLogitsProcessor")),
    "token_healing": ((False,), _ACCELERATE),
    "guidance_scale": ((1,), _ACCELERATE),
    "generation_kwargs": (({},), "give the options themselves"),
    "use_model_defaults": ((True,), "the model's generation_config always fills the gaps"),
    "return_legacy_cache": ((False,), "the cache that is returned is a MllamaCache"),
    "return_dict": ((True,), "generate() returns what return_dict_in_generate says"),
}

# Without effect on what is generated here, as in transformers without beams and assistant.
WITHOUT_EFFECT = frozenset(
    ("early_stopping", "length_penalty", "low_memory", "num_assistant_tokens")
    + ("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind")
    + ("target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size")
    + ("compile_config", "disable_compile", "prefill_chunk_size", "max_cache_len")
    + ("bos_token_id", "decoder_start_token_id", "trust_remote_code")
    + ("transformers_version", "_from_model_config", "_commit_hash")
)

# Accepted only as None; any other value is refused with the hint.
REFUSED: dict[str, str] = {
    "constraints": _ACCELERATE,
    "force_words_ids": _ACCELERATE,
    "dola_layers": _ACCELERATE,
    "assistant_model": _ACCELERATE,
    "assistant_tokenizer": _ACCELERATE,
    "assistant_early_exit": _ACCELERATE,
    "prompt_lookup_num_tokens": _ACCELERATE,
    "speculation_type": _ACCELERATE,
    "custom_generate": _ACCELERATE,
    "continuous_batching_config": _ACCELERATE,
    "negative_prompt_ids": _ACCELERATE,
    "negative_prompt_attention_mask": _ACCELERATE,
    "watermarking_config": _ACCELERATE,
    "top_h": _processor("TopHLogitsWarper"),
    "sequence_bias": _processor("SequenceBiasLogitsProcessor"),
    "forced_bos_token_id": _processor("ForcedBOSTokenLogitsProcessor"),
    "forced_eos_token_id": _processor("ForcedEOSTokenLogitsProcessor"),
    "exponential_decay_length_penalty": _processor("ExponentialDecayLengthPenalty"),
    "max_time": "pass stopping_criteria=[transformers.MaxTimeCriteria(...)]",
    "forced_decoder_ids": "pass prefix_allowed_tokens_fn=",
    "cache_position": "the cache counts",
    "position_ids": "positions count the tokens of attention_mask",
    "token_type_ids": "the model has none",
    "full_text_row_masked_out_mask": "it follows from cross_attention_mask",
    "labels": "generate() computes no loss",
    "logits_to_keep": "generate() keeps those of the last column",
}

# Two names of one thing: one of a call overrides both of its configuration.
_PAIRS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))

# Taken as they are: no numbers.
_OBJECTS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "tokenizer"}


@dataclass(frozen=True)
class Settings:
    """What call, configuration and checkpoint together say.

    Attributes:
        values: of the honoured options, in plain Python; None where one is turned off.
        chosen: the names of those that the caller gave, directly or in a generation_config.
    """

    values: Mapping[str, Any]
    chosen: frozenset[str]

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.values


def settle(
    checkpoint: Mapping[str, Any], generation_config: Any, options: Mapping[str, Any]
) -> Settings:
    """The options that hold: those of the call before its generation_config before the checkpoint's.

    Args:
        checkpoint: the model's defaults. What is not known there is ignored with a warning.
        generation_config: a mapping, an object of transformers or None.
        options: of the call; None is a choice, not a gap.
    Raises: TypeError for an unknown name; ValueError that names all with a value that cannot be met.
    """
    config = _entries(generation_config)
    _refuse_unknown("arguments", options)
    _refuse_unknown("entries of generation_config", config)
    for few, length in _PAIRS:
        if options.get(few) is not None and options.get(length) is not None:
            few_, length_ = (f"{name}={quoted(options[name])}" for name in (few, length))
            raise ValueError(f"give {few_} or {length_}, not both")
    if unknown := _unknown(checkpoint):
        warnings.warn(
            f"the model's generation_config has unknown {quoted(unknown)}: ignored", stacklevel=5
        )
    merged: dict[str, Any] = {}
    for layer in ({k: v for k, v in checkpoint.items() if v is not None}, config, options):
        for pair in _PAIRS:
            if any(layer.get(name) is not None for name in pair):
                merged = {name: value for name, value in merged.items() if name not in pair}
        merged |= layer
    values = {
        name: value if name in _OBJECTS else plain(value)
        for name, value in merged.items()
        if name in HONOURED
    }
    faults = option_problems(values)
    problems = []
    for name, value in merged.items():
        source = "" if name in options else " (from generation_config; the call may override it)"
        if refusal := _refusal(name, value, source):
            problems.append(refusal)
        elif name in faults:
            problems.append(faults[name] + source)
    if problems:
        count = f"{len(problems)} options cannot be met: " if len(problems) > 1 else ""
        raise ValueError(count + "; ".join(problems))
    return Settings(values, frozenset(config) | frozenset(options))


def plain(value: Any, depth: int = 2) -> Any:
    """Numbers and arrays of numpy and torch, also in lists of lists, as those of Python.

    Lists that are longer than any option's, and lists of those, stay as they are.
    """
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    is_list = isinstance(value, (list, tuple)) and depth and len(value) <= MAX_LIST
    if is_list and entries_within(value) <= MAX_BAD_TOKENS:
        return [plain(item, depth - 1) for item in value]
    return value


def _entries(generation_config: Any) -> dict[str, Any]:
    """What a configuration says; in one of transformers None is a gap."""
    if generation_config is None:
        return {}
    values = generation_config
    if not isinstance(values, Mapping):
        if not callable(getattr(values, "to_dict", None)):
            raise TypeError(
                "generation_config must be a mapping or a GenerationConfig, got "
                f"{type(generation_config).__name__}"
            )
        values = values.to_dict()
    return {name: value for name, value in values.items() if value is not None}


def _unknown(names: Mapping[str, Any]) -> list[str]:
    return sorted(
        map(str, set(names) - HONOURED - NEUTRAL.keys() - WITHOUT_EFFECT - REFUSED.keys())
    )


def _refuse_unknown(what: str, names: Mapping[str, Any]) -> None:
    if unknown := _unknown(names):
        known = ", ".join(GenerationOptions.__annotations__)
        raise TypeError(f"unknown {what} {quoted(unknown)}; options are {known}")


def _refusal(name: str, value: Any, source: str) -> str | None:
    """Why an option cannot be met that asks for something there is not."""
    if value is None:
        return None
    if name in REFUSED:
        given = f"{name} of type {type(value).__name__}" if hasattr(value, "__dict__") else None
        return f"{given or f'{name}={quoted(value)}'} is not supported{source}: {REFUSED[name]}"
    if name in NEUTRAL:
        neutral, hint = NEUTRAL[name]
        if plain(value) not in neutral:
            only = " or ".join(map(repr, neutral))
            return f"{name}={quoted(value)} is not supported, only {only}{source}: {hint}"
    return None
