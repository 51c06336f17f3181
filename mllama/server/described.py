"""The bodies of answers, as `answers` makes them and `/openapi.json` describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict  # typing's is not enough before Python 3.12

from mllama.engine.interface import FinishReason, State

REFS = "#/components/schemas/{model}"


class CachedTokens(TypedDict):
    """Those whose keys and values were there already."""

    cached_tokens: int


class UsageBody(TypedDict):
    """Tokens of a request over all its answers, one for each picture."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class LikelyToken(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class AnswerToken(LikelyToken):
    """A token of an answer, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """Of the tokens of an answer."""

    content: list[AnswerToken]
    refusal: None


class FunctionBody(TypedDict):
    """A function that is called, and its arguments as JSON."""

    name: str
    arguments: str


class CallBody(TypedDict):
    """A call."""

    id: str
    type: Literal["function"]
    function: FunctionBody


class AnswerMessage(TypedDict):
    """What the model says; its content is null where it calls functions and says nothing."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[CallBody]]


class ChatChoice(TypedDict):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class FunctionDelta(TypedDict):
    """The name stands in the first part of a call."""

    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    """A part of a call; the first has its id and type."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """What is new in an answer."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[CallDelta]


class ChunkChoice(TypedDict):
    """Of one of the answers; the reason stands in its last."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """An event of a stream. Usage, where it is asked for, is null but in the last, which has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageBody | None]


class TextLogprobs(TypedDict):
    """Of the tokens of a text, and where in it they begin."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(TypedDict):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody


class TextChunkChoice(TypedDict):
    """What is new in one of the texts; the reason stands in its last."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletionChunk(TypedDict):
    """An event of a stream. Usage, where it is asked for, is null but in the last, which has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: NotRequired[UsageBody | None]


class ErrorDetails(TypedDict):
    """What was given and what is expected, the parameter at fault, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """Of every answer that is no success."""

    error: ErrorDetails


class ModelEntry(TypedDict):
    """A name under which the model is asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All of them; the first is that of a request that names none."""

    object: Literal["list"]
    data: list[ModelEntry]


class Health(TypedDict):
    """Whether requests are answered."""

    status: State


class Version(TypedDict):
    """Of the package."""

    version: str


_REFUSALS: Mapping[int | str, str] = {
    400: "the request is not what is taken; param names where",
    401: "a key is asked for, and this is none",
    404: "there is no model of this name",
    413: "the body is too large",
    429: "the queue is full; Retry-After says in how many seconds to ask again",
    500: "the answer could not be made",
    503: "the model is being loaded, or the server ends",
    "4XX": "the request is refused",
}
Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int | str) -> Responses:
    """Of a route, for its `responses`."""
    return {s: {"model": ErrorBody, "description": _REFUSALS[s]} for s in statuses}


def answers(whole: Any, event: Any) -> Responses:
    """Of a route that asks the engine."""
    bodies = [{"$ref": REFS.format(model=kind.__name__)} for kind in (event, ErrorBody)]
    body = {"contentMediaType": "application/json", "contentSchema": {"anyOf": bodies}}
    data = {
        "description": "a part of the answer; the last is [DONE] or, where it failed, an error",
        "anyOf": [{"const": "[DONE]"}, {"type": "string", **body}],
    }
    events = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    success = {
        "model": whole,
        "description": "the answer, or its events where stream is true",
        "content": {"text/event-stream": {"itemSchema": events}},
    }
    return {200: success} | refusals(400, 401, 404, 413, 429, 500, 503)


def schemas(*kinds: Any) -> dict[str, Any]:
    """Of types, and of those in them, by name."""
    found: dict[str, Any] = {}
    for kind in kinds:
        schema = TypeAdapter(kind).json_schema(ref_template=REFS)
        found |= schema.pop("$defs", {})
        found[kind.__name__] = schema
    return found
