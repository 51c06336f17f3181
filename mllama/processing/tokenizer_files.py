"""The files of a tokenizer: those of a published checkpoint, and Meta's tokenizer.model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.processing.options import IDLE_OPTIONS
from mllama.processing.special_tokens import EXTRA, NAMED
from mllama.processing.templates import parsed_templates
from mllama.processing.tiktoken import MAX_LENGTH, NAMED_TOKENS, read_tiktoken

if TYPE_CHECKING:
    from mllama.processing.tokenizer import MllamaTokenizer

UNLIMITED = int(1e30)  # what transformers writes where no maximum length is known
TOKENIZER_OPTIONS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    *EXTRA,
    *NAMED,
)
# Entries of a tokenizer_config.json that are written anew, or that name code or files.
_NOT_KEPT = ("added_tokens_decoder", "auto_map", "backend", "chat_template", "tokenizer_file")


def read_tokenizer(name: str | os.PathLike, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the tokenizer in a folder or hub id, `options` before what its files say.

    Raises: FileNotFoundError or ValueError naming the file; TypeError for an unknown option.
    """
    known = (*TOKENIZER_OPTIONS, "chat_template", *DOWNLOAD_OPTIONS, *IDLE_OPTIONS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    given = {key: value for key, value in options.items() if value is not None}
    if EXTRA[1] in given:
        if EXTRA[0] in given:
            raise TypeError(f"{EXTRA[0]} was given twice, also by its older name {EXTRA[1]}")
        given[EXTRA[0]] = given.pop(EXTRA[1])
    folder = resolve_folder(name, **{k: v for k, v in given.items() if k in DOWNLOAD_OPTIONS})
    arguments = _stored(folder)
    special = {**arguments["special_tokens"], **{n: given[n] for n in NAMED if n in given}}
    if isinstance(given.get("extra_special_tokens"), Mapping):  # transformers 4 gives them names
        special |= given.pop("extra_special_tokens")
    chosen = {n: given[n] for n in (*TOKENIZER_OPTIONS, "chat_template") if n in given}
    return {
        **arguments,
        **{name: value for name, value in chosen.items() if name not in NAMED},
        "special_tokens": special,
    }


def write_tokenizer(tokenizer: MllamaTokenizer, folder: Path) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "MllamaProcessor",
        "clean_up_tokenization_spaces": False,
        "model_input_names": tokenizer.model_input_names,
        **tokenizer.config,
        **tokenizer.special_tokens_map,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
    }
    if tokenizer.split_special_tokens:
        config["split_special_tokens"] = True
    if tokenizer.extra_special_tokens:  # by transformers 4's name, which 5 reads as well
        config["additional_special_tokens"] = tokenizer.extra_special_tokens
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping):
        config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    elif templates is not None:
        config["chat_template"] = templates
    files = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": tokenizer.special_tokens_map,
    }
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in ("tokenizer.json", *files)]


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if path.is_file():
        backend, special, limit = _from_file(path), {}, UNLIMITED
    else:
        models = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]
        found = next((model for model in models if model.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json, and no tokenizer.model; copy one from the checkpoint that "
                "the weights come from, such as meta-llama/Llama-3.2-11B-Vision-Instruct, or pass tokenizer="
            )
        backend, special, limit = read_tiktoken(found), dict(NAMED_TOKENS), MAX_LENGTH
    config = _optional_json(folder / "tokenizer_config.json")
    extra: list[str] = []
    for source in (_optional_json(folder / "special_tokens_map.json"), config):
        for name in EXTRA:
            tokens = source.get(name)
            if isinstance(tokens, Mapping):  # transformers 4 gives them names
                source = {**source, **tokens}
            elif tokens:
                extra = [content for content in map(_content, tokens) if content]
        for name, token in source.items():
            content = _content(token)
            if name.endswith("_token") and content:
                special[name] = content
    sides = {n: config[n] for n in ("padding_side", "truncation_side") if n in config}
    options = ("model_max_length", "split_special_tokens", *sides, *EXTRA, *_NOT_KEPT, *special)
    return {
        "backend": backend,
        "special_tokens": special,
        "extra_special_tokens": extra,
        "model_max_length": int(config.get("model_max_length") or limit),
        "split_special_tokens": bool(config.get("split_special_tokens", False)),
        "chat_template": parsed_templates(
            config.get("chat_template"), str(folder / "tokenizer_config.json")
        ),
        "config": {k: v for k, v in config.items() if k not in options},
        **sides,
    }


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
