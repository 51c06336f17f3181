"""Texts to rows of tokens: whole, or in pieces so that special tokens in them stay plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tokenizers import Encoding, Tokenizer


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
    def of(cls, encoding: Encoding, start: int = 0) -> Row:
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


def whole_rows(backend: Tokenizer, texts: Sequence[str], add_special_tokens: bool) -> list[Row]:
    """Rows of texts in which special tokens are recognised."""
    return [Row.of(e) for e in backend.encode_batch(texts, add_special_tokens=add_special_tokens)]


def pieced_rows(
    backend: Tokenizer,
    plain: Tokenizer,
    texts: Sequence[str],
    add_special_tokens: bool,
    special: Sequence[str],
    mark: str,
) -> list[Row]:
    """Rows of texts in which some special tokens are plain text.

    A text is cut at the special tokens that are to be recognised, as the backend itself cuts it, so that
    what is between them has the ids it always has.

    Args:
        backend, plain: the tokenizer, and its copy that reads special tokens as text.
        special: special tokens that are recognised.
        mark: left out of the text; a special token that it stands in is not recognised. "" for none.
    """
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    before, after = _added(backend) if add_special_tokens else (Row(), Row())
    rows = []
    for text in texts:
        # Every second piece is a special token.
        pieces = re.split(f"({pattern})", text) if pattern else [text]
        row, start = before.part(range(len(before.input_ids))), 0
        for number, piece in enumerate(pieces):
            words = piece.replace(mark, "") if mark else piece
            if words:
                encoder = backend if number % 2 else plain
                row.extend(Row.of(encoder.encode(words, add_special_tokens=False), start))
            start += len(words)
        row.extend(after)
        rows.append(row)
    return rows


def _added(backend: Tokenizer) -> tuple[Row, Row]:
    """What the tokenizer puts before and behind a text."""
    row = whole_rows(backend, ["a"], True)[0]
    mask = row.special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    last = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
    return row.part(range(first)), row.part(range(last, len(mask)))
