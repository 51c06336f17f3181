"""What an engine is asked for and what it answers: plain data, and nothing of how either is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "tool_calls"]
State = Literal["loading", "ready", "draining", "dead"]


class Constraint(Protocol):
    """What an answer has to be: the tokens that may come next, given those that came."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but a token that ends the answer may follow."""
        ...

    def fill(self, row: Any) -> None:
        """Write the tokens that may come next into ceil(V / 32) contiguous int32 of numpy, bit i % 32 of word
        i // 32 for token i. Raises: RuntimeError where the answer cannot go on, which ends it alone."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed, one that ends the answer too."""
        ...

    def fork(self) -> Constraint:
        """The same for another of the answers."""
        ...


@dataclass(frozen=True)
class Options:
    """How an answer is made. None: neither the request nor the command line says it.

    Attributes:
        max_tokens: length of an answer; the engine cuts it to what the context has left. None: all of that.
        min_tokens: before which no stop token is chosen, and no stop string ends the answer.
        seed: of the first of `n` answers; the others' follow from it. None: drawn.
        top_logprobs: how many of the likeliest tokens are told beside each token; None: nothing is.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer and its log-probability, with those of the likeliest in its place.

    Attributes:
        text: of the token alone; of a part of a character a replacement for it.
        data: its bytes, of which that is so.
        logprob: -inf where the model rules the token out.
        offset: characters of the answer's text before the one that it begins or goes on with.
    """

    text: str
    data: bytes
    logprob: float
    likeliest: tuple[Token, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A part of a call: the first of a call has its id and name, all have a part of its arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request over all its answers, one for each picture, and how long it waited.

    Attributes:
        cached_tokens: those of the prompt whose keys and values were there already.
        queue_seconds: from `submit` to the first step that computed something of it.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What is new in one answer: whole characters, the tokens they are of, or its end.

    Attributes:
        index: which of the `n` answers.
        tokens: empty unless `top_logprobs` asks for them.
        finish_reason: on the last piece of the answer.
        usage: on the last piece of the request.
    """

    index: int = 0
    text: str = ""
    tokens: tuple[Token, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Distribution:
    """Counts of values up to each bound, cumulative, and their sum; the last bound is infinity."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class Stats:
    """What the engine counts, since its start or now, by the names of the metrics they become."""

    gauges: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)


class Refused(ValueError):
    """A request that cannot be answered as it is; the words are for the person who sent it.

    Attributes:
        param: the parameter that is at fault, where there is one.
        code: a word that clients know the reason by, where there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Overloaded(RuntimeError):
    """The queue is full: the same request may be taken after some seconds."""

    def __init__(self, message: str, retry_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Unavailable(RuntimeError):
    """The engine takes no work: it loads, ends or has failed."""


class WorkFailed(RuntimeError):
    """The work was begun and cannot be ended; the words are for the person who sent it."""
