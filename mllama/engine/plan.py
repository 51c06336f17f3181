"""What one step computes: small immutable data that can be pickled, the same for every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields

# In the place of a token that is not known on the host: the one its sequence sampled in the step before.
PENDING = -1


@dataclass(frozen=True)
class Limits:
    """What a step and a sequence may be.

    Attributes:
        max_batch_tokens: tokens of a step.
        max_batch_size: sequences that hold pages.
        max_prefills: prompts in work at once.
        max_new_pictures: pictures through the vision tower in a step.
        max_length: tokens of a sequence.
    """

    max_batch_tokens: int
    max_batch_size: int
    max_prefills: int
    max_new_pictures: int
    max_length: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ValueError(
                    f"{entry.name} must be at least 1, got {getattr(self, entry.name)}"
                )
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} must be at least max_batch_size="
                f"{self.max_batch_size}: every running sequence decodes a token in each step"
            )


@dataclass(frozen=True)
class Encode:
    """A picture that passes the vision tower, and its keys and values the cross-attention layers, before the
    text of the step is read.

    Attributes:
        key: its identity.
        slots: for its tiles.
        sequence, index: whose picture it is, and which.
    """

    key: bytes
    slots: tuple[int, ...]
    sequence: int
    index: int


@dataclass(frozen=True)
class Row:
    """The tokens of one sequence that are read.

    Attributes:
        sequence: its id.
        tokens: their ids, or PENDING.
        start: the position of the first, which is also how many tokens its pages hold before.
        pages: with room for all tokens up to the last of these.
        tiles: the slots that the sequence may see.
        sights: runs of tokens that see the same: how many, and which half-open range of ``tiles``; an empty
            range where the mask shows no picture, and the semantics say what that means.
        sample_step: where the token after the last of these is sampled, how many the answer has before it;
            None: it is not.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    tiles: tuple[int, ...]
    sights: tuple[tuple[int, int, int], ...]
    sample_step: int | None


@dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
        number: counts the steps.
        encodes: new pictures.
        rows: those that decode first, then chunks of prompts.
        num_decoding: how many decode.
    """

    number: int
    encodes: tuple[Encode, ...]
    rows: tuple[Row, ...]
    num_decoding: int

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def is_empty(self) -> bool:
        return not self.rows and not self.encodes

    @property
    def has_pending(self) -> bool:
        """Whether it reads what the step before has sampled."""
        return any(row.tokens[-1] == PENDING for row in self.rows)


def places_of(plan: Plan) -> dict[int, int]:
    """By sequence, the place of its token among those that a step samples."""
    sampled = [row.sequence for row in plan.rows if row.sample_step is not None]
    return {sequence: place for place, sequence in enumerate(sampled)}
