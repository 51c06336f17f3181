"""What every option of ``generate`` takes: kind and range, checked for all of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllama.config_fields import TOKEN, Kind, either, integer, list_of, named, number, value_problem
from mllama.generation.sampling import SAMPLING_FIELDS

# Far beyond what is asked for in earnest. A list is looked at in every step or row.
MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_STOP_TEXT = 1000, 1000, 65_536
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS, MAX_BAD_LENGTH, MAX_BAD_TOKENS = 10_000, 1000, 65_536
MAX_NGRAM = 1024
MAX_ROWS = 16_384
MAX_LIST = max(MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_BAD_WORDS, MAX_ROWS)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ValueError
    return bool(value)


def _stop_string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    if len(value) > MAX_STOP_LENGTH:
        raise ValueError(f"strings of at most {MAX_STOP_LENGTH} characters")
    return value


def _stop_strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise ValueError
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} strings")
    strings = [_stop_string(string) for string in strings]
    if sum(map(len, strings)) > MAX_STOP_TEXT:
        raise ValueError(f"strings of at most {MAX_STOP_TEXT} characters together")
    return list(dict.fromkeys(strings))


_FLAG = Kind("True or False", _flag)
_OFF = named(integer(0, 2**53), "an integer >= 0 (0: off)")
_SOME = named(integer(1, 2**53), "an integer >= 1")
_WORD = list_of(TOKEN, "a list of token ids", most=MAX_BAD_LENGTH, least=1)
_WORDS = list_of(_WORD, "a list of lists of token ids", most=MAX_BAD_WORDS)


def entries_within(value: Any) -> int:
    """How many entries the lists in a list have together."""
    lists = value if isinstance(value, (list, tuple)) else ()
    return sum(len(entry) for entry in lists if isinstance(entry, (list, tuple)))


def _bad_words(value: Any) -> list[list[int]]:
    if entries_within(value) > MAX_BAD_TOKENS:  # before any is looked at
        raise ValueError(f"lists of at most {MAX_BAD_TOKENS} token ids together")
    return _WORDS.read(value)


OPTION_FIELDS: Mapping[str, Kind] = {
    **SAMPLING_FIELDS,
    "temperature": named(number(0, 1e30), "a number > 0"),  # 0 is greedy, see the plan
    "do_sample": _FLAG,
    "max_new_tokens": _SOME,
    "max_length": _SOME,
    "min_new_tokens": _OFF,
    "min_length": _OFF,
    "num_return_sequences": named(integer(1, MAX_ROWS), "an integer >= 1"),
    "no_repeat_ngram_size": named(integer(0, MAX_NGRAM), "an integer >= 0 (0: off)"),
    "bad_words_ids": Kind(_WORDS.words, _bad_words),
    "eos_token_id": named(
        either(TOKEN, list_of(TOKEN, "a list of token ids", most=MAX_STOP_TOKENS)),
        "a token id or several",
    ),
    "pad_token_id": named(either(TOKEN, list_of(TOKEN, "", length=1)), "one token"),
    "stop_strings": Kind("non-empty strings", _stop_strings),
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "output_hidden_states": _FLAG,
}


def option_problems(values: dict[str, Any]) -> dict[str, str]:
    """By the names of options what is wrong with them; the others become plain values. None is off."""
    found = {}
    for name, kind in OPTION_FIELDS.items():
        if values.get(name) is not None and (faults := value_problem(name, kind, values)):
            found[name] = faults[0]
    return found
