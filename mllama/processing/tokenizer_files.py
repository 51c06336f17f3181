"""The files of a tokenizer: those of a published checkpoint, and Meta's tokenizer.model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.gguf.container import is_gguf
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.files import FileRefused, read_regular
from mllama.processing.encoders import ConfinedEncoder, failures_named
from mllama.processing.gguf_tokenizer import read_gguf_tokenizer
from mllama.processing.options import IDLE_OPTIONS
from mllama.processing.special_tokens import EXTRA, NAMED
from mllama.processing.templates import parsed_templates
from mllama.processing.tiktoken import MAX_LENGTH, NAMED_TOKENS, read_tiktoken
from mllama.processing.tokenizer_parts import LONGEST_FILE, LONGEST_TOKEN, MOST_ADDED, all_known
from mllama.wording import quoted, shown

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
    """The arguments of the tokenizer in a folder, hub id or GGUF file, `options` before what that says.

    Raises: FileNotFoundError or ValueError naming the file; TypeError for an unknown option.
    """
    known = (*TOKENIZER_OPTIONS, "chat_template", *DOWNLOAD_OPTIONS, *IDLE_OPTIONS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"unknown option {quoted(unknown[0])}; there are {', '.join(sorted(known))}"
        )
    given = {key: value for key, value in options.items() if value is not None}
    if EXTRA[1] in given:
        if EXTRA[0] in given:
            raise TypeError(f"{EXTRA[0]} was given twice, also by its older name {EXTRA[1]}")
        given[EXTRA[0]] = given.pop(EXTRA[1])
    if is_gguf(Path(name)):
        arguments = read_gguf_tokenizer(Path(name))
    else:
        download = {k: v for k, v in given.items() if k in DOWNLOAD_OPTIONS}
        arguments = _stored(resolve_folder(name, **download))
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
    path, confined = folder / "tokenizer.json", False
    if path.exists():
        backend, confined = _from_file(path)
        special, limit = {}, UNLIMITED
    else:
        models = [folder / "tokenizer.model", folder / "original" / "tokenizer.model"]
        found = next((model for model in models if model.exists()), None)
        if found is None:
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json, and no tokenizer.model; copy one from the checkpoint that "
                "the weights come from, such as meta-llama/Llama-3.2-11B-Vision-Instruct, or pass tokenizer="
            )
        path = found
        backend, special, limit = read_tiktoken(found), dict(NAMED_TOKENS), MAX_LENGTH
    config_path = folder / "tokenizer_config.json"
    config = _optional_json(config_path)
    extra: list[str] = []
    for source in (folder / "special_tokens_map.json", config_path):
        named, more = _special_tokens(
            config if source is config_path else _optional_json(source), source
        )
        special |= named
        extra = extra if more is None else more
    sides = {n: config[n] for n in ("padding_side", "truncation_side") if n in config}
    for name, side in sides.items():
        if side not in ("right", "left"):
            raise _wrong(config_path, name, '"right" or "left"', side)
    split = config.get("split_special_tokens")
    if not isinstance(split, (bool, type(None))):
        raise _wrong(config_path, "split_special_tokens", "true or false", split)
    options = ("model_max_length", "split_special_tokens", *sides, *EXTRA, *_NOT_KEPT, *special)
    return {
        "backend": backend,
        "special_tokens": special,
        "extra_special_tokens": extra,
        "model_max_length": _max_length(config.get("model_max_length"), config_path) or limit,
        "split_special_tokens": bool(split),
        "chat_template": parsed_templates(config.get("chat_template"), str(config_path)),
        "config": {k: v for k, v in config.items() if k not in options},
        "confined": confined,
        "name": shown(str(path)),
        **sides,
    }


def _from_file(path: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer of a tokenizer.json, and whether it has to run in a process of its own."""
    name = shown(str(path))
    try:
        data = read_regular(path, LONGEST_FILE)
        known, file = all_known(data), data.decode("utf-8")
    except (FileRefused, ValueError) as error:
        raise ValueError(f"{name} is not a tokenizer: {error}") from None
    if not known:
        ConfinedEncoder(file, name).load()
    with failures_named(f"{name} is not a tokenizer"):
        return Tokenizer.from_str(file), not known


def _special_tokens(
    config: Mapping[str, Any], path: Path
) -> tuple[dict[str, str], list[str] | None]:
    """Special tokens with a name, and those without; None where the file does not say."""
    named, extra = dict(config), None
    for name in EXTRA:
        tokens = named.pop(name, None)
        if isinstance(tokens, Mapping):  # transformers 4 gives them names
            named |= tokens
        elif isinstance(tokens, list) and len(tokens) <= MOST_ADDED:
            extra = [_content(name, token, path) for token in tokens] or extra
        elif tokens is not None:
            raise _wrong(path, name, f"a list of at most {MOST_ADDED} tokens", tokens)
    named = {name: token for name, token in named.items() if name.endswith("_token")}
    if len(named) > MOST_ADDED:
        raise ValueError(f"{shown(str(path))} names more than {MOST_ADDED} special tokens")
    # Options such as add_bos_token are called like tokens, and say yes or no.
    tokens = {n: _content(n, t, path) for n, t in named.items() if t and t is not True}
    return tokens, extra


def _content(name: str, token: Any, path: Path) -> str:
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str) or not 0 < len(content) <= LONGEST_TOKEN:
        raise _wrong(path, name, f"a token of at most {LONGEST_TOKEN} characters", token)
    return content


def _max_length(value: Any, path: Path) -> int | None:
    """`model_max_length`, which may be written as a float; None where none is known."""
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise _wrong(path, "model_max_length", "a positive number", value)
    return UNLIMITED if value == math.inf or value >= UNLIMITED else int(value) or 1


def _wrong(path: Path, name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{shown(str(path))}: {shown(name)} must be {wanted}, got {quoted(value)}")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
