"""Meta's tokenizer.model as a `tokenizers.Tokenizer` with the ids of the published tokenizer.json."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mllama.files import FileRefused, read_regular
from mllama.processing.tokenizer_parts import LONGEST_FILE, LONGEST_TOKEN, MOST_TOKENS

# Llama 3's words, numbers of up to three digits, punctuation and blanks (public in Meta's tokenizer.py).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIRST = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_RESERVED = 256  # special tokens after the words; the image token is the first row after them
NAMED_TOKENS = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "pad_token": "<|finetune_right_pad_id|>",
}
MAX_LENGTH = 131072
_MOST_BYTES = (
    2**22
)  # of all tokens together, each of which is cut at every byte; Llama 3 has 0.9 million


def read_tiktoken(path: Path) -> Tokenizer:
    """The tokenizer of a file with one token (base64) and its rank per line.

    Raises: ValueError naming the file and the line.
    """
    ranks = _ranks(path)
    letters = _byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in ranks:  # in the order of their ranks
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in parts if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[a], names[b]) for a, b in known]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    reserved = [f"<|reserved_special_token_{i + 2}|>" for i in range(_RESERVED - len(_FIRST))]
    special = [*_FIRST, *reserved, "<|image|>"]
    added = [AddedToken(token, normalized=False, special=True) for token in special]
    return llama3_tokenizer(vocabulary, merges, added, _FIRST[0])


def llama3_tokenizer(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: list[AddedToken],
    first: str | None,
) -> Tokenizer:
    """Byte-level pair encoding as Llama 3's.

    Args:
        vocabulary: ids of words in byte letters, counted from 0 without gaps.
        merges: of words of the vocabulary to words of it.
        added: tokens whose ids follow the vocabulary's.
        first: the one of them that is put in front of a text, if any.
    """
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    byte_level = processors.ByteLevel(trim_offsets=True)
    if first is None:
        tokenizer.post_processor = byte_level
        return tokenizer
    bos = (first, tokenizer.token_to_id(first))
    tokenizer.post_processor = processors.Sequence(
        [
            byte_level,
            processors.TemplateProcessing(
                single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[bos]
            ),
        ]
    )
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        lines = read_regular(path, LONGEST_FILE).splitlines()
    except FileRefused as error:
        raise ValueError(f"{path} is not a tiktoken file: {error}") from None
    if len(lines) > MOST_TOKENS:
        raise ValueError(
            f"{path} is not a tiktoken file: it has {len(lines)} lines; at most {MOST_TOKENS} are read"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not 0 < len(token) <= LONGEST_TOKEN:
                raise ValueError
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path} is not a tiktoken file: line {number} is not a base64 token "
                f"and its rank, or the token has more than {LONGEST_TOKEN} bytes"
            ) from None
    total = sum(map(len, ranks))
    if total > _MOST_BYTES:
        raise ValueError(
            f"{path} is not a tiktoken file: its tokens have {total} bytes; at most {_MOST_BYTES} are read"
        )
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(
            f"{path} is not a tiktoken file: its ranks do not count from 0 without gaps"
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: itself if printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
