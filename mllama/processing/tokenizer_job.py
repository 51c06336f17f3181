"""The job of the process that tokenizers with unknown parts run in: only `tokenizers`, see `encoders`.

It is run by `mllama.confined`, by its path. Where a tokenizer crashes the process, the parent hears of it.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread could not be started

from tokenizers import Tokenizer

_KEPT = 2
_LONGEST_MESSAGE = 300
_loaded: OrderedDict[tuple[str, bool], Tokenizer] = OrderedDict()


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a tokenizer makes of texts or ids.

    Args:
        request: "key" of a tokenizer and whether it reads special tokens as "plain" text; "file", its JSON,
            once; "texts" to encode, with "special" tokens around them or not; or "ids" to decode, "skip"ping
            special ones.
    Returns: {"ok": true} with JSON: rows of [ids, type ids, mask of special tokens, begins, ends], or the
        text; {"needs": "file"}; or {"error": reason}.
    """
    try:
        tokenizer = _tokenizer(request)
        if tokenizer is None:
            return {"needs": "file"}, ""
        if "texts" in request:
            special = request["special"]
            made = [tokenizer.encode(t, add_special_tokens=special) for t in request["texts"]]
            return {"ok": True}, json.dumps([_columns(encoding) for encoding in made])
        if "ids" in request:
            text = tokenizer.decode(request["ids"], skip_special_tokens=request["skip"])
            return {"ok": True}, json.dumps(text)
        return {"ok": True}, ""
    except MemoryError:
        raise
    except BaseException as error:  # a panic of Rust's is no Exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": lines[0][:_LONGEST_MESSAGE]}, ""


def _tokenizer(request: dict[str, Any]) -> Tokenizer | None:
    key = (request["key"], request["plain"])
    if key not in _loaded:
        if "file" not in request:
            return None
        tokenizer = Tokenizer.from_str(request["file"])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = request["plain"]
        _loaded[key] = tokenizer
        while len(_loaded) > _KEPT:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    return _loaded[key]


def _columns(encoding: Any) -> list[list[int]]:
    offsets = encoding.offsets
    return [
        encoding.ids,
        encoding.type_ids,
        encoding.special_tokens_mask,
        [begin for begin, _ in offsets],
        [end for _, end in offsets],
    ]
