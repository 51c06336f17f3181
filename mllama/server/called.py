"""The pieces of answers that may call functions, with calls where their text was one."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from mllama.engine.interface import Piece, Token, ToolCall
from mllama.server.call_reader import CallReader, Read


@dataclass(frozen=True)
class ToolUse:
    """The functions that may be called, and whether one has to be.

    Attributes:
        tools: as the template takes them, {"type": "function", "function": {...}}.
        choice: "auto", "required", or "named": the one under `name` is called once.
        strict: what begins like a call has to be one, with arguments of its function's schema.
    """

    tools: tuple[Mapping[str, Any], ...]
    choice: Literal["auto", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True
    strict: bool = False

    @property
    def several(self) -> bool:
        """Whether an answer may hold more than one call."""
        return self.parallel and self.choice != "named"


async def with_calls(pieces: AsyncIterator[Piece], use: ToolUse) -> AsyncIterator[Piece]:
    """What an engine gives, read for calls.

    An answer that ends by its length inside a call has what there is of it as text, and that reason.
    """
    answers: dict[int, _Answer] = {}
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            answer = answers.setdefault(piece.index, _Answer(use))
            if (made := answer.read(piece)) is not None:
                yield made


class _Answer:
    def __init__(self, use: ToolUse) -> None:
        names = {tool["function"]["name"] for tool in use.tools}
        self._reader = CallReader(names, use.several)
        self._tokens: tuple[Token, ...] = ()  # of text that is held
        self._count = 0

    def read(self, piece: Piece) -> Piece | None:
        read = self._reader.feed(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            read = Read(read.text + self._reader.finish().text, read.calls)
            if reason == "stop" and self._reader.found:
                reason = "tool_calls"
        self._tokens += piece.tokens
        calls = []
        for call in read.calls:
            key = f"call_{uuid.uuid4().hex[:24]}"
            calls.append(ToolCall(self._count, call.arguments, key, call.name))
            self._count += 1
        if not (read.text or calls or reason or piece.usage):
            return None
        tokens, self._tokens = self._tokens, ()
        return replace(
            piece, text=read.text, tokens=tokens, tool_calls=tuple(calls), finish_reason=reason
        )
