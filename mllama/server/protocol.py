"""What the server asks of an engine: plain data, and nothing of HTTP.

An engine may run in a thread of its own; it is called on the event loop, and what it gives arrives there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mllama.engine.interface import Constraint, Options, Piece, State, Stats


@dataclass(frozen=True)
class Picture:
    """A picture's file as it was sent, not yet opened.

    Attributes:
        place: where the request names it, for a refusal: "messages[0].content[1]".
    """

    data: bytes
    place: str


@dataclass(frozen=True)
class Work:
    """One request to the engine: either messages or a prompt.

    Attributes:
        key: names it to `Engine.cancel`; unique in the process.
        messages: as templates take them, text parts and {"type": "image"}; the words in them are plain text.
        prompt: a text whose special tokens are plain text too, or token ids.
        pictures: in the order of the image parts.
        tools: functions for the template to write.
        constraint: of each of the answers, at its beginning; None: they are free. Options ask for no least
            length beside it, and where it is complete the answer ends.
    """

    key: str
    options: Options
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    pictures: tuple[Picture, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    constraint: Constraint | None = None


class Engine(Protocol):
    """What answers."""

    async def submit(self, work: Work) -> AsyncIterator[Piece]:
        """Check, prepare and queue a request, off the event loop where that takes time.

        Returns: its pieces as they come, ending with one that has `usage`. A reader that closes the
            iterator or is cancelled ends the work as `cancel` does.
        Raises: Refused before anything is queued; Overloaded; Unavailable. The iterator raises WorkFailed.
        """
        ...

    def cancel(self, key: str) -> None:
        """End a request before the next step; one that is unknown or has ended is left as it is.

        It also holds for a request whose `submit` has not come back.
        """
        ...

    def health(self) -> State:
        """Whether requests are answered, at once."""
        ...

    def stats(self) -> Stats:
        """What has been counted, at once."""
        ...
