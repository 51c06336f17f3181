"""The entries of an adapter_config.json that are honoured, checked as one before anything follows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mllama.config_fields import (
    FLAG,
    NOTHING,
    Kind,
    either,
    integer,
    list_of,
    number,
    value_problem,
)
from mllama.wording import quoted, shown

MAX_RANK = 2**16
_MAX_PATTERN, _MAX_PATTERNS, _MAX_NAMES = 4096, 2000, 10_000
_INIT = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,2})?")
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def _pattern(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    if len(value) > _MAX_PATTERN:
        raise ValueError(f"a pattern of at most {_MAX_PATTERN} characters")
    return value


def _patterns_to(kind: Kind) -> Kind:
    """A dictionary from patterns to values of a kind."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        if len(value) > _MAX_PATTERNS:
            raise ValueError(f"a dictionary of at most {_MAX_PATTERNS} patterns")
        return {_pattern(key): kind.read(entry) for key, entry in value.items()}

    return Kind(f"a dictionary of patterns, each to {kind.words}", read)


def _one_of(holds: Any, words: str) -> Kind:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or not holds(value):
            raise ValueError
        return value

    return Kind(words, read)


_RANK = integer(1, MAX_RANK)
_ALPHA = number(0, 1e9)
_TEXT = Kind("a pattern", _pattern)
_MODULE_NAME = _one_of(lambda name: len(name) <= 512 and _MODULE.fullmatch(name), "a module's name")
_MODULES = either(_TEXT, list_of(_TEXT, "a list of names", most=_MAX_NAMES))
_LAYER = integer(0, 10**6)
_TOKEN_LIST = list_of(integer(0, 2**24), "a list of token ids", most=2**17)

# Kind and default; ... where there must be one.
_FIELDS: dict[str, tuple[Kind, Any]] = {
    "r": (_RANK, 8),
    "lora_alpha": (_ALPHA, 8),
    "lora_dropout": (number(0, 1), 0.0),
    "target_modules": (_MODULES, ...),
    "exclude_modules": (either(_MODULES, NOTHING), None),
    "rank_pattern": (either(_patterns_to(_RANK), NOTHING), None),
    "alpha_pattern": (either(_patterns_to(_ALPHA), NOTHING), None),
    "layers_to_transform": (
        either(_LAYER, list_of(_LAYER, "a list of layers", most=_MAX_NAMES), NOTHING),
        None,
    ),
    "layers_pattern": (
        either(
            _TEXT, list_of(_TEXT, "a list of patterns", most=64), NOTHING, _one_of("".__eq__, "")
        ),
        None,
    ),
    "modules_to_save": (
        either(list_of(_MODULE_NAME, "a list of modules' names", most=64), NOTHING),
        None,
    ),
    "trainable_token_indices": (either(_TOKEN_LIST, NOTHING), None),
    "bias": (_one_of(("none", "all", "lora_only").__contains__, "none, all or lora_only"), "none"),
    "init_lora_weights": (either(FLAG, _one_of(_INIT.fullmatch, "gaussian, olora or pissa")), True),
    "use_rslora": (FLAG, False),
    "use_dora": (FLAG, False),
    "fan_in_fan_out": (FLAG, False),
    "lora_bias": (FLAG, False),
}
# What says nothing of the sum that an adapter is.
_WITHOUT_MEANING = frozenset(
    (
        "peft_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "task_type",
    )
    + ("inference_mode", "megatron_core", "qalora_group_size", "runtime_config")
)
_NOTHING = (None, False, "", [], {})


def checked_entries(stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The honoured entries with their defaults, and what is wrong: values that cannot be, and entries that
    ask for what is not supported, such as layer_replication and megatron_config."""
    values = {name: stored.get(name, default) for name, (_, default) in _FIELDS.items()}
    problems = []
    for name, (kind, default) in _FIELDS.items():
        if values[name] is ...:
            problems.append(f"it lacks {name}")
        elif values[name] is None and name in stored and default is not ...:
            values[name] = default
        else:
            problems += value_problem(name, kind, values)
    for name, value in stored.items():
        if name not in _FIELDS and name not in _WITHOUT_MEANING and value not in _NOTHING:
            problems.append(f"{shown(name)}={quoted(value)} is not supported")
    return values, problems
