"""What a tokenizer.json consists of: bounded sizes, and whether all its parts are known to be harmless.

Known are the patterns of published tokenizers, which take time in proportion to the text, and parts without a
pattern that make texts at most a few times longer. What runs where stands in `encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllama.strict_json import parse_json
from mllama.wording import quoted, reason

LONGEST_FILE = 64 * 2**20  # bytes; the largest that are published have half of it
_MOST_LISTS, _MOST_COMMAS = 2**21, 2**23
MOST_TOKENS, MOST_ADDED, LONGEST_TOKEN = 2**20, 2**16, 512
_MOST_ADDED_TEXT = 2**20  # characters together, of which an automaton is made with a state for each
_LARGEST_ID = 2 * MOST_TOKENS  # there may be holes among the ids
_MOST_PARTS, _DEEPEST = 64, 8
_MOST_GROWTH = 32.0  # of a text by all normalizers together; Unicode's own is at most 18
_LONGEST_INSERT = 64
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d"
_LETTERS = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_SPACED = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = frozenset(
    (
        # Llama 3; the same with single digits (Qwen 2), and with possessive repeats (cl100k)
        rf"(?i:{_WORD})|{_SPACED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
        rf"(?i:{_WORD})|{_SPACED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
        # o200k, Llama 4
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LETTERS}]+(?i:{_WORD})?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LETTERS}]*(?i:{_WORD})?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",
        # GPT-2
        rf"{_WORD}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
        # Digits, blanks and words, as converters write them
        r"\d",
        r"\d+",
        r"\d{1,3}",
        r"\p{N}",
        r"\p{N}+",
        r"\p{N}{1,3}",
        r"[0-9]",
        r"[0-9][0-9][0-9]",
        r"\s+",
        r"[\r\n]",
        r"\w+|[^\w\s]+",
        r" ",
    )
)
_PLAIN = {
    "normalizer": "NFC NFD NFKC NFKD Lowercase StripAccents Strip ByteLevel",
    "pre_tokenizer": "ByteLevel Digits Whitespace WhitespaceSplit Punctuation Metaspace BertPreTokenizer",
    "decoder": "ByteLevel ByteFallback Fuse Metaspace WordPiece BPEDecoder",
    "post_processor": "ByteLevel BertProcessing RobertaProcessing",
}
_INSIDE = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def all_known(file: bytes) -> bool:
    """Whether a tokenizer.json has only known parts.

    Raises: ValueError with the reason for what is not JSON, and for more tokens, merges or parts than any
        tokenizer has.
    """
    for sign, most, what in ((b"[", _MOST_LISTS, "lists"), (b",", _MOST_COMMAS, "entries")):
        count = file.count(sign)
        if count > most:
            raise ValueError(f"it has {count} {what}; at most {most} are read")
    try:
        data = parse_json(file.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: byte {error.start} cannot be decoded") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {reason(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__} and no tokenizer")
    _check_tokens(data)
    seen = _Seen()
    return all(
        [
            *(seen.known(data.get(kind), kind, 0) for kind in _PLAIN),
            seen.growth <= _MOST_GROWTH,
            _is_plain_model(data.get("model")),
        ]
    )


class _Seen:
    """A walk through the parts: how many there are, and by what factor they lengthen a text."""

    def __init__(self) -> None:
        self.parts, self.growth = 0, 1.0

    def known(self, part: Any, kind: str, depth: int) -> bool:
        """Whether a part and those inside are known. Raises: ValueError for too many."""
        if part is None:
            return True
        self.parts += 1
        if self.parts > _MOST_PARTS or depth > _DEEPEST:
            raise ValueError(
                f"its {kind} has more than {_MOST_PARTS} parts, or {_DEEPEST} inside each other"
            )
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            return False
        name = part["type"]
        if name == "Sequence":
            inside = part.get(_INSIDE[kind])
            return isinstance(inside, list) and all(
                [self.known(one, kind, depth + 1) for one in inside]
            )
        if name in _PLAIN[kind].split():
            self.growth *= 18.0 if name.startswith("NFK") else 3.0 if name[:2] == "NF" else 1.0
            return True
        special = _SPECIAL.get((kind, name))
        return special is not None and special(self, part)

    def replace(self, part: Mapping[str, Any]) -> bool:
        pattern, content = _pattern(part), part.get("content")
        if pattern is None or not isinstance(content, str):
            return False
        self.growth *= max(1.0, len(content) / (len(pattern[1]) if pattern[0] == "String" else 1))
        return _is_known(pattern)

    def split(self, part: Mapping[str, Any]) -> bool:
        pattern = _pattern(part)
        return pattern is not None and _is_known(pattern)

    def prepend(self, part: Mapping[str, Any]) -> bool:
        text = part.get("prepend")
        return isinstance(text, str) and len(text) <= _LONGEST_INSERT

    def strip(self, part: Mapping[str, Any]) -> bool:
        return all(type(part.get(k)) is int and 0 <= part[k] <= 1 for k in ("start", "stop"))

    def template(self, part: Mapping[str, Any]) -> bool:
        pieces = [part.get(name) for name in ("single", "pair", "special_tokens")]
        if not all(isinstance(p, (list, dict)) and len(p) <= _LONGEST_INSERT for p in pieces):
            return False
        if sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces[0]) > 1:
            return False  # the text would be there twice
        tokens = pieces[2].values() if isinstance(pieces[2], dict) else [None]
        return all(
            isinstance(t, dict)
            and isinstance(t.get("ids"), list)
            and isinstance(t.get("tokens"), list)
            and 0 < len(t["ids"]) == len(t["tokens"]) <= _LONGEST_INSERT
            for t in tokens
        )


_SPECIAL: dict[tuple[str, str], Callable[[_Seen, Mapping[str, Any]], bool]] = {
    ("normalizer", "Replace"): _Seen.replace,
    ("decoder", "Replace"): _Seen.replace,
    ("normalizer", "Prepend"): _Seen.prepend,
    ("pre_tokenizer", "Split"): _Seen.split,
    ("decoder", "Strip"): _Seen.strip,
    ("post_processor", "TemplateProcessing"): _Seen.template,
}


def _pattern(part: Mapping[str, Any]) -> tuple[str, str] | None:
    """("Regex" or "String", what it matches); None for neither, or for an empty one."""
    pattern = part.get("pattern")
    if not isinstance(pattern, Mapping) or len(pattern) != 1:
        return None
    [(kind, text)] = pattern.items()
    return (kind, text) if isinstance(text, str) and text else None


def _is_known(pattern: tuple[str, str]) -> bool:
    return pattern[1] in KNOWN_PATTERNS if pattern[0] == "Regex" else pattern[0] == "String"


def _is_plain_model(model: Any) -> bool:
    # The other models look for words in time that grows with the square of a number in the file.
    return isinstance(model, Mapping) and (
        model.get("type") in ("BPE", "WordLevel")
        or (model.get("type") is None and "merges" in model)
    )


def _check_tokens(data: dict[str, Any]) -> None:
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, (dict, list)) and len(vocabulary) > MOST_TOKENS:
        raise ValueError(f"it has {len(vocabulary)} tokens; at most {MOST_TOKENS} are read")
    if isinstance(vocabulary, dict):
        for token, index in vocabulary.items():
            if len(token) > LONGEST_TOKEN:
                raise _too_long(token)
            # The library goes through all ids up to the largest when it writes a tokenizer.
            if isinstance(index, (int, float)) and index > _LARGEST_ID:
                raise ValueError(
                    f"its token {quoted(token)} has id {quoted(index)}; at most {_LARGEST_ID} is read"
                )
    added = data.get("added_tokens")
    if isinstance(added, list):
        if len(added) > MOST_ADDED:
            raise ValueError(f"it has {len(added)} added tokens; at most {MOST_ADDED} are read")
        contents = [token.get("content") for token in added if isinstance(token, dict)]
        contents = [content for content in contents if isinstance(content, str)]
        for content in contents:
            if len(content) > LONGEST_TOKEN:
                raise _too_long(content)
        if (count := sum(map(len, contents))) > _MOST_ADDED_TEXT:
            raise ValueError(
                f"its added tokens have {count} characters; at most {_MOST_ADDED_TEXT} are read"
            )


def _too_long(token: str) -> ValueError:
    return ValueError(
        f"its token {quoted(token)} has {len(token)} characters; at most {LONGEST_TOKEN} are read"
    )
