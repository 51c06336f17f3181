"""A request and its sequences: their text, what each token sees, and how much of it is computed."""

from __future__ import annotations

from collections.abc import Sequence as Entries
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from mllama.engine.pages import StoredPicture
from mllama.engine.prefix import Scope, next_key
from mllama.wording import quoted

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt.

    Attributes:
        key: its identity, the SHA-256 of the preprocessed pixels and the aspect ratio.
        position: of its image token.
        num_tiles: slots it takes: real tiles, or all of them where image-less rows attend to padded ones.
    """

    key: bytes
    position: int
    num_tiles: int


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        tokens: of the prompt.
        pictures: one for each image token of the prompt, in its order.
        max_new_tokens: of each answer.
        stop_token_ids: the tokens that end an answer.
        copies: answers to the same prompt.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    pictures: tuple[Picture, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    copies: int = 1

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt has no token")
        for name in ("max_new_tokens", "copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        places = [picture.position for picture in self.pictures]
        if places != sorted(set(places)) or not all(0 <= p < len(self.tokens) for p in places):
            raise ValueError(
                f"pictures must be at rising positions of a prompt of {len(self.tokens)} tokens, got "
                f"{quoted(places)}"
            )
        if any(picture.num_tiles < 1 for picture in self.pictures):
            tiles = [picture.num_tiles for picture in self.pictures]
            raise ValueError(f"each picture must have at least one tile, got {quoted(tiles)}")


class State(Enum):
    """Where a sequence stands. WAITING ones hold no page; a preempted one is waiting again."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One answer to a request.

    Attributes:
        id: numbers in the order of arrival.
        group: the id of the request's first sequence.
        text: the tokens of the prompt, and those generated that are known here.
        pending: sampled tokens that are not known here yet.
        stored: tokens whose keys and values are in the pages, after the steps that are planned.
        pages: those that hold them, in the order of the text.
        first_picture: the pictures from this one on are held, those before are seen by no token to compute.
        held: the pictures that are held.
        cached_tokens: how many tokens of the prompt the prefix index had at first; None before.
        num_offered: pages that the prefix index has been offered.
    """

    def __init__(self, request: Request, sequence_id: int, group: int, scope: Scope) -> None:
        self.request, self.id, self.group = request, sequence_id, group
        self.state = State.WAITING
        self.text = list(request.tokens)
        self.pending = 0
        self.finish_reason: FinishReason | None = None
        self.cached_tokens: int | None = None
        self.forget_stored()
        self._leaks = scope.semantics.imageless_rows == "leak"
        self._is_blind = scope.answers_are_blind(len(request.pictures))
        self._keys = [scope.root([picture.key for picture in request.pictures])]
        self._spans = _spans(request.pictures)
        if self._is_blind:
            self._spans.append((self.prompt_length, 0, 0))

    def forget_stored(self) -> None:
        """Nothing is computed, and nothing is held."""
        self.pages: list[int] = []
        self.held: list[StoredPicture] = []
        self.stored = self.first_picture = self.num_offered = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def num_new(self) -> int:
        """Generated tokens, those included that are not known here yet."""
        return len(self.text) + self.pending - self.prompt_length

    @property
    def num_shareable(self) -> int:
        """How many tokens' keys and values depend on nothing but what the page keys say."""
        return self.prompt_length if self._is_blind else len(self.text)

    def page_keys(self, count: int, page_size: int) -> list[bytes]:
        """The keys of the first ``count`` pages, which the text fills."""
        for page in range(len(self._keys) - 1, count):
            begin, end = page * page_size, (page + 1) * page_size
            inside = [
                (p.position, p.key) for p in self.request.pictures if begin <= p.position < end
            ]
            self._keys.append(next_key(self._keys[-1], begin, self.text[begin:end], inside))
        return self._keys[1 : count + 1]

    def first_seen(self, start: int) -> int:
        """The first picture that any token from ``start`` on sees; all after it are seen as well."""
        spans = self._spans_from(start)
        if self._leaks and any(begin == end for _, begin, end in spans):
            return 0
        return min(
            (begin for _, begin, end in spans if begin < end), default=len(self.request.pictures)
        )

    def needed_from(self, picture: int) -> int:
        """The position of the first token that sees a picture."""
        return 0 if self._leaks else self.request.pictures[picture].position

    def sights(self, start: int, count: int) -> tuple[tuple[int, int, int], ...]:
        """What ``count`` tokens see, as runs: how many tokens, and the half-open range of the tiles that are
        held; an empty range where the mask shows no picture."""
        bounds = [0]
        for picture in self.held:
            bounds.append(bounds[-1] + len(picture.slots))
        spans, runs = self._spans_from(start), []
        ends = [position for position, _, _ in spans[1:]] + [start + count]
        for (position, begin, end), until in zip(spans, ends):
            length = min(until, start + count) - max(position, start)
            if length > 0:
                tiles = (0, 0)
                if begin < end:
                    tiles = (bounds[begin - self.first_picture], bounds[end - self.first_picture])
                runs.append((length, *tiles))
        return tuple(runs)

    def _spans_from(self, start: int) -> list[tuple[int, int, int]]:
        """The spans that hold tokens from ``start`` on."""
        ends = [position for position, _, _ in self._spans[1:]] + [None]
        return [span for span, end in zip(self._spans, ends) if end is None or end > start]


def _spans(pictures: Entries[Picture]) -> list[tuple[int, int, int]]:
    """From which position on tokens see which half-open range of the pictures: those of the latest group of
    adjacent image tokens, see :mod:`mllama.processing.image_spans`."""
    spans, first, last = [(0, 0, 0)], 0, None
    for index, picture in enumerate(pictures):
        if last is None or picture.position > last + 1:
            first = index
        last = picture.position
        spans.append((picture.position, first, index + 1))
    return spans
