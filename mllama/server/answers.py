"""From an engine's pieces to the bodies and events of an answer."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllama.engine.interface import FinishReason, Piece, Token, ToolCall, Usage, WorkFailed
from mllama.server.described import (
    AnswerMessage,
    CallBody,
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    FunctionBody,
    LikelyToken,
    TextChoice,
    TextCompletion,
    TextCompletionChunk,
    TextLogprobs,
    UsageBody,
)

_RULED_OUT = -9999.0


@dataclass(frozen=True)
class Heading:
    """What is the same in all events of an answer."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass
class _Answer:
    """One of the answers, put together."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    calls: dict[int, CallBody] = field(default_factory=dict)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        for call in piece.tool_calls:
            if (found := self.calls.get(call.index)) is None:
                found = self.calls[call.index] = _call_body(call)
            found["function"]["arguments"] += call.arguments
        self.finish_reason = piece.finish_reason or self.finish_reason


def _call_body(call: ToolCall) -> CallBody:
    assert call.id is not None and call.name is not None  # the first part of a call has them
    function: FunctionBody = {"name": call.name, "arguments": ""}
    return {"id": call.id, "type": "function", "function": function}


async def collected(pieces: AsyncIterator[Piece], count: int) -> tuple[list[_Answer], Usage]:
    """All of it. Raises: WorkFailed for an end without usage or without a reason."""
    answers = [_Answer() for _ in range(count)]
    usage = None
    async for piece in pieces:
        answers[piece.index].add(piece)
        usage = piece.usage or usage
    if usage is None or not all(answer.finish_reason for answer in answers):
        raise WorkFailed("the answer ended before its end")
    return answers, usage


def usage_body(usage: Usage) -> UsageBody:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chat_body(
    heading: Heading, answers: Sequence[_Answer], usage: Usage, with_tokens: bool
) -> ChatCompletion:
    """The answer of /v1/chat/completions."""
    choices: list[ChatChoice] = []
    for i, answer in enumerate(answers):
        text = "".join(answer.texts)
        calls = [answer.calls[j] for j in sorted(answer.calls)]
        message: AnswerMessage = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = calls
        choices.append(
            {
                "index": i,
                "message": message,
                "logprobs": _chat_logprobs(answer.tokens) if with_tokens else None,
                "finish_reason": answer.finish_reason,
            }
        )
    return {**heading.body("chat.completion"), "choices": choices, "usage": usage_body(usage)}


def completion_body(
    heading: Heading, answers: Sequence[_Answer], usage: Usage, with_tokens: bool
) -> TextCompletion:
    """The answer of /v1/completions."""
    choices: list[TextChoice] = [
        {
            "index": i,
            "text": "".join(answer.texts),
            "logprobs": _completion_logprobs(answer.tokens) if with_tokens else None,
            "finish_reason": answer.finish_reason,
        }
        for i, answer in enumerate(answers)
    ]
    return {**heading.body("text_completion"), "choices": choices, "usage": usage_body(usage)}


async def chat_events(
    heading: Heading,
    pieces: AsyncIterator[Piece],
    count: int,
    with_tokens: bool,
    with_usage: bool,
) -> AsyncIterator[ChatCompletionChunk]:
    """Roles, deltas, an event with each answer's reason, and usage where it is asked for."""
    head = heading.body("chat.completion.chunk") | ({"usage": None} if with_usage else {})

    def event(
        index: int,
        delta: ChatDelta,
        reason: FinishReason | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> Any:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for i in range(count):
        yield event(i, {"role": "assistant", "content": ""})
    usage, open_answers = None, set(range(count))
    async for piece in pieces:
        delta: ChatDelta = {"content": piece.text} if piece.text or piece.tokens else {}
        if piece.tool_calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.tool_calls]
        if delta:
            logprobs = _chat_logprobs(piece.tokens) if with_tokens else None
            yield event(piece.index, delta, None, logprobs)
        if piece.finish_reason:
            open_answers.discard(piece.index)
            yield event(piece.index, {}, piece.finish_reason)
        usage = piece.usage or usage
    _check_end(usage, open_answers)
    if with_usage and usage is not None:
        yield {**head, "choices": [], "usage": usage_body(usage)}


async def completion_events(
    heading: Heading,
    pieces: AsyncIterator[Piece],
    count: int,
    with_tokens: bool,
    with_usage: bool,
) -> AsyncIterator[TextCompletionChunk]:
    """Texts, with each answer's reason in its last, and usage where it is asked for."""
    head = heading.body("text_completion") | ({"usage": None} if with_usage else {})
    usage, open_answers = None, set(range(count))
    async for piece in pieces:
        if piece.text or piece.tokens or piece.finish_reason:
            logprobs = _completion_logprobs(piece.tokens) if with_tokens else None
            choice = {
                "index": piece.index,
                "text": piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }
            yield {**head, "choices": [choice]}
        if piece.finish_reason:
            open_answers.discard(piece.index)
        usage = piece.usage or usage
    _check_end(usage, open_answers)
    if with_usage and usage is not None:
        yield {**head, "choices": [], "usage": usage_body(usage)}


def _check_end(usage: Usage | None, open_answers: set[int]) -> None:
    if usage is None or open_answers:
        raise WorkFailed("the answer ended before its end")


def _call_delta(call: ToolCall) -> CallDelta:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    def entry(token: Token) -> LikelyToken:
        return {"token": token.text, "logprob": _logprob(token), "bytes": list(token.data)}

    content = [{**entry(t), "top_logprobs": [entry(u) for u in t.likeliest]} for t in tokens]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[Token]) -> TextLogprobs:
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [{_name(u): _logprob(u) for u in token.likeliest} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _logprob(token: Token) -> float:
    """JSON has no infinity: OpenAI's word for what is ruled out."""
    return _RULED_OUT if token.logprob == -math.inf else token.logprob


def _name(token: Token) -> str:
    """A text that no other token has: of parts of characters OpenAI's form, as "bytes:\\xf0\\x9f"."""
    if token.text.encode() == token.data:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)
