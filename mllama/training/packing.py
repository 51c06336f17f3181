"""Several conversations in a row of the batch, so that little of it is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from mllama.loss import IGNORED

from .encoding import Example


def packed(examples: Sequence[Example], length: int) -> list[Example]:
    """Rows of at most so many tokens, each of the conversations that fill it best.

    The longest go first, each into the row that it leaves the least room in; a row has them in the order of
    the file. No conversation is cut, and none sees another: positions begin again with each.

    Args:
        examples: of one file, none longer than ``length``.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of a row, and which it is, in ascending order
    longest = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    for number in longest:
        count = len(examples[number].input_ids)
        place = bisect_left(room, (count, 0))
        if place == len(room):
            rows.append([number])
            insort(room, (length - count, len(rows) - 1))
        else:
            left, row = room.pop(place)
            rows[row].append(number)
            insort(room, (left - count, row))
    return [_joined([examples[i] for i in sorted(row)]) for row in sorted(rows, key=min)]


def _joined(examples: list[Example]) -> Example:
    return Example(
        line=examples[0].line,
        input_ids=[token for e in examples for token in e.input_ids],
        # The first token of a conversation follows from nothing, least of all from the one before.
        labels=[label for e in examples for label in (IGNORED, *e.labels[1:])],
        images=[image for e in examples for image in e.images],
        folder=examples[0].folder,
        texts=tuple(len(e.input_ids) for e in examples),
    )
