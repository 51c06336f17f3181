"""Texts to rows of tokens: whole, or in pieces where special tokens in them stay plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Encoding

from mllama.processing.encoders import Encoded, Encoder


@dataclass
class Row:
    """The tokens of one text.

    Attributes:
        input_ids, token_type_ids: of the tokens.
        special_tokens_mask: 1 for those that the tokenizer added around the text.
        offset_mapping: (begin, end) of each in its text.
    """

    input_ids: list[int] = field(default_factory=list)
    token_type_ids: list[int] = field(default_factory=list)
    special_tokens_mask: list[int] = field(default_factory=list)
    offset_mapping: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, encoding: Encoding | Encoded, start: int = 0) -> Row:
        """The tokens of a piece of the text that begins at `start`."""
        offsets = [(begin + start, end + start) for begin, end in encoding.offsets]
        return cls(encoding.ids, encoding.type_ids, encoding.special_tokens_mask, offsets)

    def part(self, places: Iterable[int]) -> Row:
        """A copy with the tokens at these places."""
        places = list(places)
        columns = (
            self.input_ids,
            self.token_type_ids,
            self.special_tokens_mask,
            self.offset_mapping,
        )
        return Row(*([column[i] for i in places] for column in columns))

    def extend(self, other: Row) -> None:
        """Add the tokens of another row."""
        self.input_ids += other.input_ids
        self.token_type_ids += other.token_type_ids
        self.special_tokens_mask += other.special_tokens_mask
        self.offset_mapping += other.offset_mapping

    def truncated(self, length: int, side: str) -> Row:
        """The row without the text's last (or first) tokens; what was added around it counts and stays.

        Raises: ValueError when there is no room for that.
        """
        total = len(self.input_ids)
        if total <= length:
            return self
        added = sum(self.special_tokens_mask)
        if length < added:
            raise ValueError(f"max_length {length} has no room for the {added} special tokens")
        text = [i for i in range(total) if not self.special_tokens_mask[i]]
        kept = set(
            text[: length - added] if side == "right" else text[len(text) - length + added :]
        )
        return self.part(i for i in range(total) if i in kept or self.special_tokens_mask[i])


def whole_rows(encoder: Encoder, texts: Sequence[str], add_special_tokens: bool) -> list[Row]:
    """Rows of texts in which special tokens are recognised."""
    return [Row.of(encoding) for encoding in encoder.encode_batch(texts, add_special_tokens)]


def plain_rows(
    encoder: Encoder,
    plain: Encoder,
    texts: Sequence[str],
    add_special_tokens: bool,
    special: Mapping[str, int],
    split: bool,
    mark: str,
) -> list[Row]:
    """Rows of texts in which some special tokens are plain text.

    A text without such is tokenized as it is, so that its ids are the ones it always has. Another is cut at
    the special tokens that are to be recognised, and each piece is tokenized by itself.

    Args:
        encoder, plain: the tokenizer, and its copy that reads special tokens as text.
        special: ids of all special tokens.
        split: recognise none of them.
        mark: left out of the text; a special token that it stands in is not recognised. "" for none.
    Raises: ValueError for a tokenizer that makes special tokens of plain text.
    """
    pattern = None if split else _pattern(special, mark)
    cut = [_cut(text, pattern, special, mark) for text in texts]
    rows = whole_rows(encoder, ["".join(words for words, _ in p) for p in cut], add_special_tokens)
    for i, pieces in enumerate(cut):
        if _has_others(rows[i], pieces, special):
            rows[i] = _pieced(encoder, plain, pieces, add_special_tokens)
            if _has_others(rows[i], pieces, special):
                raise ValueError("this tokenizer makes special tokens of plain text")
    return rows


# A piece of a text without marks, and its id if it is a special token.
_Piece = tuple[str, "int | None"]


def _pattern(special: Mapping[str, int], mark: str) -> re.Pattern[str] | None:
    tokens = sorted(filter(None, special), key=len, reverse=True)
    # A mark cannot stand inside a single character: there it stands after it.
    unmarked = f"(?!{re.escape(mark)})" if mark else ""
    alternatives = [re.escape(t) + (unmarked if len(t) == 1 else "") for t in tokens]
    return re.compile(f"({'|'.join(alternatives)})") if alternatives else None


def _cut(
    text: str, pattern: re.Pattern[str] | None, special: Mapping[str, int], mark: str
) -> list[_Piece]:
    pieces = pattern.split(text) if pattern else [text]  # every second one is a special token
    return [
        (piece, special[piece]) if i % 2 else (piece.replace(mark, "") if mark else piece, None)
        for i, piece in enumerate(pieces)
    ]


def _has_others(row: Row, pieces: Sequence[_Piece], special: Mapping[str, int]) -> bool:
    """Whether a row has special tokens in other places than the text's own."""
    places, start = [], 0
    for words, token in pieces:
        if token is not None:
            places.append((start, token))
        start += len(words)
    ids, own = set(special.values()), iter(places)
    for token, added, (begin, end) in zip(
        row.input_ids, row.special_tokens_mask, row.offset_mapping
    ):
        # Some take in the blanks around them, and begin or end with those.
        if not added and token in ids:
            if not any(known == token and begin <= place < end for place, known in own):
                return True
    return False


def _pieced(
    encoder: Encoder, plain: Encoder, pieces: Sequence[_Piece], add_special_tokens: bool
) -> Row:
    before, after = _added(encoder) if add_special_tokens else (Row(), Row())
    row, start = before, 0
    for words, token in pieces:
        if words:
            chosen = plain if token is None else encoder
            row.extend(Row.of(chosen.encode_batch([words], False)[0], start))
        start += len(words)
    row.extend(after)
    return row


def _added(encoder: Encoder) -> tuple[Row, Row]:
    """What the tokenizer puts before and after a text."""
    row = whole_rows(encoder, ["a"], True)[0]
    mask = row.special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    last = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
    return row.part(range(first)), row.part(range(last, len(mask)))
