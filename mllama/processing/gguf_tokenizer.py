"""The tokenizer and the chat template that a GGUF file holds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mllama.checkpoints.gguf.container import GgufFile
from mllama.checkpoints.gguf.files import is_projector
from mllama.processing.encoders import failures_named
from mllama.processing.published_template import PUBLISHED_TEMPLATE
from mllama.processing.templates import Templates
from mllama.processing.tiktoken import llama3_tokenizer
from mllama.processing.tokenizer_parts import LONGEST_TOKEN, MOST_ADDED, MOST_TOKENS
from mllama.wording import quoted, shown

logger = logging.getLogger("mllama")

# llama.cpp knows a tokenizer by what it makes of a text. Llama 3.2 Vision's, a token larger than Llama 3's,
# it took for Smaug's, which splits words alike: so it stands in the files that Ollama published.
_SPLITTERS = ("llama-bpe", "smaug-bpe")
_NORMAL, _USER_DEFINED = 1, 4
_IMAGE = "<|image|>"
_TEMPLATE = "tokenizer.chat_template"
_NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}


def read_gguf_tokenizer(path: Path) -> dict[str, Any]:
    """The arguments of the tokenizer in a file.

    Raises: ValueError naming the file and the entry.
    """
    file = GgufFile(path)
    if is_projector(file):
        raise ValueError(
            f"{file.name} is a projector file, which has no tokenizer: give the text model's file"
        )
    _expect(file, "tokenizer.ggml.model", ("gpt2",))
    _expect(file, "tokenizer.ggml.pre", _SPLITTERS)
    tokens, kinds, merges = (
        file.array(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    problem = _problem(tokens, kinds, merges)
    if problem is not None:
        raise ValueError(f"{file.name} holds no tokenizer: {problem}")
    special = {}
    for name, key in _NAMES.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            special[name] = _token(file, f"tokenizer.ggml.{key}_token_id", index, tokens)
    length = file.metadata.get("mllama.context_length")
    limit = {"model_max_length": length} if type(length) is int and length > 0 else {}
    adds_first = file.metadata.get("tokenizer.ggml.add_bos_token", True)
    first = special.get("bos_token") if adds_first else None
    return {
        "backend": _backend(file, tokens, kinds, merges, first),
        "special_tokens": special,
        "extra_special_tokens": [],
        "chat_template": _template(file),
        "name": shown(str(path)),
        **limit,
    }


def _backend(
    file: GgufFile, tokens: list[Any], kinds: list[Any], merges: list[Any], first: str | None
) -> Tokenizer:
    words = _words(kinds)
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(tokens[words:], kinds[words:])
    ]
    vocabulary = {token: index for index, token in enumerate(tokens[:words])}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not all(piece in vocabulary for piece in (*pair, "".join(pair))):
            raise ValueError(
                f"{file.name} holds no tokenizer: the merge {quoted(' '.join(pair))} is none of two words of "
                "the vocabulary to a third"
            )
    with failures_named(f"{file.name} holds no tokenizer"):
        return llama3_tokenizer(vocabulary, pairs, added, first)


def _words(kinds: list[int]) -> int:
    """How many tokens are words, before the first that is none."""
    return next((i for i, kind in enumerate(kinds) if kind != _NORMAL), len(kinds))


def _problem(tokens: list[Any], kinds: list[Any], merges: list[Any]) -> str | None:
    """What is wrong with the lists of a vocabulary."""
    if not tokens or not all(isinstance(token, str) for token in (*tokens, *merges)):
        return "tokenizer.ggml.tokens and merges must be lists of strings"
    if len(kinds) != len(tokens) or not all(type(kind) is int for kind in kinds):
        return f"tokenizer.ggml.token_type must have a number for each of {len(tokens)} tokens"
    words = _words(kinds)
    if len(tokens) > MOST_TOKENS or len(tokens) - words > MOST_ADDED:
        return f"it has {len(tokens)} tokens; at most {MOST_TOKENS} are read, {MOST_ADDED} of them special"
    if any(kind == _NORMAL for kind in kinds[words:]):
        return "its special tokens do not follow the words, as those of Llama 3 do"
    if len(set(tokens)) != len(tokens) or not all(0 < len(t) <= LONGEST_TOKEN for t in tokens):
        return f"its tokens must be different ones of at most {LONGEST_TOKEN} characters"
    return None


def _token(file: GgufFile, key: str, index: Any, tokens: list[str]) -> str:
    if type(index) is not int or not 0 <= index < len(tokens):
        raise ValueError(
            f"{file.name}: {key} must be a token below {len(tokens)}, got {quoted(index)}"
        )
    return tokens[index]


def _expect(file: GgufFile, key: str, known: tuple[str, ...]) -> None:
    found = file.metadata.get(key)
    if found not in known:
        raise ValueError(
            f"{file.name}: {key} is {quoted(found)}; only {', '.join(known)} is read. Pass tokenizer= with "
            "that of the checkpoint the weights come from"
        )


def _template(file: GgufFile) -> Templates:
    """The templates of a file; the published one where it has none, or none that writes images."""
    stored = file.metadata.get(_TEMPLATE)
    named = {
        key[len(_TEMPLATE) + 1 :]: value
        for key, value in file.metadata.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(value, str)
    }
    if not isinstance(stored, str) or _IMAGE not in stored:
        logger.info("%s has no chat template for images: using that of Llama 3.2 Vision", file.name)
        stored = PUBLISHED_TEMPLATE
    return {"default": stored, **named} if named else stored
